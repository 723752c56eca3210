"""Fixtures and Hypothesis profiles that all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from sidestack.infra.logs import HANDLER, LOG

if TYPE_CHECKING:
    from sidestack.infra.distributed import World
    from tests.object_store import Bucket

# Before torch is imported: pytest's workers share the cores, and threads of several trainings on one core wait for each
# other at every barrier, which took three times the CPU seconds. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# Tests run in parallel on shared cores, so the duration of one example says nothing about the code: no deadline. The
# examples are the same in each run, so that a failure reproduces. The profile "deep" draws new ones.
settings.register_profile("shared cores", deadline=None, derandomize=True)
settings.load_profile("shared cores")
# pytest --hypothesis-profile deep tests/fuzz
settings.register_profile("deep", deadline=None, derandomize=False, max_examples=1000)


_FORMATTER, _LEVEL = HANDLER.formatter, LOG.level


@pytest.fixture(autouse=True)
def _log_without_stage() -> None:
    """Reset the log's format and level, which a stage that an earlier test ran in this process has changed."""
    HANDLER.setFormatter(_FORMATTER)
    LOG.setLevel(_LEVEL)


@pytest.fixture(scope="module")
def world() -> "Iterator[World]":
    """Yield a process group of one rank; restore the environment afterwards."""
    from sidestack.infra.distributed import process_group  # imports torch, which most test modules do not need

    before = dict(os.environ)
    with process_group() as world:
        yield world
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Yield the address of a local S3 server."""
    from tests.object_store import moto_server

    with moto_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Bucket":
    """Return a new bucket for this process and its children; they run in `tmp_path`, with their own mirror."""
    from tests.object_store import Bucket, use

    use(monkeypatch, endpoint, tmp_path / "mirror")
    monkeypatch.chdir(tmp_path)
    return Bucket(endpoint)
