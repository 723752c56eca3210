"""Files that survive a crash of the machine: regular files, hashed, synced, and written atomically."""

import contextlib
import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

from sidestack.infra.errors import CommitError
from sidestack.infra.remote import copies


def write_whole(file: Path, content: bytes) -> None:
    """Write one file atomically, and its folders: even after a crash, a reader sees all of it or the file before.

    For a URL it is written both on this machine and in the store.

    Raises:
        CommitError: it cannot be written, or the disk is full.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming_disk_errors(file):
            make_folder(file.parent)
            temporary.write_bytes(content)
            sync(temporary)
            temporary.replace(file)
            sync(file.parent)
        copies.put(file)
    finally:
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, so that they survive a crash.

    Raises:
        OSError: one cannot be created.
    """
    for folder in reversed([one for one in (path, *path.parents) if not one.exists()]):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextlib.contextmanager
def naming_disk_errors(out: Path) -> Iterator[None]:
    """Convert the body's disk errors into ours.

    Raises:
        CommitError: no space is left, or `out` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(out, error) from error


def disk_error(out: Path, error: OSError) -> CommitError:
    """Return our error for a disk error."""
    is_full = error.errno == errno.ENOSPC
    reason = "no space left on the disk" if is_full else f"cannot be written ({error.strerror})"
    return CommitError(f"{out}: {reason}; nothing was committed")


def folders_of(root: Path, name: str) -> Iterable[Path]:
    """Return the folders between a directory and a file in it."""
    return (root / parent for parent in Path(name).parents[:-1])


def regular_files(root: Path) -> list[str]:
    """List the files in a directory and its folders, by their relative paths, in order.

    Raises:
        CommitError: it contains something else: a link, FIFO, socket or device. A link's target may change unnoticed,
            and reading a FIFO waits for a writer.
    """
    names: list[str] = []
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    names.append(Path(entry.path).relative_to(root).as_posix())
                else:
                    raise _not_regular(entry.path, entry.stat(follow_symlinks=False).st_mode)
    return sorted(names)


_KINDS = {
    stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
    stat.S_IFDIR: "directory",
}  # fmt: skip


def _not_regular(path: str | Path, mode: int) -> CommitError:
    return CommitError(f"{path}: is a {_KINDS[stat.S_IFMT(mode)]}; a committed directory has regular files alone")


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file of a committed directory for reading, without blocking on a FIFO that has no writer.

    Raises:
        CommitError: it is a link, FIFO, socket, device or directory. OSError: it cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # Linux's errors for a link, and for a socket
            raise _not_regular(path, os.lstat(path).st_mode) from error
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise _not_regular(path, mode)
    return os.fdopen(handle, "rb")


def hash_all(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 (hex) of files by name; names are paths relative to `root`."""
    # hashlib releases the GIL, so threads read and hash several files at once.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(root / name), names), strict=True))


def _hash(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Sync a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
