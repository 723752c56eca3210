"""One stage's job on a scheduler: launch it, show its log, wait, and tell why it failed."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from torchx.runner import Runner
from torchx.schedulers.api import Stream
from torchx.specs import AppDef, AppState, CfgVal, InvalidRunConfigException

from infra import errors
from infra.errors import ConfigError, StageError
from infra.schedulers import FACTORIES

_POLL_SECONDS = 0.3
_LAST_LINES = 15

# torchrun marks the ranks' own lines; what has no mark is torchrun's or the shell's.
_RANK_LINE = re.compile(r"^\[\w*?\d+\]:")

# torchrun's word for a rank that a signal ended, such as the kernel's when memory runs out.
_KILLED = re.compile(r"Signal \d+ \(SIG\w+\) received")

# Where the two streams are told apart, people's lines are on stderr (`RunLog.say`).
_SPLIT_STREAMS = ("local_cwd", "slurm")


class Launcher:
    """Runs jobs on one scheduler, one after another."""

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

    def run(self, label: str, app: AppDef, rank_logs: Path, timeout_s: float) -> None:
        """Launch a job and wait until it has succeeded.

        Rank 0's lines are shown as they come, marked with `label`. Whatever ends the waiting early,
        Ctrl-C included, cancels the job.

        Args:
            label: what people call the job.
            app: the job.
            rank_logs: where torchrun keeps every rank's log.
            timeout_s: seconds after which the job is cancelled.

        Raises:
            StageError: the job failed, with the failing rank's traceback, or took too long.
        """
        handle = self._runner.run(app, self._scheduler, self._options)
        unmarked: list[str] = []
        tail = threading.Thread(target=self._show, args=(handle, label, app, unmarked), daemon=True)
        tail.start()
        try:
            state = self._wait(handle, label, timeout_s)
        except BaseException:
            self._runner.cancel(handle)
            raise
        tail.join(timeout=10)
        if state != AppState.SUCCEEDED:
            raise StageError(_why(label, state, rank_logs, unmarked))

    def close(self) -> None:
        """End what is still running."""
        self._runner.close()

    def _wait(self, handle: str, label: str, timeout_s: float) -> AppState:
        deadline = time.monotonic() + timeout_s
        while True:
            status = self._runner.status(handle)
            if status is None:
                raise StageError(f"[{label}] {handle}: the scheduler no longer knows the job")
            if status.is_terminal():
                return AppState(status.state)
            if time.monotonic() > deadline:
                raise StageError(f"[{label}] was cancelled after {timeout_s / 60:g} minutes")
            time.sleep(_POLL_SECONDS)

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
    """Give of each error file: is it an echo of another rank's failure, Unix time, rank, text."""
    for file in _newest(rank_logs, "error.json"):
        report = json.loads(file.read_text())["message"]
        if isinstance(report, str):
            report = {"message": report, "extraInfo": {}}
        message, extra = report["message"], report["extraInfo"]
        name = message.partition(":")[0]
        is_users = hasattr(errors, name)
        text = message if is_users else extra.get("py_callstack", message)
        yield _is_echo(message, rank_logs), int(extra.get("timestamp", 0)), _rank(file, rank_logs), text.strip()


def _is_echo(message: str, rank_logs: Path) -> bool:
    """Whether a rank failed because another had: timestamps, in whole seconds, often cannot tell.

    It was told so, lost the connection, or missed the temporary directory, which a failing rank takes away.
    """
    staging = f"/.{rank_logs.name.removesuffix('.logs')}."
    lost = ("Connection closed by peer", "Connection reset by peer")
    is_missing = message.startswith("FileNotFoundError:") and staging in message
    return message.startswith("StageError:") or is_missing or any(words in message for words in lost)


def _last_lines(rank_logs: Path) -> Iterator[str]:
    for file in _newest(rank_logs, "stderr.log"):
        for line in file.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
            yield f"{_rank(file, rank_logs)}: {line}"


def _newest(rank_logs: Path, name: str) -> Iterator[Path]:
    """Give the ranks' files of a name, of every node's last attempt.

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
