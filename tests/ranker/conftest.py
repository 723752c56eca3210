"""What several modules of the ranker's tests start with."""

import os
from collections.abc import Iterator

import pytest

from infra.distributed import World, started


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Return a process group of one rank, and leave the environment as it was."""
    before = dict(os.environ)
    with started() as world:
        yield world
    os.environ.clear()
    os.environ.update(before)
