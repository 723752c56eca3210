"""Following a job's log while it runs: rank 0's lines are shown, and lines not from ranks are kept."""

import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sidestack.infra.logs import LOG

_POLL_S = 0.2
_REMEMBERED = 200

# torchrun marks the ranks' lines (components/torchrun.py); unmarked lines are torchrun's, the shell's or Slurm's.
_RANK_LINE = re.compile(r"^\[rank(\d+)\]:")


def log_line(label: str, text: str) -> None:
    """Log one line under the name of a stage or of a driver's task."""
    LOG.info(f"[{label}] {text}")


class JobLog:
    """Follower of the logs of a job's nodes, a thread for each, as rank 0 may run on any node.

    Attributes:
        unmarked: the last lines that are not from a rank.
    """

    def __init__(self, label: str) -> None:
        """Store the label under which lines are shown."""
        self.unmarked: deque[str] = deque(maxlen=_REMEMBERED)
        self._label = label
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def follow_files(self, files: Sequence[Path], is_new: bool) -> None:
        """Follow files, which may appear later: from the beginning, or from the end if the job is not new."""
        for file in files:
            self._start(_lines(file, self._is_over, 0 if is_new or not file.exists() else file.stat().st_size))

    def follow(self, lines: Iterable[str]) -> None:
        """Follow a scheduler's log stream."""
        self._start(lines)

    def stop(self) -> None:
        """Show what was logged until now, then stop following."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def _start(self, lines: Iterable[str]) -> None:
        thread = threading.Thread(target=self._show, args=(lines,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _show(self, lines: Iterable[str]) -> None:
        try:
            for line in lines:
                self._take(line.rstrip())
        except Exception as error:
            # Some schedulers have no log, or not yet; that is not the job's failure.
            log_line(self._label, f"(the log cannot be followed: {error})")

    def _take(self, line: str) -> None:
        mark = _RANK_LINE.match(line)
        text = line[mark.end() :] if mark else line
        if not text.strip():
            return
        if mark is None:
            self.unmarked.append(text)
        elif int(mark[1]) == 0:
            log_line(self._label, text)


def _lines(file: Path, is_over: threading.Event, position: int) -> Iterator[str]:
    """Yield a file's lines from a position on as they are written, until the job is over.

    The file is opened anew each time, so that it may appear late, be replaced or be truncated.
    """
    rest = b""
    while True:
        was_over = is_over.is_set()  # checked before reading, so that all lines written until then are read
        if file.exists():
            position = min(position, file.stat().st_size)
            with file.open("rb") as opened:
                opened.seek(position)
                *whole, rest = (rest + opened.read()).split(b"\n")
                position = opened.tell()
            yield from (line.decode(errors="replace") for line in whole)
        if was_over:
            yield from [rest.decode(errors="replace")] if rest else []
            return
        is_over.wait(_POLL_S)
