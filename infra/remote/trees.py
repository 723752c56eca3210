"""Committed directories in a store.

    <url>/manifest.json          uploaded last, and only if there is none: its writer has committed
    <url>/<tree>/<name>          the files, in a folder named by a digest of all their names and contents

Two writers of one output write the same folder only if they write the same bytes. So no writer changes another's files,
and a manifest always describes whole files. The writer that commits removes the files of those that did not.
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
from sidestack.infra.remote.copies import fetch, remote, run_in_threads
from sidestack.infra.remote.objects import Objects
from sidestack.infra.remote.urls import url_of

_OURS = re.compile(r"[0-9a-f]{32}/.+|\.probe-[0-9a-f]{8}", re.DOTALL)
"""The names that a writer creates at a directory's URL, except the manifest."""
_LOOKED_AT = 1000


def tree_name(digests: Mapping[str, str]) -> str:
    """Return the name of the folder for some files, derived from their SHA-256."""
    lines = "\n".join(f"{name}\0{digest}" for name, digest in sorted(digests.items()))
    return sha256(lines.encode()).hexdigest()[:32]


def inspect_directory(path: Path, manifest: str) -> tuple[bool, str | None]:
    """Return whether a directory is committed in a store, and the URL of a foreign object in it, if any.

    If there are more objects than a commit has, as in a whole bucket, only the first ones are checked.
    """
    store, key = _remote(path)
    found = [one.key.removeprefix(f"{key}/") for one in store.listed(f"{key}/", _LOOKED_AT)]
    others = (f"{url_of(path)}/{one}" for one in found if one != manifest and not _OURS.fullmatch(one))
    return store.read(f"{key}/{manifest}") is not None, next(others, None)


def read_manifest_bytes(path: Path, manifest: str) -> bytes | None:
    """Return the bytes of a directory's manifest in a store; None: the directory is not committed."""
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
    """Upload files of a directory that is to be committed.

    Args:
        path: the directory. staging: the local directory of the files. names: the files to upload. digests: SHA-256 of
            all files, by name.
    """
    store, key = _remote(path)
    folder = f"{key}/{tree_name(digests)}"
    run_in_threads(
        lambda one: store.upload(one[1], one[0]), [(f"{folder}/{name}", staging / name, 0) for name in names]
    )


def commit(path: Path, manifest: str, content: bytes, digests: Mapping[str, str], writer: str) -> None:
    """Commit a directory whose files were uploaded: upload its manifest, if there is none.

    Args:
        path: the directory. manifest: the file's name. content: its bytes. digests: SHA-256 of all files, by name.
        writer: identifies this writer, so that after a lost answer its own commit is not mistaken for another's.

    Raises:
        AlreadyCommittedError: another writer has committed it; the files uploaded here are removed.
    """
    store, key = _remote(path)
    own = tree_name(digests)
    is_own = store.write_new(f"{key}/{manifest}", content, writer)
    kept = own if is_own else _tree_of(store.read(f"{key}/{manifest}") or b"")
    with contextlib.suppress(RemoteError):  # remains of writers that did not commit, or of this one
        inside = [one.key.removeprefix(f"{key}/") for one in store.listed(f"{key}/" if is_own else f"{key}/{own}/")]
        left = [one for one in inside if _OURS.fullmatch(one) and kept and not one.startswith(f"{kept}/")]
        store.remove([f"{key}/{one}" for one in left])
    if not is_own:
        raise AlreadyCommittedError(f"{url_of(path)}: was committed by another process meanwhile")


def _tree_of(manifest: bytes) -> str:
    """Return the folder of a manifest's files; empty if the manifest cannot be parsed."""
    try:
        return tree_name({name: entry["sha256"] for name, entry in json.loads(manifest)["files"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


@contextmanager
def fetching(path: Path, names: Sequence[str], digests: Mapping[str, str]) -> Iterator[Path]:
    """Fetch files of a committed directory; they replace its local copy when the body ends without error.

    Args:
        path: the directory. names: the files to fetch. digests: SHA-256 of all files, by name.

    Yields:
        the temporary directory with the files.

    Raises:
        RemoteError: the store cannot be reached, refuses, or lacks a file.
    """
    with _fetched(path, names, digests) as staging:
        yield staging
        _replace(staging, path)


@contextmanager
def fetching_into(path: Path, names: Sequence[str], digests: Mapping[str, str]) -> Iterator[Path]:
    """Fetch files of a committed directory; each replaces its local copy when the body ends without error.

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
    """Return the sizes in bytes of a committed directory's files that are in the store, by name."""
    store, key = _remote(path)
    folder = f"{key}/{tree_name(digests)}/"
    return {one.key.removeprefix(folder): one.size for one in store.listed(folder)}


def _replace(staging: Path, path: Path) -> None:
    """Move a directory to its path, replacing what is there; if another process did so first, keep its equal copy."""
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
