"""What holds for all tests."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from sidestack.infra.distributed import World

# Tests run beside each other on shared cores, so the time of one example says nothing about the code. The examples are
# the same in each run: a change is judged by what it does, not by chance. The profile deep searches with new ones.
settings.register_profile("shared cores", deadline=None, derandomize=True)
settings.load_profile("shared cores")
# pytest --hypothesis-profile deep tests/fuzz
settings.register_profile("deep", deadline=None, derandomize=False, max_examples=1000)


@pytest.fixture(scope="module")
def world() -> "Iterator[World]":
    """Return a process group of one rank, and leave the environment as it was."""
    from sidestack.infra.distributed import started  # torch, which most modules can do without

    before = dict(os.environ)
    with started() as world:
        yield world
    os.environ.clear()
    os.environ.update(before)
