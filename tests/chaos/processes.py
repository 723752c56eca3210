"""Find a run's processes on this machine by the run's folder in their arguments (Linux)."""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_POLL_SECONDS = 0.1


class Process(NamedTuple):
    """A process of a run: its id and its kind (``driver``, ``torchrun`` or ``rank``)."""

    pid: int
    kind: str


def processes_of(folder: Path) -> list[Process]:
    """Return the processes, other than this one, whose arguments name a folder or a file below it."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has ended meanwhile
            words = file.read_bytes().decode(errors="replace").split("\0")
            pid = int(file.parent.name)
            if pid != os.getpid() and any(str(folder) in word for word in words):
                found.append(Process(pid, _kind(words)))
    return found


def _kind(words: Sequence[str]) -> str:
    if "sidestack.pipelines.run" in words:
        return "driver"
    return "torchrun" if "torch.distributed.run" in words else "rank"


def kill(processes: Sequence[Process]) -> None:
    """Send SIGKILL to each process that is still running."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def wait_for_none(folder: Path, limit_s: float) -> float | None:
    """Wait until no process of a run is left.

    Returns:
        the duration in seconds, or None if processes are left after the limit.
    """
    began = time.monotonic()
    while processes_of(folder):
        if time.monotonic() - began > limit_s:
            return None
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - began
