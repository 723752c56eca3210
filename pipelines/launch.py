"""A stage's job on a scheduler: launch it, show its log, and tell how it ended."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torchx.runner import Runner
from torchx.schedulers.api import Stream
from torchx.specs import AppDef, AppState, CfgVal, InvalidRunConfigException

from infra import errors
from infra.errors import ConfigError, StageError
from infra.schedulers import FACTORIES

_LAST_LINES = 15

# torchrun marks the ranks' own lines; what has no mark is torchrun's or the shell's.
_RANK_LINE = re.compile(r"^\[\w*?\d+\]:")

# torchrun's word for a rank that a signal ended, such as the kernel's when memory runs out.
_KILLED = re.compile(r"Signal \d+ \(SIG\w+\) received")

# Where the two streams are told apart, people's lines are on stderr (`RunLog.say`).
_SPLIT_STREAMS = ("local_cwd", "slurm")


@dataclass(frozen=True)
class Job:
    """A job under way.

    Attributes:
        handle: its name at the scheduler. label: what people call it.
        rank_logs: where torchrun keeps every rank's log.
        deadline: of `time.monotonic`, after which it is cancelled. limit_s: the seconds that were left until then.
        unmarked: what its log has from others than the ranks. tail: the thread that follows the log.
    """

    handle: str
    label: str
    rank_logs: Path
    deadline: float
    limit_s: float
    unmarked: list[str]
    tail: threading.Thread


class Launcher:
    """Starts jobs on one scheduler, and tells what becomes of them."""

    def __init__(self, scheduler: str, options: Mapping[str, CfgVal], log_dir: Path) -> None:
        """Check the scheduler's options before anything runs.

        Args:
            scheduler: a name of `infra.schedulers.FACTORIES`.
            options: that scheduler's own.
            log_dir: where a scheduler of this machine keeps logs.

        Raises:
            ConfigError: the scheduler refuses an option, or lacks one it needs.
        """
        self._runner = Runner("sidestack", dict(FACTORIES))
        self._scheduler = scheduler
        try:
            known = self._runner.scheduler_run_opts(scheduler)
            # Without a log_dir of ours, torchx 0.7.0 deletes the one of an earlier job.
            extra = {"log_dir": str(log_dir)} if known.get("log_dir") is not None else {}
            self._options = {**extra, **options}
            known.resolve(self._options)
        except (InvalidRunConfigException, ValueError, ImportError) as error:
            raise ConfigError(f"run.scheduler {scheduler!r}: {error}") from error

    def start(self, label: str, app: AppDef, rank_logs: Path, limit_s: float) -> Job:
        """Launch a job; rank 0's lines are shown as they come, marked with `label`.

        Args:
            label: what people call the job.
            app: the job.
            rank_logs: where torchrun keeps every rank's log.
            limit_s: seconds after which it is cancelled.
        """
        handle = self._runner.run(app, self._scheduler, self._options)
        unmarked: list[str] = []
        tail = threading.Thread(target=self._show, args=(handle, label, app, unmarked), daemon=True)
        tail.start()
        return Job(handle, label, rank_logs, time.monotonic() + limit_s, limit_s, unmarked, tail)

    def has_succeeded(self, job: Job) -> bool:
        """Return whether a job has come to its good end; False: it is under way.

        Raises:
            StageError: the job failed, with the failing rank's traceback, or took too long.
        """
        status = self._runner.status(job.handle)
        if status is None:
            raise StageError(f"[{job.label}] {job.handle}: the scheduler no longer knows the job")
        if not status.is_terminal():
            if time.monotonic() > job.deadline:
                raise StageError(f"[{job.label}] was cancelled after {job.limit_s / 60:g} minutes")
            return False
        job.tail.join(timeout=10)
        if status.state != AppState.SUCCEEDED:
            raise StageError(_why(job.label, AppState(status.state), job.rank_logs, job.unmarked))
        return True

    def cancel(self, job: Job) -> None:
        """End a job; one that has ended already stays as it is."""
        self._runner.cancel(job.handle)

    def close(self) -> None:
        """End what is still running on this machine."""
        self._runner.close()

    def _show(self, handle: str, label: str, app: AppDef, unmarked: list[str]) -> None:
        streams = Stream.STDERR if self._scheduler in _SPLIT_STREAMS else None
        try:
            lines = self._runner.log_lines(handle, app.roles[0].name, k=0, should_tail=True, streams=streams)
            for line in lines:
                text, marks = _RANK_LINE.subn("", line.rstrip())
                if not text.strip():
                    continue
                if marks:
                    say(label, text)
                else:
                    unmarked.append(text)
        except Exception as error:
            # Some schedulers cannot give a log, or not yet; the job itself is well.
            say(label, f"(the log cannot be followed: {error})")


def say(label: str, text: str) -> None:
    """Print one line of a stage, on stderr: stdout has the run's result alone."""
    print(f"[{label}] {text}", file=sys.stderr, flush=True)


def _why(label: str, state: AppState, rank_logs: Path, unmarked: list[str]) -> str:
    """Tell people why a job failed: the rank that failed first, or else the last lines of all."""
    failures = sorted(_failures(rank_logs))
    is_echo, _, rank, text = failures[0] if failures else (True, 0, "", "")
    if not is_echo:
        reason = f"{rank}: {text}"
    else:  # echoes alone: the rank they echo was killed without a word, and only torchrun saw it
        killed = [line.strip() for line in unmarked if _KILLED.search(line)]
        last = [*_last_lines(rank_logs), *unmarked[-_LAST_LINES:]]
        reason = "\n".join(["no rank left a traceback of its own", *killed, "the last lines:", *last])
    return f"[{label}] {state.name.lower()}: {reason}\nlogs of all ranks: {rank_logs}"


def _failures(rank_logs: Path) -> Iterator[tuple[bool, int, str, str]]:
    """Return of each error file: is it an echo of another rank's failure, Unix time, rank, text."""
    for file in _newest(rank_logs, "error.json"):
        report = json.loads(file.read_text(encoding="utf-8"))["message"]
        if isinstance(report, str):
            report = {"message": report, "extraInfo": {}}
        message, extra = report["message"], report["extraInfo"]
        name = message.partition(":")[0]
        is_users = hasattr(errors, name)
        text = message if is_users else extra.get("py_callstack", message)
        yield _is_echo(message, rank_logs), int(extra.get("timestamp", 0)), _rank(file, rank_logs), text.strip()


def _is_echo(message: str, rank_logs: Path) -> bool:
    """Whether a rank failed because another had: timestamps, in whole seconds, often cannot tell.

    It was told so, lost the connection, or missed the temporary directory, which rank 0 removes after a failure.
    """
    staging = f"/.{rank_logs.name.removesuffix('.logs')}."
    lost = ("Connection closed by peer", "Connection reset by peer")
    is_missing = message.startswith("FileNotFoundError:") and staging in message
    return message.startswith("StageError:") or is_missing or any(words in message for words in lost)


def _last_lines(rank_logs: Path) -> Iterator[str]:
    for file in _newest(rank_logs, "stderr.log"):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]:
            yield f"{_rank(file, rank_logs)}: {line}"


def _newest(rank_logs: Path, name: str) -> Iterator[Path]:
    """Return the ranks' files of a name, of every node's last attempt.

    torchrun keeps them in `{a node's directory}/attempt_{n}/{local rank}/`.
    """
    for node in sorted(rank_logs.glob("*/")):
        attempts = sorted(node.glob("attempt_*"), key=lambda path: path.stat().st_mtime)
        yield from sorted(attempts[-1].glob(f"*/{name}")) if attempts else []


def _rank(file: Path, rank_logs: Path) -> str:
    """Name the rank a file is of; with more than one node, torchrun tells only the local rank."""
    local = file.parent.name
    nodes = list(rank_logs.glob("*/"))
    return f"rank {local}" if len(nodes) == 1 else f"local rank {local} in {file.parents[2].name}"
