"""A stage's record of itself: kept in its own output, mirrored to MLflow under a parent run.

The files are the source of truth and MLflow is a view of them: a slow or unreachable tracking server causes a
warning, never a failed training. A stage that is skipped because it is already committed, or whose rows did not all
reach the store, is shown by replaying the same files (`infra.mlflow_runs.replay`).
The files' names are in `infra.record`.
"""

import json
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from sidestack.infra.logs import LOG
from sidestack.infra.masking import one_line
from sidestack.infra.mlflow_runs import ChildRun, HistoryRow
from sidestack.infra.mlflow_store import connect
from sidestack.infra.record import HISTORY_FILE, SUMMARY_FILE, numbers_of

_FLUSH_SECONDS = 5.0
_FINISH_SECONDS = 30.0
_PAUSE_SECONDS = 60.0


class RunLog:
    """The record of one stage's run; every method is a no-op on ranks other than 0."""

    def __init__(self, out: Path | None, mirror: "Mirror | None" = None) -> None:
        """Hold the directory to write to (None: log and write nothing); normally called by `open`."""
        self._out = out
        self._mirror = mirror
        self._history: IO[str] | None = None
        self._finished = False

    @classmethod
    def open(
        cls,
        world_rank: int,
        stage: str,
        out: Path,
        config: Mapping[str, Any],
        inputs: Mapping[str, Path],
        key: str,
        parent_run: str | None,
    ) -> "RunLog":
        """Start the record of one stage in `out`, which must exist, and its MLflow child run.

        Args:
            world_rank: this process's global rank; only rank 0 writes.
            stage: the stage's name, e.g. `ranker`.
            out: the directory that is being written and will be committed.
            config: the resolved section; `config["arm"]`, if there is one, becomes a tag.
            inputs: committed input directories by name, logged as MLflow datasets.
            key: the stage's key (see `pipelines.graph`), empty for a run by hand.
            parent_run: MLflow run id of the pipeline's run; None keeps the record in files only.
        """
        if world_rank != 0:
            return cls(None)
        if parent_run is None:
            return cls(out)

        def start() -> ChildRun:
            return ChildRun.start(connect(), parent_run, stage, config, inputs, key, out)

        return cls(out, Mirror(start))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to `history.jsonl`; a non-finite value is written as null."""
        if self._out is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self._append(json.dumps({"step": step, **_finite(numbers)}) + "\n")
        if self._mirror is not None:
            self._mirror.put((time.time(), step, numbers))

    def note(self, step: int, texts: Mapping[str, str]) -> None:
        """Append one line of texts to `history.jsonl`, such as a digest; MLflow gets none, as it only takes numbers."""
        if self._out is not None:
            self._append(json.dumps({"step": step, **texts}) + "\n")

    def history(self) -> str:
        """Return the content of `history.jsonl` so far, for a checkpoint; empty on ranks other than 0."""
        file = None if self._out is None else self._out / HISTORY_FILE
        return file.read_text(encoding="utf-8") if file is not None and file.exists() else ""

    def resume(self, history: str) -> None:
        """Start with the history of a checkpoint, in the file and in MLflow."""
        if self._out is None or not history:
            return
        self._append(history)
        if self._mirror is not None:
            now = time.time()
            for line in history.splitlines():
                self._mirror.put((now, *numbers_of(line)))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json` (nested JSON allowed; non-finite numbers become null)."""
        if self._out is None:
            return
        text = json.dumps(_finite(dict(values)), indent=2) + "\n"
        self._out.joinpath(SUMMARY_FILE).write_text(text, encoding="utf-8")

    def info(self, text: str) -> None:
        """Log one short line."""
        if self._out is not None:
            LOG.info(text)

    def warn(self, text: str) -> None:
        """Log one short line as a warning."""
        if self._out is not None:
            LOG.warning(text)

    def progress(self, total: int, what: str) -> AbstractContextManager[Callable[[int], None]]:
        """Show the progress to `total`: a bar on a terminal, otherwise a line at each quarter.

        Returns:
            a context manager with the value `advance(n)`. `n` may count the work of all ranks; as the last ranks may
            have less work than rank 0, progress beyond the total is not shown.
        """
        if self._out is None:
            return _silent()
        return _bar(total, what) if sys.stderr.isatty() else _lines(total, what)

    def _append(self, lines: str) -> None:
        assert self._out is not None
        if self._history is None:
            self._history = self._out.joinpath(HISTORY_FILE).open("a", encoding="utf-8")
        self._history.write(lines)
        self._history.flush()  # the commit hashes the file while this handle is still open

    def finish(self, status: str, committed: Path | None = None) -> None:
        """Close the record; later calls do nothing.

        Args:
            status: MLflow's status: `FINISHED`, `FAILED` or `KILLED`.
            committed: the output's new directory, if the commit moved it; its manifest, config and
                summary become the child run's artifacts.
        """
        if self._out is None or self._finished:
            return
        self._finished = True
        if self._history is not None:
            self._history.close()
        if self._mirror is not None:
            self._mirror.finish(status, committed or self._out)


class Mirror:
    """A mirror of history rows to an MLflow child run, sent by a thread of its own, in batches.

    Importing mlflow and requests to its store take seconds; the thread keeps them out of the training
    loop. After a failure, which is logged once, the rows are kept and sent later. Rows that the store has
    not accepted by the end are in the files; the driver sends them from there (`infra.journal`).
    """

    def __init__(self, start: Callable[[], ChildRun]) -> None:
        """Start mirroring; `start` opens the child run and is called in the thread."""
        self._start = start
        self._rows: queue.SimpleQueue[HistoryRow | None] = queue.SimpleQueue()
        self._closing: tuple[str, Path] = ("KILLED", Path())
        self._has_warned = False
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def put(self, row: HistoryRow) -> None:
        """Queue one history row; never blocks."""
        self._rows.put(row)

    def finish(self, status: str, out: Path) -> None:
        """Send queued rows, attach `out`'s record, end the run with `status`, and wait at most half a minute."""
        self._closing = (status, out)
        self._rows.put(None)
        self._thread.join(_FINISH_SECONDS)
        if self._thread.is_alive():
            self._warn(f"no answer within {_FINISH_SECONDS:.0f} s")

    def _run(self) -> None:
        child: ChildRun | None = None
        unsent: list[HistoryRow] = []
        pause_ends, is_open = 0.0, True
        while is_open:
            rows, is_open = self._collect()
            unsent += rows
            if is_open and time.monotonic() < pause_ends:
                continue
            try:
                child = child or self._start()
                child.log_history(unsent)
                unsent.clear()
                if not is_open:
                    child.finish(*self._closing)
            except Exception as error:
                self._warn(one_line(error))
                pause_ends = time.monotonic() + _PAUSE_SECONDS

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            LOG.warning(f"tracking: MLflow is not recording this run ({why})")

    def _collect(self) -> "tuple[list[HistoryRow], bool]":
        """Return the rows queued within the next `_FLUSH_SECONDS`, and whether more may follow."""
        rows: list[HistoryRow] = []
        deadline = time.monotonic() + _FLUSH_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                row = self._rows.get(timeout=left)
            except queue.Empty:
                break
            if row is None:
                return rows, False
            rows.append(row)
        return rows, True


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent (NaN, infinities) by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def _silent() -> Iterator[Callable[[int], None]]:
    yield lambda n: None


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def _lines(total: int, what: str) -> Iterator[Callable[[int], None]]:
    started = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        quarter_before = done * 4 // max(total, 1)
        done = min(done + n, total)
        if done * 4 // max(total, 1) > quarter_before:
            seconds = time.monotonic() - started
            LOG.info(f"{what}: {done:,} of {total:,} ({seconds:.0f} s)")

    yield advance
