"""The schedulers; Slurm's runs with fake commands in place of squeue, sacct, sbatch and scancel."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from torchx.schedulers import get_scheduler_factories
from torchx.schedulers.api import AppDryRunInfo
from torchx.specs import AppDef, AppState, Resource, Role

from sidestack.components import encoder
from sidestack.infra.clusters.config import SlurmOptions, load_cluster
from sidestack.infra.errors import SchedulerError, UnansweredError
from sidestack.infra.lease import VARIABLE, lease_of
from sidestack.infra.schedulers import FACTORIES, Reattachable, local_cwd, option_names
from sidestack.infra.slurm import SlurmJob, SlurmNodes


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty directory that is the whole PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


UNKNOWN = "slurm_load_jobs error: Invalid job id specified"
AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_ACCOUNTING = "Slurm accounting storage is disabled"


def command(directory: Path, name: str, output: str, status: int = 0, error: str = "") -> None:
    file = directory / name
    file.write_text(f"#!/bin/sh\nprintf '{output}'\necho '{error}' >&2\nexit {status}\n")
    file.chmod(0o755)


def state(directory: Path) -> AppState | None:
    answer = SlurmNodes("test").describe("12")
    return None if answer is None else answer.state


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        ("encoder-0|PENDING\\n", AppState.PENDING),
        ("encoder-0|RUNNING\\n", AppState.RUNNING),
        ("encoder-0|COMPLETING\\n", AppState.RUNNING),
        ("encoder-0|COMPLETED\\n", AppState.SUCCEEDED),
        ("encoder-0|COMPLETED\\nencoder-1|FAILED\\n", AppState.FAILED),
        ("encoder-0|COMPLETED\\nencoder-1|RUNNING\\n", AppState.RUNNING),
        ("encoder-0|OUT_OF_MEMORY\\n", AppState.FAILED),
        ("encoder-0|SOMETHING_NEW\\n", AppState.UNKNOWN),
    ],
)
def test_state_comes_from_the_queue_without_accounting(commands: Path, queue: str, expected: AppState) -> None:
    command(commands, "squeue", queue)
    command(commands, "sacct", "", status=1, error=NO_ACCOUNTING)
    assert state(commands) == expected


@pytest.mark.parametrize(("status", "error"), [(1, UNKNOWN), (0, "")])
def test_state_comes_from_accounting_when_the_queue_lacks_the_job(commands: Path, status: int, error: str) -> None:
    command(commands, "squeue", "", status, error)
    command(commands, "sacct", "encoder-0|CANCELLED by 1000\\n")
    assert state(commands) == AppState.CANCELLED


@pytest.mark.parametrize("has_sacct", [True, False])
def test_unknown_job_has_no_state(commands: Path, has_sacct: bool) -> None:
    command(commands, "squeue", "", status=1, error=UNKNOWN)
    if has_sacct:
        command(commands, "sacct", "", status=1, error=NO_ACCOUNTING)
    assert state(commands) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [(AWAY, UnansweredError), ("squeue: error: invalid option", SchedulerError), ("", SchedulerError)],
)
def test_error_of_squeue_is_raised(commands: Path, error: str, kind: type[SchedulerError]) -> None:
    command(commands, "squeue", "", status=1, error=error)
    command(commands, "sacct", "", status=1, error=NO_ACCOUNTING)
    with pytest.raises(kind, match="^squeue: " + re.escape(error)):
        state(commands)


def test_unreachable_accounting_raises_unanswered_error(commands: Path) -> None:
    command(commands, "squeue", "", status=1, error=UNKNOWN)
    command(commands, "sacct", "", status=1, error="sacct: error: Problem talking to the database: Connection refused")
    with pytest.raises(UnansweredError):
        state(commands)


def test_missing_slurm_commands_are_reported(commands: Path) -> None:
    with pytest.raises(SchedulerError, match="squeue: not found; the driver must run where"):
        state(commands)


def test_replicas_have_their_own_states(commands: Path) -> None:
    command(commands, "squeue", "encoder-0|RUNNING\\nencoder-1|PENDING\\n")
    answer = SlurmNodes("test").describe("12")
    assert answer is not None
    (role,) = answer.roles_statuses
    assert [(replica.id, replica.state) for replica in role.replicas] == [(0, AppState.RUNNING), (1, AppState.PENDING)]


def test_state_is_cached_between_queries(commands: Path) -> None:
    command(commands, "squeue", "encoder-0|RUNNING\\n")
    scheduler = SlurmNodes("test")
    scheduler.describe("12")
    command(commands, "squeue", "encoder-0|FAILED\\n")
    answer = scheduler.describe("12")
    assert answer is not None and answer.state == AppState.RUNNING


def job_of(env: dict[str, str] | None = None, options: dict[str, str] | None = None) -> SlurmJob:
    role = Role(
        "encoder", image="", entrypoint="bash", args=["-c", "echo ${app_id}"], num_replicas=2, env=env or {},
        resource=Resource(cpu=4, gpu=8, memMB=1024),
    )  # fmt: skip
    job = SlurmNodes("test").submit_dryrun(AppDef("encoder", [role]), options or {}).request
    assert isinstance(job, SlurmJob)
    return job


def test_several_nodes_are_one_job_with_gpus_per_node(commands: Path) -> None:
    job = job_of()
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=4", "--mem=1024"} <= {
        *job.command
    }
    assert "hetjob" not in repr(job) and "gpus-per-task" not in repr(job)


@pytest.mark.parametrize(("memory", "is_requested"), [("1", False), ("16000+", True)])
def test_memory_is_requested_only_if_nodes_declare_it(commands: Path, memory: str, is_requested: bool) -> None:
    command(commands, "sinfo", f"gpu*|{memory}\\n")
    assert ("--mem=1024" in job_of().command) == is_requested


def test_several_roles_are_a_heterogeneous_job(commands: Path) -> None:
    roles = [Role(name, "", entrypoint="true", resource=Resource(cpu=1, gpu=8, memMB=1)) for name in ("a", "b")]
    script = SlurmNodes("test").submit_dryrun(AppDef("two", roles), {}).request.materialize()
    assert script.count("--gpus-per-node=8") == 2 and "gpus-per-task" not in script


def test_site_options_are_passed_to_sbatch_unchanged(commands: Path) -> None:
    given = {"account": "ads", "qos": "high", "reservation": "night", "nodelist": "n[1-2]", "exclude": "n3"}
    options = {**given, "constraint": "a100&nvlink", "signal": "TERM@120", "partition": "gpu\n#SBATCH --uid=0"}
    job = job_of(options=options)
    assert {f"--{name}={value}" for name, value in options.items()} <= {*job.command}
    assert "uid" not in job.script


def test_variables_reach_a_job_unchanged_and_are_not_in_its_script_or_arguments(commands: Path, tmp_path: Path) -> None:
    hard = "planted,b='\"$HOME ${app_id} `id`\nnext"
    job = job_of(env={"TOKEN": hard.replace("$", "$$"), "TORCHX_JOB_ID": "slurm://x/${app_id}"})
    assert "planted" not in repr(job) and 'export TORCHX_JOB_ID=slurm://x/"$SLURM_JOB_ID"\n' in job.script
    (commands / "sbatch").write_text(f'#!/bin/sh\nprintf %s "$TOKEN" > {tmp_path}/seen\necho 12\n')
    (commands / "sbatch").chmod(0o755)
    assert SlurmNodes("test").schedule(AppDryRunInfo(job, repr)) == "12"
    assert (tmp_path / "seen").read_text() == hard


def test_variables_of_the_drivers_own_job_are_not_passed_on(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SIDESTACK_RENDEZVOUS_PORT", "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    (commands / "sbatch").write_text(f"#!/bin/sh\n/usr/bin/env > {tmp_path}/seen\necho 12\n")
    (commands / "sbatch").chmod(0o755)
    SlurmNodes("test").schedule(AppDryRunInfo(job_of(env={"SIDESTACK_RENDEZVOUS_PORT": "20999"}), repr))
    seen = {line for line in (tmp_path / "seen").read_text().splitlines() if line.startswith(("SLURM", "SIDE"))}
    assert seen == {"SLURM_CONF=7", "SIDESTACK_RENDEZVOUS_PORT=20999", "SLURM_UNBUFFEREDIO=1"}


def test_each_job_has_its_own_port_and_logs_share_a_folder(commands: Path, tmp_path: Path) -> None:
    job = job_of(options={"log_dir": str(tmp_path / "my logs")})
    assert '_PORT="${SIDESTACK_RENDEZVOUS_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"' in job.script
    assert f"--output={tmp_path}/my logs/slurm-%j.out" in job.command
    assert f"'--error={tmp_path}/my logs/slurm-%j-encoder-%t.err' --open-mode=append" in job.script
    found = SlurmNodes("test").log_files("12", "encoder", 2, tmp_path)
    assert [file.name for file in found] == ["slurm-12-encoder-0.err", "slurm-12-encoder-1.err", "slurm-12.out"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("sbatch: error: invalid partition specified: nope", SchedulerError),
        ("sbatch: error: Invalid generic resource (gres) specification", SchedulerError),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", UnansweredError),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller", UnansweredError),
    ],
)
def test_error_of_a_failed_submission_has_slurms_message(
    commands: Path, error: str, kind: type[SchedulerError]
) -> None:
    command(commands, "sbatch", "", status=1, error=error)
    with pytest.raises(SchedulerError) as caught:
        SlurmNodes("test").schedule(AppDryRunInfo(job_of(), repr))
    assert type(caught.value) is kind and str(caught.value) == f"sbatch: {error}"


def test_job_is_found_by_the_token_of_its_lease(commands: Path) -> None:
    token = "0123456789abcdef"
    job = job_of(env={VARIABLE: lease_of(Path("/runs/out"), token)})
    (name,) = (word.partition("=")[2] for word in job.command if word.startswith("--job-name="))
    command(commands, "squeue", f"11|other\\n12|{name}\\n")
    scheduler = SlurmNodes("test")
    assert scheduler.find(token) == "12" and scheduler.find("another") is None


def test_cancel_ignores_an_ended_job_and_raises_when_the_controller_is_unreachable(commands: Path) -> None:
    command(commands, "squeue", "encoder|RUNNING\\n")
    command(
        commands, "scancel", "", status=1, error="scancel: error: Kill job error on job id 12: Invalid job id specified"
    )
    SlurmNodes("test").cancel("12")
    command(commands, "scancel", "", status=1, error=AWAY)
    with pytest.raises(UnansweredError):
        SlurmNodes("test").cancel("12")


def test_options_of_sbatch_come_from_the_clusters_file(commands: Path) -> None:
    app = encoder.train(config="c", dataset="d", out="o", cluster="slurm")
    job = SlurmNodes("test").submit_dryrun(app, {"account": "mine"}).request
    given = load_cluster("slurm").scheduler_options | {"account": "mine"}
    assert len(given) > 3
    assert {f"--{name}={value}" for name, value in given.items()} <= {*job.command}


def test_options_of_cluster_files_are_known_to_the_scheduler(commands: Path) -> None:
    assert set(SlurmOptions.model_fields) <= set(SlurmNodes("test").run_opts()._opts)


def test_option_names_leaves_signal_handlers_unchanged() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert "log_dir" in option_names("local_cwd") and "queue" in option_names("kubernetes")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_folder_of_the_interpreter_comes_first_on_the_path(commands: Path) -> None:
    local_cwd("test")
    local_cwd("test")
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), str(commands)]


def test_entry_points_list_the_same_schedulers() -> None:
    registered = get_scheduler_factories()
    assert set(FACTORIES) <= set(registered), "the entry points in pyproject.toml lack a scheduler"
    assert isinstance(registered["slurm"]("test"), SlurmNodes), "reinstall: slurm's entry point is not ours"


def test_local_and_slurm_jobs_can_be_reattached() -> None:
    assert isinstance(SlurmNodes("test"), Reattachable) and isinstance(local_cwd("test"), Reattachable)
