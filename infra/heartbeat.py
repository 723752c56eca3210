"""Heartbeats of a running stage's ranks, as small files beside its output.

They are stored in `<out>.heartbeats/`, one file per rank, rewritten in place every few seconds, and removed when the
stage ends. The age of a heartbeat is computed from the file system's times, so that hosts' clocks need not agree.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from sidestack.infra.config import Config
from sidestack.infra.rank_state import RankState

_FILE_BYTES = 1024
_CPU_SHARE = 0.02
_IO_BYTES = 1 << 18


class Beat(Config):
    """The content of a rank's heartbeat.

    Attributes:
        doing: the current work of its main thread. since_s: the seconds since that began.
        is_waiting: whether it waits for other ranks in a collective.
        is_committing: whether that may take as long as a commit.
        has_signal: whether it was asked to stop.
        idle_s: the seconds for which its process has made no progress (`ProgressMeter`).
    """

    doing: str
    since_s: float
    is_waiting: bool
    is_committing: bool
    has_signal: bool
    idle_s: float


class PeerBeat(NamedTuple):
    """Another rank's last heartbeat, and by how many seconds it is older than this rank's."""

    rank: int
    beat: Beat
    silent_s: float


class ProgressMeter:
    """The progress of this process: whether it took steps, used a processor, or read or wrote files.

    Real work of any length shows in one of them; waiting for a disk that does not answer shows in none.
    """

    def __init__(self) -> None:
        self._at = self._moved = time.monotonic()
        self._counters = _read_counters(0)

    def idle_s(self, changes: int) -> float:
        """Return the seconds since the last progress.

        Args:
            changes: `RankState.changes`.
        """
        now, done = time.monotonic(), _read_counters(changes)
        has_moved = (
            done.changes != self._counters.changes
            or done.cpu_s - self._counters.cpu_s >= _CPU_SHARE * (now - self._at)
            or done.io_bytes - self._counters.io_bytes >= _IO_BYTES
        )
        if has_moved:
            self._moved = now
        self._at, self._counters = now, done
        return now - self._moved


class _Counters(NamedTuple):
    changes: int
    cpu_s: float
    io_bytes: int


def _read_counters(changes: int) -> _Counters:
    return _Counters(changes, time.process_time(), _io_bytes())


def _io_bytes() -> int:
    """Return the bytes that this process has read and written; 0 where the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
    except OSError:
        return 0


class Heartbeats:
    """The heartbeats of all ranks of one stage.

    Args of the constructor:
        out: the stage's output; they are stored beside it. rank: this rank. size: the number of ranks.
    """

    def __init__(self, out: Path, rank: int, size: int) -> None:
        self.folder = out.with_name(f"{out.name}.heartbeats")
        self.rank = rank
        self.size = size
        self._work = ProgressMeter()

    def beat(self, state: RankState) -> Beat:
        """Write this rank's heartbeat, and return it; this works on a full disk, too."""
        beat = Beat(
            doing=state.doing[:200],
            since_s=time.monotonic() - state.since,
            is_waiting=state.is_waiting,
            is_committing=state.is_committing,
            has_signal=state.signal is not None,
            idle_s=self._work.idle_s(state.changes),
        )
        with contextlib.suppress(OSError):
            if self.size == 1:  # no other rank reads it
                return beat
            self.folder.mkdir(parents=True, exist_ok=True)
            _rewrite(self._file(self.rank), beat.model_dump_json().encode())
        return beat

    def others(self) -> Iterator[PeerBeat]:
        """Yield the last heartbeats of the other ranks, except those that have not started or have ended."""
        try:
            own_time = self._file(self.rank).stat().st_mtime
        except OSError:
            return
        for rank in range(self.size):
            if rank != self.rank and (heard := self._read_peer(rank, own_time)) is not None:
                yield heard

    def remove(self) -> None:
        """Remove this rank's heartbeat; rank 0 removes all."""
        self._file(self.rank).unlink(missing_ok=True)
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _read_peer(self, rank: int, own_time: float) -> PeerBeat | None:
        file = self._file(rank)
        try:
            beat = Beat.model_validate_json(file.read_bytes())
            return PeerBeat(rank, beat, max(own_time - file.stat().st_mtime, 0.0))
        except (OSError, ValidationError):  # or it is being written
            return None


def _rewrite(file: Path, text: bytes) -> None:
    """Write a line in place, always of the same length: no new file is needed, so it works on a full disk."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(handle, text.ljust(_FILE_BYTES), 0)
        os.utime(handle)
    finally:
        os.close(handle)
