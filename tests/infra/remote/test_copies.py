"""Local copies of source files in a store: which files are fetched, fetched again, or left alone."""

from pathlib import Path

import pytest

from sidestack.infra.errors import DataError, RemoteError
from sidestack.infra.remote.copies import (
    fetch_sources,
    folders,
    is_there,
    put,
    read_bytes,
    refresh,
    remove_file,
    remove_folder,
)
from sidestack.infra.remote.urls import local_path
from tests.object_store import Bucket


def files_of(path: Path) -> dict[str, bytes]:
    """Return the files of a folder of the mirror without accessing the store."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_folder_is_copied_and_only_changed_files_are_fetched_again(bucket: Bucket) -> None:
    for key in ("a.csv", "date=1/b.csv", "date=2/c.csv"):
        bucket.put(f"log/{key}", key.encode())
    bucket.put("logs-of-others/x.csv", b"x")
    log = local_path(f"{bucket.url}/log")
    fetch_sources([log])
    assert files_of(log) == {key: key.encode() for key in ("a.csv", "date=1/b.csv", "date=2/c.csv")}
    times = {name: (log / name).stat() for name in files_of(log)}
    bucket.put("log/a.csv", b"A.csv")  # equally many bytes, possibly in the same second
    bucket.remove("log/date=2/c.csv")
    fetch_sources([log])
    assert files_of(log) == {"a.csv": b"A.csv", "date=1/b.csv": b"date=1/b.csv"}
    after = (log / "date=1/b.csv").stat()
    assert (after.st_ino, after.st_mtime_ns) == (times["date=1/b.csv"].st_ino, times["date=1/b.csv"].st_mtime_ns)
    assert (log / "a.csv").stat().st_mtime_ns != times["a.csv"].st_mtime_ns
    assert not local_path(f"{bucket.url}/logs-of-others").exists()


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("log/*/x.csv", ["d=1/x.csv", "d=2/x.csv"]),
        ("log/d=[1]/*", ["d=1/x.csv", "d=1/y.txt"]),
        ("log/**/*.csv", ["d=1/x.csv", "d=2/x.csv", "top.csv"]),
        ("log/d=?", ["d=1/x.csv", "d=1/y.txt", "d=2/x.csv"]),
    ],
)
def test_only_files_that_match_a_glob_are_fetched(bucket: Bucket, pattern: str, found: list[str]) -> None:
    for key in ("top.csv", "d=1/x.csv", "d=1/y.txt", "d=2/x.csv"):
        bucket.put(f"log/{key}", b"row")
    fetch_sources([local_path(f"{bucket.url}/{pattern}")])
    assert sorted(files_of(local_path(f"{bucket.url}/log"))) == found


def test_single_file_is_fetched_without_folder_markers(bucket: Bucket) -> None:
    bucket.put("log/items.parquet", b"rows")
    bucket.put("log/items.parquet.old", b"older rows")
    bucket.put("log/", b"")
    fetch_sources([local_path(f"{bucket.url}/log/items.parquet")])
    assert files_of(local_path(f"{bucket.url}/log")) == {"items.parquet": b"rows"}


def test_missing_source_is_named_and_local_paths_are_ignored(bucket: Bucket, tmp_path: Path) -> None:
    fetch_sources([tmp_path / "none"])
    with pytest.raises(DataError, match=f"{bucket.url}/none: holds no file"):
        fetch_sources([local_path(f"{bucket.url}/none")])
    with pytest.raises(RemoteError, match="s3://no-such-bucket.*there is no such bucket"):
        fetch_sources([local_path("s3://no-such-bucket/log")])


def test_single_file_is_written_read_and_removed(bucket: Bucket) -> None:
    file = local_path(f"{bucket.url}/runs/x.job.json")
    assert not is_there(file) and not is_there(file.parent)
    with pytest.raises(FileNotFoundError):
        read_bytes(file)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"record")
    put(file)
    assert bucket.get("runs/x.job.json") == b"record" and is_there(file) and is_there(file.parent)
    bucket.put("runs/x.job.json", b"of another host")
    assert read_bytes(file) == b"of another host"
    refresh(file.parent)
    assert file.read_bytes() == b"of another host"
    remove_file(file)
    assert not file.exists() and bucket.keys() == []


def test_folders_are_those_of_the_store(bucket: Bucket) -> None:
    for key in ("c/step-1/manifest.json", "c/step-1/a/x", "c/step-2/a/x", "c/file"):
        bucket.put(key, b"x")
    path = local_path(f"{bucket.url}/c")
    assert folders(path) == [path / "step-1", path / "step-2"]
    assert folders(path, having="manifest.json") == [path / "step-1"]
    remove_folder(path / "step-1", first="manifest.json")
    assert bucket.keys() == ["c/file", "c/step-2/a/x"]
