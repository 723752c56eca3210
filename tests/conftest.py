"""What holds for all tests."""

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

# Tests run beside each other on shared cores, so the time of one example says nothing about the code. The examples are
# the same in each run: a change is judged by what it does, not by chance. The profile deep searches with new ones.
settings.register_profile("shared cores", deadline=None, derandomize=True)
settings.load_profile("shared cores")
# pytest --hypothesis-profile deep tests/fuzz
settings.register_profile("deep", deadline=None, derandomize=False, max_examples=1000)


_FORMATTER, _LEVEL = HANDLER.formatter, LOG.level


@pytest.fixture(autouse=True)
def _log_without_stage() -> None:
    """Begin each test with log lines as a driver has them: a stage that an earlier test ran has set its own prefix."""
    HANDLER.setFormatter(_FORMATTER)
    LOG.setLevel(_LEVEL)


@pytest.fixture(scope="module")
def world() -> "Iterator[World]":
    """Return a process group of one rank, and leave the environment as it was."""
    from sidestack.infra.distributed import process_group  # torch, which most modules can do without

    before = dict(os.environ)
    with process_group() as world:
        yield world
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Return the address of an S3 on this machine."""
    from tests.object_store import moto_server

    with moto_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Bucket":
    """Return a new bucket of an S3 for this process and those it starts, in a folder and with a mirror of their own."""
    from tests.object_store import Bucket, use

    use(monkeypatch, endpoint, tmp_path / "mirror")
    monkeypatch.chdir(tmp_path)
    return Bucket(endpoint)
