"""Committed directories in a store.

    <url>/manifest.json          put last, and only if there is none: who puts it has committed
    <url>/<tree>/<name>          the files, in a folder named after all their names and contents

Two writers of one output write the same folder only if they write the same bytes, so that nobody's files are changed by
another, and a manifest is always of whole files. What a writer left that did not commit is removed by the one that did.
"""

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from sidestack.infra.errors import AlreadyCommittedError, RemoteError
from sidestack.infra.remote.copies import at_a_time, fetch, remote
from sidestack.infra.remote.objects import Objects
from sidestack.infra.remote.urls import url_of

_OURS = re.compile(r"[0-9a-f]{32}/.+|\.probe-[0-9a-f]{8}", re.DOTALL)
"""What a writer puts into the place of a directory, the manifest aside."""
_LOOKED_AT = 1000


def tree_name(digests: Mapping[str, str]) -> str:
    """Return the name of the folder of some files, by their SHA-256."""
    lines = "\n".join(f"{name}\0{digest}" for name, digest in sorted(digests.items()))
    return sha256(lines.encode()).hexdigest()[:32]


def what_is_there(path: Path, manifest: str) -> tuple[bool, str | None]:
    """Return whether a directory is committed in a store, and the URL of something in it that is not ours, if any.

    Of a place that holds more than a commit has, such as a whole bucket, only the first objects are looked at.
    """
    store, key = _remote(path)
    found = [one.key.removeprefix(f"{key}/") for one in store.listed(f"{key}/", _LOOKED_AT)]
    others = (f"{url_of(path)}/{one}" for one in found if one != manifest and not _OURS.fullmatch(one))
    return store.read(f"{key}/{manifest}") is not None, next(others, None)


def read_manifest_bytes(path: Path, manifest: str) -> bytes | None:
    """Return the bytes of the manifest of a directory in a store; None: it is not committed."""
    found = remote(path)
    assert found is not None, f"{path}: is a local path"
    store, key = found
    return store.read(f"{key}/{manifest}") if key else None


def require_writable(path: Path) -> None:
    """Check, before hours of work, that objects can be written where a directory is to be committed.

    Raises:
        RemoteError: they cannot.
    """
    store, key = _remote(path)
    probe = f"{key}/.probe-{uuid.uuid4().hex[:8]}"
    store.write(probe, b"sidestack writes here\n")
    with contextlib.suppress(RemoteError):
        store.remove([probe])


def put_files(path: Path, staging: Path, names: Sequence[str], digests: Mapping[str, str]) -> None:
    """Put files of a directory that is to be committed.

    Args:
        path: the directory. staging: where the files lie now. names: of those to put. digests: of all files, by name.
    """
    store, key = _remote(path)
    folder = f"{key}/{tree_name(digests)}"
    at_a_time(lambda one: store.upload(one[1], one[0]), [(f"{folder}/{name}", staging / name, 0) for name in names])


def commit(path: Path, manifest: str, content: bytes, digests: Mapping[str, str], writer: str) -> None:
    """Commit a directory whose files were put: put its manifest, if there is none.

    Args:
        path: the directory. manifest: the file's name. content: its bytes. digests: of all files, by name.
        writer: names who commits, so that an answer that was lost is not taken for another's commit.

    Raises:
        AlreadyCommittedError: another writer has committed it; what was put here is removed.
    """
    store, key = _remote(path)
    own = tree_name(digests)
    is_own = store.write_new(f"{key}/{manifest}", content, writer)
    kept = own if is_own else _tree_of(store.read(f"{key}/{manifest}") or b"")
    with contextlib.suppress(RemoteError):  # what is left of writers that did not come to commit, or of this one
        inside = [one.key.removeprefix(f"{key}/") for one in store.listed(f"{key}/" if is_own else f"{key}/{own}/")]
        left = [one for one in inside if _OURS.fullmatch(one) and kept and not one.startswith(f"{kept}/")]
        store.remove([f"{key}/{one}" for one in left])
    if not is_own:
        raise AlreadyCommittedError(f"{url_of(path)}: was committed by another process meanwhile")


def _tree_of(manifest: bytes) -> str:
    """Return the folder of the files of a manifest; empty where it cannot be told."""
    try:
        return tree_name({name: entry["sha256"] for name, entry in json.loads(manifest)["files"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


@contextmanager
def fetching(path: Path, names: Sequence[str], digests: Mapping[str, str]) -> Iterator[Path]:
    """Fetch files of a committed directory, and have them take its copy's place when the body ends without error.

    Args:
        path: the directory. names: of the files. digests: of all files, by name.

    Yields:
        the temporary directory that holds them.

    Raises:
        RemoteError: the store cannot be reached, refuses, or lacks a file.
    """
    with _fetched(path, names, digests) as staging:
        yield staging
        _take_place(staging, path)


@contextmanager
def fetching_into(path: Path, names: Sequence[str], digests: Mapping[str, str]) -> Iterator[Path]:
    """Fetch files of a committed directory, and have each take its copy's place when the body ends without error.

    Arguments, value and errors are those of `fetching`.
    """
    with _fetched(path, names, digests) as staging:
        yield staging
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(path / name)


@contextmanager
def _fetched(path: Path, names: Sequence[str], digests: Mapping[str, str]) -> Iterator[Path]:
    store, key = _remote(path)
    folder = f"{key}/{tree_name(digests)}"
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.fetched")
    try:
        staging.mkdir(parents=True)
        fetch(store, [(f"{folder}/{name}", staging / name, 0) for name in names])
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sizes(path: Path, digests: Mapping[str, str]) -> dict[str, int]:
    """Return the bytes of the files of a committed directory that are in the store, by name."""
    store, key = _remote(path)
    folder = f"{key}/{tree_name(digests)}/"
    return {one.key.removeprefix(folder): one.size for one in store.listed(folder)}


def _take_place(staging: Path, path: Path) -> None:
    """Rename a directory, over what is there; where another process does so meanwhile, its copy is as good."""
    with contextlib.suppress(FileNotFoundError):
        path.rename(staging.with_name(f"{staging.name}.old"))
    try:
        staging.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(staging.with_name(f"{staging.name}.old"), ignore_errors=True)


def _remote(path: Path) -> tuple[Objects, str]:
    found = remote(path)
    assert found is not None, f"{path}: is a local path"
    if not found[1]:
        raise RemoteError(f"{url_of(path)}: is a whole bucket; name a folder in it")
    return found
