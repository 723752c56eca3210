"""A store on pyarrow's filesystems, tested with the local one because the others need servers."""

from pathlib import Path

import pytest
from pyarrow import fs

from sidestack.infra.errors import RemoteError
from sidestack.infra.remote.arrow import ArrowObjects, filesystem_of
from sidestack.infra.remote.objects import Objects


@pytest.fixture
def store(tmp_path: Path) -> Objects:
    return ArrowObjects(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "file", "")


def test_objects_are_written_read_listed_and_removed(store: Objects, tmp_path: Path) -> None:
    assert store.read("a/x") is None and store.listed("a/") == []
    store.write("a/x", b"one")
    (tmp_path / "file").write_bytes(b"three")
    store.upload(tmp_path / "file", "a/b/y")
    store.write("ab", b"beside")
    store.download("a/b/y", tmp_path / "copy")
    assert store.read("a/x") == b"one" and (tmp_path / "copy").read_bytes() == b"three"
    assert [(one.key, one.size) for one in store.listed("a/")] == [("a/b/y", 5), ("a/x", 3)]
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"x", "y", "ab", "file", "copy"}
    assert [one.key for one in store.listed("a/", at_most=1)] == ["a/b/y"]
    store.remove(["a/x", "a/b/y", "a/none"])
    assert store.listed("a/") == []


def test_write_new_does_not_overwrite_another_writers_object(store: Objects) -> None:
    assert store.write_new("m", b"mine", "me") and store.write_new("m", b"mine", "me")
    assert not store.write_new("m", b"yours", "you") and store.read("m") == b"mine"


def test_errors_name_the_url(store: Objects, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="file:///none: there is no such bucket or object"):
        store.download("none", tmp_path / "copy")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(RemoteError, match="file:///a/b: the store cannot be used"):
        store.write("a/b", b"")
    with pytest.raises(RemoteError, match="hdfs://nowhere:1: cannot be opened"):
        filesystem_of("hdfs", "nowhere:1")
