"""A lock that one process on a filesystem holds, and that is released when the process ends.

It is `flock`. Some network filesystems lack it: there the lock is a file that only one process can create, and that
names its owner. A dead owner on the same host is recognized by its process number; one on another host is not.
"""

import errno
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sidestack.infra.logs import LOG

_HAS_NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)
_POLL_S = 0.2


class LockHeldError(Exception):
    """Another process holds a lock; the message describes the owner if it is known."""


@contextmanager
def locked(file: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock while the body runs.

    Args:
        file: the lock's file, in a folder that exists. wait: whether to wait for another process that holds it.

    Raises:
        LockHeldError: another process holds it, and `wait` is False. OSError: the file cannot be written.
    """
    with file.open("w", encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LockHeldError("") from None
        except OSError as error:
            if error.errno not in _HAS_NO_FLOCK:
                raise
            with _lock_by_owner_file(file.with_name(f"{file.name}.owner"), wait, error):
                yield
            return
        yield


@contextmanager
def _lock_by_owner_file(file: Path, wait: bool, why: OSError) -> Iterator[None]:
    """Hold a lock by a file that only one process can create; it is removed at the end."""
    LOG.warning(f"{file.parent}: has no flock ({why.strerror}); {file.name} is the lock")
    own = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    while not _created(file, own):
        owner = _read(file)
        if owner is None or _remove_if_stale(file, owner):
            continue
        host, process, *_ = [*owner.split(), "", ""]
        if not wait:
            raise LockHeldError(f"process {process} on {host} holds {file}; remove it if that process is gone")
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        if _read(file) == own:
            file.unlink(missing_ok=True)


def _created(file: Path, own: str) -> bool:
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as opened:
        opened.write(own)
    return True


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _remove_if_stale(file: Path, owner: str) -> bool:
    """Remove the lock of an owner whose process on this host has ended; return whether it was removed."""
    host, process, *_ = [*owner.split(), "", ""]
    if host != socket.gethostname() or not process.isdecimal() or _is_alive(int(process)):
        return False
    moved = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):  # another process was quicker
        file.rename(moved)
        if _read(moved) != owner:  # then this moved another process's new lock
            with suppress(FileExistsError):
                os.link(moved, file)
        moved.unlink()
    return True


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
