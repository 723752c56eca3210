"""The torchx schedulers this stack launches on, with what torchx 0.7.0 leaves to mend.

Registered as `torchx.schedulers` entry points, which replace torchx's own list, and used directly by
the pipeline's driver.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, Scheduler
from torchx.schedulers.slurm_scheduler import (
    SLURM_STATES,
    SlurmBatchRequest,
    SlurmOpts,
    SlurmScheduler,
)
from torchx.specs import AppDef, AppState, ReplicaStatus, Role, RoleStatus, runopts

from infra.clusters.config import cluster_of, with_options

_ASK_SECONDS = 2.0

_OPTIONS = {
    "account": "the account that the job is charged to",
    "qos": "the quality of service",
    "reservation": "the reservation to take nodes from",
    "nodelist": "nodes that the job must have",
    "exclude": "nodes that the job must not have",
    "signal": "what the ranks are sent before the time limit, such as TERM@120: two minutes to checkpoint",
}
"""Options of `sbatch` that torchx does not know."""

# While its processes end, a job is COMPLETING; torchx has no word for that.
_STATES = {**SLURM_STATES, "COMPLETING": AppState.RUNNING, "CONFIGURING": AppState.PENDING}

# The worst part of a job says how the job is.
_WORST_FIRST = (
    AppState.FAILED,
    AppState.CANCELLED,
    AppState.UNKNOWN,
    AppState.RUNNING,
    AppState.PENDING,
    AppState.SUCCEEDED,
)


class SlurmNodes(SlurmScheduler):  # type: ignore[misc]  # torchx is not typed
    """Slurm, asking for GPUs by node and needing no accounting database.

    torchx 0.7.0 asks for `--gpus-per-task`, which newer Slurm refuses without a task count, and for
    `sacct`, which fails on the many clusters that keep no accounts.
    """

    def _run_opts(self) -> runopts:
        options = super()._run_opts()
        for name, text in _OPTIONS.items():
            options.add(name, type_=str, default=None, help=text)
        return options

    def _submit_dryrun(self, app: AppDef, cfg: SlurmOpts) -> AppDryRunInfo[SlurmBatchRequest]:
        cfg = with_options(cluster_of(app.roles[0].metadata, "slurm"), cfg)
        info = super()._submit_dryrun(app, cfg)
        for replica in info.request.replicas.values():
            replica.sbatch_opts.pop("ntasks", None)
            gpus = replica.sbatch_opts.pop("gpus-per-task", None)
            if gpus is not None:
                replica.sbatch_opts["gpus-per-node"] = gpus
            replica.sbatch_opts.update({name: str(cfg[name]) for name in _OPTIONS if cfg.get(name) is not None})
        return info

    def __init__(self, session_name: str) -> None:
        super().__init__(session_name)
        self._told: dict[str, tuple[float, DescribeAppResponse | None]] = {}

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return the job's state from the queue, or from the accounts once the queue forgot it.

        The answer is kept for some seconds: torchx asks ten times a second while it follows a log.
        """
        asked, answer = self._told.get(app_id, (float("-inf"), None))
        if time.monotonic() - asked > _ASK_SECONDS:
            parts = _queued(app_id) or _accounted(app_id)
            answer = _response(app_id, parts) if parts else None
            self._told[app_id] = time.monotonic(), answer
        return answer


def _queued(job_id: str) -> list[tuple[str, str]]:
    """Return (job name, state) of a job's parts, as `squeue` knows them for some minutes after."""
    columns = ["--format=%j|%T", "--states=all", "--noheader"]
    return _rows(["squeue", f"--jobs={job_id}", *columns])


def _accounted(job_id: str) -> list[tuple[str, str]]:
    columns = ["--format=JobName,State", "--parsable2", "--noheader", "--allocations"]
    return _rows(["sacct", f"--jobs={job_id}", *columns])


def _rows(command: list[str]) -> list[tuple[str, str]]:
    try:
        ended = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return []
    if ended.returncode != 0:
        return []
    pairs = (line.rpartition("|") for line in ended.stdout.splitlines())
    # "CANCELLED by 1000" names the user; only the first word is the state.
    return [(name, state.split()[0]) for name, _, state in pairs if name and state.strip()]


def _response(job_id: str, parts: list[tuple[str, str]]) -> DescribeAppResponse:
    replicas: dict[str, list[ReplicaStatus]] = {}
    states = []
    for job_name, word in parts:
        state = _STATES.get(word, AppState.UNKNOWN)
        states.append(state)
        role, _, number = job_name.rpartition("-")
        if role and number.isdecimal():
            status = ReplicaStatus(id=int(number), role=role, state=state, hostname="")
            replicas.setdefault(role, []).append(status)
    return DescribeAppResponse(
        app_id=job_id,
        roles=[Role(name, image="", num_replicas=len(found)) for name, found in replicas.items()],
        roles_statuses=[RoleStatus(name, found) for name, found in replicas.items()],
        state=next(state for state in _WORST_FIRST if state in states),
        msg=", ".join(sorted({word for _, word in parts})),
    )


def slurm(session_name: str, **options: Any) -> Scheduler[Any]:
    """Make the Slurm scheduler; jobs inherit this process's environment."""
    _find_this_python()
    return SlurmNodes(session_name)


def local_cwd(session_name: str, **options: Any) -> Scheduler[Any]:
    """Make the scheduler that runs jobs on this machine, in the current directory."""
    _find_this_python()
    module = import_module("torchx.schedulers.local_scheduler")
    scheduler: Scheduler[Any] = module.create_scheduler(session_name, **options)
    return scheduler


def _find_this_python() -> None:
    """Let jobs find `python` as this process runs it, though its venv may not be activated."""
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
    "kubernetes": _torchx("infra.clusters.kubernetes"),
    "aws_batch": _torchx("infra.clusters.aws_batch"),
}
"""The schedulers by name, the default first."""


def option_names(scheduler: str) -> list[str]:
    """Return the names of the options that a scheduler takes.

    torchx's local scheduler takes over SIGINT and SIGTERM when it is made; this process gets them back.
    """
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    try:
        return list(FACTORIES[scheduler]("sidestack").run_opts()._opts)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
