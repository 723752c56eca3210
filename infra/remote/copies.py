"""Files of a store and their copies in this machine's mirror: single files, and folders that others fill.

Every function takes a path from `infra.remote.urls.local_path`, and works for local paths, too.
"""

import contextlib
import fnmatch
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sidestack.infra.errors import DataError, RemoteError
from sidestack.infra.remote.objects import Found, Objects, objects_of
from sidestack.infra.remote.urls import url_of

AT_A_TIME = 8
"""Files that are uploaded or fetched in parallel."""


def remote(path: str | Path) -> tuple[Objects, str] | None:
    """Return the store and the key of a path that stands for a URL; None: it is a local path."""
    url = url_of(path)
    return None if url is None else objects_of(url)


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; for a URL those in the store.

    Raises:
        FileNotFoundError: there is none. OSError: it cannot be read. RemoteError: the store fails or refuses.
    """
    found = remote(path)
    if found is None:
        return path.read_bytes()
    store, key = found
    content = store.read(key)
    if content is None:
        raise FileNotFoundError(2, "No such file or directory", url_of(path))
    return content


def is_there(path: Path) -> bool:
    """Return whether a file or folder exists; for a URL in the store."""
    found = remote(path)
    if found is None:
        return path.exists()
    store, key = found
    return store.read(key) is not None or bool(store.listed(f"{key}/", at_most=1))


def put(file: Path) -> None:
    """Upload a file of the mirror to the store; no-op for a local path."""
    found = remote(file)
    if found is not None:
        store, key = found
        store.write(key, file.read_bytes())


def write_if_absent(file: Path, content: bytes) -> bool:
    """Write a file to the store unless there is one; return whether it was written; True for a local path."""
    found = remote(file)
    if found is None:
        return True
    store, key = found
    return store.write_new(key, content, uuid.uuid4().hex)


def remove_file(file: Path) -> None:
    """Remove a file, if it exists."""
    file.unlink(missing_ok=True)
    found = remote(file)
    if found is not None:
        store, key = found
        store.remove([key])


def remove_folder(folder: Path, *, first: str = "") -> None:
    """Remove a folder and its content, on this machine and in the store; what cannot be removed is left.

    Args:
        folder: the folder. first: a file to remove before all others: the one that tells readers the folder is whole.
    """
    found = remote(folder)
    if found is not None:
        store, key = found
        with contextlib.suppress(RemoteError):
            store.remove([f"{key}/{first}"] if first else [])
            store.remove([one.key for one in store.listed(f"{key}/")])
    shutil.rmtree(folder, ignore_errors=True)


def folders(folder: Path, *, having: str = "") -> list[Path]:
    """Return the folders within a folder, for a URL those in the store: all, or those with a file named `having`."""
    found = remote(folder)
    if found is None:
        return [one for one in folder.glob("*/") if (one / having).exists()]
    store, key = found
    inside = [one.key.removeprefix(f"{key}/") for one in store.listed(f"{key}/")]
    names = {one.partition("/")[0] for one in inside if "/" in one}
    return [folder / one for one in sorted(names) if not having or f"{one}/{having}" in inside]


def refresh(path: Path) -> None:
    """Update this machine's copy of a file or a folder's files, such as another machine's records, from the store.

    No-op for a local path.
    """
    found = remote(path)
    if found is not None:
        store, key = found
        own = (one for one in store.listed(key) if one.key == key or one.key.startswith(f"{key}/"))
        _fetch_changed(store, {Path(f"{path}{one.key.removeprefix(key)}"): one for one in own})


def fetch_sources(paths: Iterable[Path]) -> None:
    """Copy files, folders or globs that others put into a store to this machine; no-op for local paths.

    A copy is fetched again if the object's time, tag or size has changed, and removed if the object is gone.

    Raises:
        DataError: there is nothing at a URL. RemoteError: a store cannot be reached, or refuses.
    """
    for path in paths:
        found = remote(path)
        if found is not None:
            _fetch_source(path, *found)


def _fetch_source(path: Path, store: Objects, key: str) -> None:
    parts = path.parts
    wild = next((place for place, part in enumerate(parts) if _has_wildcard(part)), len(parts))
    base, pattern = Path(*parts[:wild]), parts[wild:]
    base_key = "/".join(key.split("/")[: len(key.split("/")) - len(pattern)]) if pattern else key
    prefix = f"{base_key}/" if base_key else ""
    if not pattern:
        single = [one for one in store.listed(key) if one.key == key] if key else []
        if single:
            _fetch_changed(store, {base: single[0]})
            return
    wanted = {
        base / inside: one
        for one in store.listed(prefix)
        if (inside := one.key.removeprefix(prefix))
        and not inside.endswith("/")
        and _matches(inside.split("/"), pattern)
    }
    if not wanted:
        raise DataError(f"{url_of(path)}: holds no file")
    for file in base.rglob("*") if base.is_dir() else ():
        if file.is_file() and file not in wanted and _matches(file.relative_to(base).parts, pattern):
            file.unlink(missing_ok=True)
    _fetch_changed(store, wanted)


def _has_wildcard(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path matches a pattern of `Path.glob`, or is below a match; an empty pattern matches all."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _fetch_changed(store: Objects, wanted: dict[Path, Found]) -> None:
    changed = [(one.key, file, one.stamp) for file, one in wanted.items() if not _is_same(file, one)]
    fetch(store, changed)


def _is_same(file: Path, one: Found) -> bool:
    try:
        status = file.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (one.size, one.stamp)


def fetch(store: Objects, wanted: Sequence[tuple[str, Path, int]]) -> None:
    """Write objects into files, which appear atomically, several in parallel.

    Args:
        store: the store of the objects. wanted: key, file, and the file's new time, in ns; 0: the current time.
    """

    def one(key: str, file: Path, stamp: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            store.download(key, temporary)
            if stamp:
                os.utime(temporary, ns=(stamp, stamp))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

    run_in_threads(lambda item: one(*item), wanted)


def run_in_threads(work: "Callable[[tuple[str, Path, int]], None]", items: Sequence[tuple[str, Path, int]]) -> None:
    """Do some work for each item in a few threads; raise the first error once all have ended."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for _ in pool.map(work, items):
            pass
