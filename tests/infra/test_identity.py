"""The identity of source files: what changes it, and which files are read to compute it."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sidestack.infra.identity
from sidestack.infra.errors import DataError
from sidestack.infra.identity import Identify, IdentityCache
from tests.noted import noted


def write(path: Path, values: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": values}), path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "log" / "a.parquet", [1, 2, 3])


@pytest.fixture
def cache(tmp_path: Path) -> IdentityCache:
    return IdentityCache(tmp_path / "cache" / "sources.json")


def identity_of(cache: IdentityCache, file: Path, identify: Identify = "footer") -> str:
    return cache.identities([file], identify)[file]


@pytest.mark.parametrize("identify", ["footer", "sha256"])
def test_identity_depends_on_content_and_not_on_name_or_time(
    identify: Identify, file: Path, cache: IdentityCache
) -> None:
    before = identity_of(cache, file, identify)
    os.utime(file, ns=(1, 1))
    assert identity_of(cache, file, identify) == before
    assert identity_of(cache, write(file.with_name("b.parquet"), [1, 2, 3]), identify) == before
    assert identity_of(cache, write(file, [1, 2, 4]), identify) != before
    assert identity_of(cache, write(file, [1, 2]), identify) != before


def test_changed_bytes_under_an_equal_footer_are_found_by_the_full_hash_only(file: Path, cache: IdentityCache) -> None:
    before = {identify: identity_of(cache, file, identify) for identify in ("footer", "sha256")}
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes([whole[4] ^ 1]) + whole[5:])
    assert identity_of(cache, file) == before["footer"] and identity_of(cache, file, "sha256") != before["sha256"]


def test_only_new_or_modified_files_are_opened(
    file: Path, cache: IdentityCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    whole = sidestack.infra.identity._footer_digest
    monkeypatch.setattr(sidestack.infra.identity, "_footer_digest", noted(lambda file: opened.append(file.name), whole))
    files = [file, write(file.with_name("b.parquet"), [7])]
    first = cache.identities(files)
    assert sorted(opened) == ["a.parquet", "b.parquet"] and list(first) == files
    opened.clear()
    assert IdentityCache(cache.path).identities(files[::-1]) == first and opened == []
    files.append(write(file.with_name("c.parquet"), [8]))
    files[1].touch()
    found = cache.identities(files)
    assert sorted(opened) == ["b.parquet", "c.parquet"] and {path: found[path] for path in first} == first


def test_files_of_other_logs_stay_in_the_cache(
    file: Path, cache: IdentityCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity_of(cache, file)
    other = write(file.with_name("b.parquet"), [7])
    identity_of(cache, other)
    monkeypatch.setattr(sidestack.infra.identity, "_footer_digest", lambda file: pytest.fail(f"{file} was opened"))
    cache.identities([file, other])


@pytest.mark.parametrize("content", ["", "{", "[]", "no json"])
def test_lost_or_damaged_cache_is_rebuilt(content: str, file: Path, cache: IdentityCache) -> None:
    before = identity_of(cache, file)
    cache.path.write_text(content)
    assert identity_of(cache, file) == before
    assert list(json.loads(cache.path.read_text())) == [str(file)]
    cache.path.unlink()
    assert identity_of(cache, file) == before
    assert [path.name for path in cache.path.parent.iterdir()] == ["sources.json"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"item_id,text\n", b"PAR1" + bytes(40), b"\xff\xff\xff\x00PAR1"])
def test_file_that_is_not_parquet_is_named(content: bytes, file: Path, cache: IdentityCache) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"log/a\.parquet: is no Parquet file: it does not end in a footer"):
        identity_of(cache, file)
    assert not cache.path.exists()


def test_partly_written_file_is_named(file: Path, cache: IdentityCache) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"log/a\.parquet: is no Parquet file"):
        identity_of(cache, file)


@pytest.mark.parametrize("identify", ["footer", "sha256"])
def test_missing_file_is_named(identify: Identify, file: Path, cache: IdentityCache) -> None:
    file.unlink()
    with pytest.raises(DataError, match=r"log/a\.parquet: cannot be read: No such file"):
        identity_of(cache, file, identify)
