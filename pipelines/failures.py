"""Failure causes, from the logs and files of a job's ranks, torchrun and the scheduler."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sidestack.infra import errors
from sidestack.infra.preemption import Mark
from sidestack.infra.rendezvous import PREFIX as RENDEZVOUS

_LAST_LINES = 15

# torchrun's message for a rank that a signal ended, such as the kernel's when memory runs out.
_KILLED = re.compile(r"Signal \d+ \(SIG\w+\) received")

_NOT_MET = {
    "RendezvousTimeoutError": "the job's nodes did not meet in time (run.rendezvous_s): a node did not start, or was"
    " ended",
    "RendezvousConnectionError": "a node could not reach the job's first node within run.rendezvous_s",
}
"""Explanations of errors in torchrun's own log lines."""

_ENDS: Mapping[str, str] = {
    "CANCELLED": "was cancelled by somebody at the scheduler: state CANCELLED",
    "TIMEOUT": "reached the scheduler's time limit (run.scheduler_options.time): state TIMEOUT",
    "DEADLINE": "reached the scheduler's deadline: state DEADLINE",
    "NODE_FAIL": "lost a node: state NODE_FAIL",
    "BOOT_FAIL": "lost a node: state BOOT_FAIL",
    "OUT_OF_MEMORY": "needed more memory than run.launch.*.memory_mb: state OUT_OF_MEMORY",
    "PREEMPTED": "was preempted by another job: state PREEMPTED",
    "REVOKED": "was revoked at the scheduler: state REVOKED",
}
"""How a job ended, by Slurm's state, or by torchx's for other schedulers."""


class Failure(NamedTuple):
    """Content of a rank's error file; sorts by likelihood of being the cause.

    Attributes:
        is_echo: the rank failed because another had failed. at: Unix time, whole seconds. written: the file's time, in
            ns.
        rank: the rank's name. text: its message.
    """

    is_echo: bool
    at: int
    written: int
    rank: str
    text: str


def failure_message(
    label: str, state: str, reported: str, rank_logs: Path, unmarked: Sequence[str], preempted: Mark | None = None
) -> str:
    """Return the error message for a failed job: how it ended, and the first rank failure or the last log lines.

    Args:
        label: of the stage. state: torchx's final state of the job, such as FAILED.
        reported: further reports of the scheduler, such as Slurm's states. rank_logs: torchrun's folder.
        unmarked: lines of the job's log that are not from a rank.
        preempted: the mark of a stage that stopped on request; None if it did not.
    """
    words = [word for word in (*reported.split(", "), state) if word in _ENDS]
    if preempted is not None:  # stopped by a signal: the scheduler has the reason
        return f"[{label}] {_ENDS[words[0]]}; {preempted}" if words else f"[{label}] {preempted}"
    end = _ENDS[words[0]] if words else state.lower()
    failures = sorted(_failures(rank_logs))
    own = [failure for failure in failures if not failure.is_echo]
    if own:
        reason = f"{own[0].rank}: {own[0].text}"
    else:  # the rank that failed first left no error file; torchrun, the shell or the scheduler may have the cause
        reason = "\n".join(_log_evidence("" if words or reported == state else reported, failures, rank_logs, unmarked))
    return f"[{label}] {end}: {reason}\nlogs of all ranks: {rank_logs}"


def _log_evidence(
    reported: str, failures: Sequence[Failure], rank_logs: Path, unmarked: Sequence[str]
) -> Iterator[str]:
    lines = [line.strip() for line in unmarked]
    if faults := list(dict.fromkeys(line for line in lines if line.startswith(RENDEZVOUS))):
        yield from faults
        return
    yield "no rank left a traceback of its own" + (f"; {reported}" if reported and reported != "<NONE>" else "")
    yield from (reason for name, reason in _NOT_MET.items() if any(name in line for line in lines))
    yield from (line for line in lines if _KILLED.search(line))
    yield from (f"{failure.rank}: {failure.text}" for failure in failures if failure.text.startswith("its error file"))
    last = [*_last_lines(rank_logs), *unmarked[-_LAST_LINES:]]
    yield from ["the last lines:", *last] if last else ["and nothing was logged"]


def _failures(rank_logs: Path) -> Iterator[Failure]:
    for file in _newest(rank_logs, "error.json"):
        rank, written = _rank(file, rank_logs), file.stat().st_mtime_ns
        try:
            report = json.loads(file.read_text(encoding="utf-8"))["message"]
            message, extra = _report_parts(report)
        except (OSError, ValueError, KeyError, TypeError) as error:
            # A full disk leaves an empty file.
            text = f"its error file cannot be read ({type(error).__name__}); is the disk full?"
            yield Failure(True, 0, written, rank, text)
            continue
        is_users = hasattr(errors, message.partition(":")[0])
        text = message if is_users else str(extra.get("py_callstack", message))
        yield Failure(_is_echo(message, rank_logs), int(extra.get("timestamp", 0)), written, rank, text.strip())


def _report_parts(report: Any) -> tuple[str, Mapping[str, Any]]:
    """Return an error report's message and its other fields."""
    return (report, {}) if isinstance(report, str) else (str(report["message"]), report["extraInfo"])


def _is_echo(message: str, rank_logs: Path) -> bool:
    """Return whether a rank failed because another had; timestamps, in whole seconds, often do not show it.

    Such a rank reports the other's failure, was stopped by torchrun, lost its connection, or missed a temporary
    directory of the output or of a checkpoint, which rank 0 removes after a failure.
    """
    name = re.escape(rank_logs.name.removesuffix(".logs"))
    lost = ("Connection closed by peer", "Connection reset by peer")
    is_missing = message.startswith("FileNotFoundError:") and re.search(
        rf"/(\.{name}\.|{name}\.checkpoint/\.)[^/]*\.tmp\b", message
    )
    return (
        message.startswith(("StageError:", "PreemptedError:"))
        or bool(is_missing)
        or any(words in message for words in lost)
    )


def _last_lines(rank_logs: Path) -> Iterator[str]:
    for file in _newest(rank_logs, "stderr.log"):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]:
            yield f"{_rank(file, rank_logs)}: {line}"


def _newest(rank_logs: Path, name: str) -> Iterator[Path]:
    """Return the ranks' files with a given name from every node's last attempt.

    torchrun keeps them in `{a node's directory}/attempt_{n}/{local rank}/`.
    """
    for node in sorted(rank_logs.glob("*/")):
        attempts = sorted(node.glob("attempt_*"), key=lambda path: path.stat().st_mtime)
        yield from sorted(attempts[-1].glob(f"*/{name}")) if attempts else []


def _rank(file: Path, rank_logs: Path) -> str:
    """Return the name of a file's rank; with more than one node, torchrun records only the local rank."""
    local = file.parent.name
    nodes = list(rank_logs.glob("*/"))
    return f"rank {local}" if len(nodes) == 1 else f"local rank {local} in {file.parents[2].name}"
