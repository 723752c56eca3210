"""The torchx schedulers that this stack launches jobs on.

They are registered as `torchx.schedulers` entry points, which replace torchx's own list, and used directly by
the pipeline's driver.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torchx.schedulers.api import Scheduler

from sidestack.infra.local_jobs import LocalJobs
from sidestack.infra.slurm import SlurmNodes


@runtime_checkable
class Reattachable(Protocol):
    """A scheduler whose jobs another driver can find and follow."""

    def find(self, token: str) -> str | None:
        """Return the job that was submitted with a lease's token; None: there is none."""

    def log_files(self, app_id: str, role: str, num_nodes: int, log_dir: Path) -> list[Path]:
        """Return the log files of a job's nodes."""

    def leave(self, app_id: str) -> None:
        """Let a job continue when this process ends."""


def slurm(session_name: str, **options: Any) -> Scheduler[Any]:
    """Make the Slurm scheduler; jobs inherit this process's environment."""
    _find_this_python()
    return SlurmNodes(session_name)


def local_cwd(session_name: str, **options: Any) -> Scheduler[Any]:
    """Make the scheduler that runs jobs on this machine, in the current directory.

    Options are ignored: torchx's runner makes an option of each variable that begins with TORCHX_, and a driver that
    is itself a torchx job has such variables.
    """
    _find_this_python()
    return LocalJobs(session_name)


def _find_this_python() -> None:
    """Let jobs find this process's `python`, even if its venv is not activated."""
    here = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "").split(os.pathsep)
    if path[0] != here:
        os.environ["PATH"] = os.pathsep.join([here, *path])


def _torchx(module: str) -> Callable[..., Scheduler[Any]]:
    def make(session_name: str, **options: Any) -> Scheduler[Any]:
        made: Scheduler[Any] = import_module(module).create_scheduler(session_name, **options)
        return made

    return make


FACTORIES: Mapping[str, Callable[..., Scheduler[Any]]] = {
    "local_cwd": local_cwd,
    "local_docker": _torchx("torchx.schedulers.docker_scheduler"),
    "slurm": slurm,
    "kubernetes": _torchx("sidestack.infra.clusters.kubernetes"),
    "aws_batch": _torchx("sidestack.infra.clusters.aws_batch"),
}
"""The schedulers by name, the default first."""


def option_names(scheduler: str) -> list[str]:
    """Return the names of a scheduler's options.

    torchx's local scheduler replaces the handlers of SIGINT and SIGTERM when it is made; they are restored.
    """
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    try:
        return list(FACTORIES[scheduler]("sidestack").run_opts()._opts)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
