"""A bucket for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_store import Bucket, moto_server, use


@pytest.fixture(scope="package")
def endpoint() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    use(monkeypatch, endpoint, tmp_path / "mirror")
    monkeypatch.chdir(tmp_path)
    return Bucket(endpoint)
