"""What holds for all tests."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from infra.distributed import World

# Tests run beside each other on shared cores: how long an example takes says nothing of the code.
settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")
# More of the same: pytest --hypothesis-profile deep tests/fuzz
settings.register_profile("deep", deadline=None, max_examples=1000)


@pytest.fixture(scope="module")
def world() -> "Iterator[World]":
    """Return a process group of one rank, and leave the environment as it was."""
    from infra.distributed import started  # torch, which most modules can do without

    before = dict(os.environ)
    with started() as world:
        yield world
    os.environ.clear()
    os.environ.update(before)
