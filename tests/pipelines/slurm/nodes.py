"""Calls to Slurm's programs, and the failure of a node, for the tests on a real cluster."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.pipelines.driver import wait_until


def call(*command: str) -> str:
    """Return what a program of Slurm prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def state_of(job: str) -> str:
    """Return a job's state, such as RUNNING."""
    return call("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip()


def start_now(job: str) -> None:
    """Start a requeued job without the two minutes that Slurm makes it wait."""
    wait_until(lambda: state_of(job) == "PENDING", f"job {job} is queued again")
    call("scontrol", "update", f"jobid={job}", "StartTime=now")


def kill_node(node: str) -> list[str]:
    """Kill slurmd and all tasks of a node; return the command that starts slurmd again."""
    daemon = next(pid for pid, words in _commands() if words[0].endswith("slurmd") and words[-1] == node)
    tasks = [pid for pid, _ in _commands() if f"SLURMD_NODENAME={node}" in _read(pid, "environ")]
    parents = {int(_read(pid, "stat")[0].rpartition(")")[2].split()[1]) for pid in tasks} - {1}
    command = _read(daemon, "cmdline")
    for pid in [daemon, *parents, *tasks]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return command


def _commands() -> list[tuple[int, list[str]]]:
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [(pid, words) for pid in pids if (words := _read(pid, "cmdline"))]


def _read(pid: int, file: str) -> list[str]:
    """Return the words of a file about a process, or no words if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace").strip("\0").split("\0")
    except OSError:
        return []
