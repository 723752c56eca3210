"""Slurm for a pipeline's driver: torchx 0.7.0's scheduler with other jobs, queries and errors.

What differs from torchx, and why:

- Nodes of one role are one job of several nodes. torchx makes them a heterogeneous job, which some sites forbid and
  which Slurm starts only by backfill.
- A job's state comes from `squeue`, and from `sacct` once the job has left the queue: many clusters keep no accounts.
- GPUs are requested per node: newer Slurm refuses `--gpus-per-task` without a task count.
- Settings are arguments of `sbatch`, and variables are passed in its environment. So neither can become another command
  in the script, a comma does not end a value, and no value is visible in a process's arguments.
- Logs are in one folder, and a requeued job appends to its log.
- Results of Slurm's commands are distinguished: an answer, a refusal (`SchedulerError`), no answer (`UnansweredError`).
"""

import getpass
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse
from torchx.schedulers.slurm_scheduler import SLURM_STATES, SlurmOpts, SlurmScheduler, _save_job_dir
from torchx.specs import AppDef, AppState, ReplicaStatus, Role, RoleStatus, macros, runopts

from sidestack.infra import lease
from sidestack.infra.clusters.answers import LastAnswers
from sidestack.infra.clusters.config import FIRST_PORT, NUM_PORTS, cluster_of, with_options
from sidestack.infra.errors import SchedulerError, UnansweredError
from sidestack.infra.rendezvous import PORT_VARIABLE

OPTIONS: Mapping[str, str] = {
    "account": "the account that the job is charged to",
    "qos": "the quality of service",
    "reservation": "the reservation to take nodes from",
    "nodelist": "nodes that the job must have",
    "exclude": "nodes that the job must not have",
    "signal": "what the ranks are sent before the time limit, such as TERM@120: two minutes to checkpoint",
}
"""Options of `sbatch` that torchx does not support."""

_PASSED_ON = ("partition", "time", "constraint", "comment", "mail-user", "mail-type", *OPTIONS)
NEVER_STARTS = {
    "PartitionConfig": "the partition has fewer nodes",
    "PartitionNodeLimit": "the partition has fewer nodes, or allows fewer",
    "PartitionTimeLimit": "the partition allows less time",
    "BadConstraints": "no node has what is asked for",
    "InvalidAccount": "the account is unknown",
    "InvalidQOS": "the quality of service is unknown",
}
"""Reasons why a job waits until somebody changes it or the cluster, and their meanings."""

_HANDLE = "TORCHX_JOB_ID"
_COMMAND_SECONDS = 60.0

# A job is COMPLETING while its processes end; torchx has no such state.
_STATES = {**SLURM_STATES, "COMPLETING": AppState.RUNNING, "CONFIGURING": AppState.PENDING}

# The state of a job is that of its worst part.
_WORST_FIRST = (
    AppState.FAILED,
    AppState.CANCELLED,
    AppState.UNKNOWN,
    AppState.RUNNING,
    AppState.PENDING,
    AppState.SUCCEEDED,
)

# Messages of Slurm's commands that did not reach the controller or the accounting database.
_AWAY = (
    "unable to contact", "connect failure", "connection refused", "connection timed out", "socket timed out",
    "zero bytes were transmitted", "temporarily unable", "resource temporarily unavailable", "problem talking to",
    "unable to establish", "lookup failed", "communication", "plugin failed", "try again",
)  # fmt: skip


@dataclass(frozen=True)
class SlurmJob:
    """A job as input of `sbatch`.

    Attributes:
        command: `sbatch` and its arguments. script: its standard input. env: variables that the job inherits from it.
        log_dir: the folder of its logs; None: the job's own directory. job_dir: see torchx's option.
    """

    command: tuple[str, ...]
    script: str
    env: Mapping[str, str]
    log_dir: Path | None = None
    job_dir: str | None = None

    def __repr__(self) -> str:
        """Return the command, the variables' names and the script as text, for a dry run."""
        return f"# environment: {' '.join(self.env)}\n{shlex.join(self.command)} <<'SCRIPT'\n{self.script}SCRIPT"


class SlurmNodes(SlurmScheduler):  # type: ignore[misc]  # torchx is not typed
    """The scheduler `slurm`."""

    def __init__(self, session_name: str) -> None:
        super().__init__(session_name)
        self._answers = LastAnswers[DescribeAppResponse | SchedulerError | None]()

    def _run_opts(self) -> runopts:
        opts = super()._run_opts()
        for name, explanation in OPTIONS.items():
            opts.add(name, type_=str, help=explanation)
        opts.add("log_dir", type_=str, help="the folder of the jobs' logs; by default where the job runs")
        return opts

    def _submit_dryrun(self, app: AppDef, cfg: SlurmOpts) -> AppDryRunInfo[Any]:
        options = with_options(cluster_of(app.roles[0].metadata, "slurm"), cfg)
        if len(app.roles) > 1 or not _is_uniform(app.roles[0]):
            return _with_gpus_by_node(super()._submit_dryrun(app, options))
        return AppDryRunInfo(_job(app, options, _counts_memory(options.get("partition"))), repr)

    def schedule(self, dryrun_info: AppDryRunInfo[Any]) -> str:
        """Submit a job.

        Raises:
            SchedulerError: Slurm refused it. UnansweredError: Slurm was not reached, or its answer was lost.
        """
        job = dryrun_info.request
        if not isinstance(job, SlurmJob):
            return str(super().schedule(dryrun_info))
        if job.log_dir is not None:
            job.log_dir.mkdir(parents=True, exist_ok=True)
        job_id = _run(job.command, job.script, job.env).strip().partition(";")[0]
        if job.job_dir is not None:
            _save_job_dir(job_id, job.job_dir)
        return job_id

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return the job's state from the queue, or else from the accounts; None: neither has the job.

        The answer, or an error, is cached for some seconds: callers query several times a second.

        Raises:
            SchedulerError: a command failed, so that the state is unknown.
        """
        answer = self._answers.of(app_id, _state)
        if isinstance(answer, SchedulerError):
            raise answer
        return answer

    def find(self, token: str) -> str | None:
        """Return the job that was submitted with a lease's token; None: Slurm has none.

        Raises:
            SchedulerError: a command failed, so that the answer is unknown.
        """
        columns = ["--format=%i|%j", "--states=all", "--noheader"]
        for line in _run(["squeue", f"--user={getpass.getuser()}", *columns]).splitlines():
            job_id, _, name = line.strip().partition("|")
            if name.endswith(f"-{_short(token)}"):
                return job_id
        return None

    def log_files(self, app_id: str, role: str, num_nodes: int, log_dir: Path) -> list[Path]:
        """Return the file of each node's stderr, and that of the job's script."""
        nodes = [log_dir / f"slurm-{app_id}-{role}-{node}.err" for node in range(num_nodes)]
        return [*nodes, log_dir / f"slurm-{app_id}.out"]

    def leave(self, app_id: str) -> None:
        """Do nothing: every Slurm job continues when this process ends."""

    def _cancel_existing(self, app_id: str) -> None:
        try:
            _run(["scancel", app_id])
        except SchedulerError as error:
            if not _is_unknown(str(error)):
                raise
        self._answers.forget(app_id)


def _is_uniform(role: Role) -> bool:
    """Return whether all nodes of a role run the same command, in which a shell substitutes the node's number."""
    return role.entrypoint == "bash" or not any(macros.replica_id in arg for arg in role.args)


def _job(app: AppDef, cfg: Mapping[str, Any], has_memory: bool) -> SlurmJob:
    """Make one job of a role's nodes, with one task on each."""
    # The script sets this variable to the first node's name.
    rank0 = "SIDESTACK_RANK0_HOST"
    values = macros.Values(
        img_root=app.roles[0].image, app_id=macros.app_id, replica_id="$SLURM_NODEID", rank0_env=rank0
    )  # fmt: skip
    role = values.apply(app.roles[0])
    job_dir, log_dir = cfg.get("job_dir"), cfg.get("log_dir")
    folder = None if log_dir is None else Path(log_dir).absolute()
    place = "" if folder is None else f"{folder}/"
    token = role.env.get(lease.VARIABLE, "").partition(" ")[0]
    name = f"{app.name}-{_short(token)}" if token else app.name
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--nodes={role.num_replicas}", "--ntasks-per-node=1"]
    command += ["--requeue", "--open-mode=append", f"--output={place}slurm-%j.out"]
    asked = {
        "cpus-per-task": role.resource.cpu,
        "mem": role.resource.memMB if has_memory else 0,
        "gpus-per-node": role.resource.gpu,
    }
    command += [f"--{option}={number}" for option, number in asked.items() if number > 0]
    command += [f"--{option}={cfg[option]}" for option in _PASSED_ON if cfg.get(option) is not None]
    command += [f"--chdir={job_dir}"] if job_dir is not None else []
    stream = f"{place}slurm-%j-{role.name}-%t"
    task = ["srun", f"--output={stream}.out", f"--error={stream}.err", "--open-mode=append"]
    # End the other nodes a minute after one has ended, and at once after one has failed.
    task += ["--wait=60", "--kill-on-bad-exit=1", role.entrypoint, *role.args]
    env = {"PYTHONUNBUFFERED": "1", "SLURM_UNBUFFEREDIO": "1", **role.env}
    handle = env.pop(_HANDLE, "")  # contains the job's number, which only the script has
    lines = [
        "#!/bin/bash",
        f"export {_HANDLE}={_quoted(handle)}",
        f'export {rank0}="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        f'export {PORT_VARIABLE}="${{{PORT_VARIABLE}:-$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))}}"',
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',  # since 22.05, srun does not inherit it from the job
        " ".join(map(_quoted, task)),
        "status=$?",
        'echo "job ended with status $status"',
        f'if [ "$status" -ne 0 ] && [ {int(role.max_retries)} -gt "${{SLURM_RESTART_COUNT:-0}}" ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $status",
    ]
    return SlurmJob(tuple(command), "".join(f"{line}\n" for line in lines), env, folder, job_dir)


def _counts_memory(partition: str | None) -> bool:
    """Return whether jobs can request memory: on some clusters, nodes are configured with the default of 1 MB."""
    try:
        lines = _run(["sinfo", "--noheader", "--noconvert", "--format=%P|%m"]).splitlines()
    except SchedulerError:
        return True
    for line in lines:
        name, _, memory = line.strip().partition("|")
        if name.rstrip("*") == partition or (partition is None and name.endswith("*")):
            return int(memory.rstrip("+")) > 1000
    return True


def _quoted(word: str) -> str:
    """Quote a word for the script, with Slurm's job number in place of torchx's app id."""
    return '"$SLURM_JOB_ID"'.join(shlex.quote(part) if part else "" for part in word.split(macros.app_id)) or "''"


def _short(token: str) -> str:
    """Return the part of a lease's token that is in the name of its job."""
    return token[:12]


def _with_gpus_by_node(info: AppDryRunInfo[Any]) -> AppDryRunInfo[Any]:
    for replica in info.request.replicas.values():
        replica.sbatch_opts.pop("ntasks", None)
        gpus = replica.sbatch_opts.pop("gpus-per-task", None)
        if gpus is not None:
            replica.sbatch_opts["gpus-per-node"] = gpus
    return info


def _state(job_id: str) -> DescribeAppResponse | SchedulerError | None:
    """Return a job's state, or the error if it is unknown; None: Slurm does not have the job."""
    try:
        parts = _squeue_parts(job_id) or _sacct_parts(job_id)
    except SchedulerError as error:
        return error
    return _response(job_id, parts) if parts else None


def _squeue_parts(job_id: str) -> list[tuple[str, str]]:
    """Return (job name, state and reason) of a job's parts from `squeue`, which keeps ended ones for some minutes."""
    columns = ["--format=%j|%T %r", "--states=all", "--noheader"]
    try:
        return _rows(_run(["squeue", f"--jobs={job_id}", *columns]))
    except SchedulerError as error:
        if _is_unknown(str(error)):
            return []
        raise


def _sacct_parts(job_id: str) -> list[tuple[str, str]]:
    """Return the same for a job that ended, from `sacct`; empty if Slurm keeps no accounts."""
    columns = ["--format=JobName,State", "--parsable2", "--noheader", "--allocations"]
    try:
        return _rows(_run(["sacct", f"--jobs={job_id}", *columns]))
    except UnansweredError:
        raise
    except SchedulerError:
        return []


def _is_unknown(text: str) -> bool:
    return "invalid job id" in text.lower()


def _run(command: Sequence[str], text: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run one of Slurm's commands and return what it printed.

    Args:
        command: its words. text: its standard input. env: further variables.

    Raises:
        SchedulerError: it is not installed, or failed. UnansweredError: it did not reach Slurm.
    """
    kept = {name: value for name, value in os.environ.items() if not _is_job_variable(name)}
    try:
        ended = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_COMMAND_SECONDS, env={**kept, **(env or {})},
            stdin=subprocess.DEVNULL if text is None else None,
        )  # fmt: skip
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]}: not found; the driver must run where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise UnansweredError(f"{command[0]}: did not end within {_COMMAND_SECONDS:g} s") from None
    if ended.returncode != 0:
        reason = "; ".join(line.strip() for line in ended.stderr.splitlines() if line.strip())
        reason = reason or f"ended with status {ended.returncode} and without a word"
        is_away = any(words in reason.lower() for words in _AWAY)
        raise (UnansweredError if is_away else SchedulerError)(f"{command[0]}: {reason}")
    return ended.stdout


def _is_job_variable(variable: str) -> bool:
    """Return whether a variable belongs to the driver's own job, if it is one: it must not reach submitted jobs."""
    return variable == PORT_VARIABLE or (variable.startswith("SLURM_") and variable != "SLURM_CONF")


def _rows(output: str) -> list[tuple[str, str]]:
    pairs = (line.rpartition("|") for line in output.splitlines())
    return [(name, state.strip()) for name, _, state in pairs if name and state.strip()]


def _response(job_id: str, parts: list[tuple[str, str]]) -> DescribeAppResponse:
    replicas: dict[str, list[ReplicaStatus]] = {}
    states, reports = [], set()
    for job_name, words in parts:
        # As in "PENDING Resources" or "CANCELLED by 1000", only the first word is the state.
        word = words.split()[0]
        state = _STATES.get(word, AppState.UNKNOWN)
        states.append(state)
        reports.add(words if state == AppState.PENDING else word)
        role, _, number = job_name.rpartition("-")
        if role and number.isdecimal():
            status = ReplicaStatus(id=int(number), role=role, state=state, hostname="")
            replicas.setdefault(role, []).append(status)
    return DescribeAppResponse(
        app_id=job_id,
        roles=[Role(name, image="", num_replicas=len(found)) for name, found in replicas.items()],
        roles_statuses=[RoleStatus(name, found) for name, found in replicas.items()],
        state=next(state for state in _WORST_FIRST if state in states),
        msg=", ".join(sorted(reports)),
    )
