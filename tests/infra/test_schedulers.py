"""The schedulers' mends, against stand-ins of Slurm's commands."""

import os
import signal
import sys
from pathlib import Path

import pytest
from torchx.schedulers import get_scheduler_factories
from torchx.specs import AppDef, AppState, Resource, Role

from components import encoder
from infra.clusters.config import SlurmOptions, load_cluster
from infra.schedulers import FACTORIES, SlurmNodes, local_cwd, option_names


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only directory that commands are found in."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def command(directory: Path, name: str, output: str, status: int = 0) -> None:
    file = directory / name
    file.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {status}\n")
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
    command(commands, "sacct", "Slurm accounting storage is disabled\\n", status=1)
    assert state(commands) == expected


def test_accounts_answer_once_the_queue_forgot_the_job(commands: Path) -> None:
    command(commands, "squeue", "", status=1)
    command(commands, "sacct", "encoder-0|CANCELLED by 1000\\n")
    assert state(commands) == AppState.CANCELLED


def test_a_job_nobody_knows_has_no_state(commands: Path) -> None:
    command(commands, "squeue", "", status=1)
    assert state(commands) is None


def test_replicas_are_told_apart(commands: Path) -> None:
    command(commands, "squeue", "encoder-0|RUNNING\\nencoder-1|PENDING\\n")
    answer = SlurmNodes("test").describe("12")
    assert answer is not None
    (role,) = answer.roles_statuses
    assert [(replica.id, replica.state) for replica in role.replicas] == [(0, AppState.RUNNING), (1, AppState.PENDING)]


def test_slurm_is_asked_once_in_a_while_only(commands: Path) -> None:
    command(commands, "squeue", "encoder-0|RUNNING\\n")
    scheduler = SlurmNodes("test")
    scheduler.describe("12")
    command(commands, "squeue", "encoder-0|FAILED\\n")
    answer = scheduler.describe("12")
    assert answer is not None and answer.state == AppState.RUNNING


def test_gpus_are_asked_for_by_node(commands: Path) -> None:
    role = Role("encoder", image="", entrypoint="true", num_replicas=2, resource=Resource(cpu=4, gpu=8, memMB=1024))
    script = SlurmNodes("test").submit_dryrun(AppDef("encoder", [role]), {}).request.materialize()
    assert script.count("--gpus-per-node=8") == 2
    assert "gpus-per-task" not in script


def test_options_of_sbatch_come_from_the_clusters_file(commands: Path) -> None:
    app = encoder.train(config="c", dataset="d", out="o", cluster="slurm")
    script = SlurmNodes("test").submit_dryrun(app, {"account": "mine"}).request.materialize()
    given = load_cluster("slurm").scheduler_options | {"account": "mine"}
    assert len(given) > 3
    assert all(f"--{name}={value}" in script for name, value in given.items())


def test_every_option_of_a_clusters_file_is_slurms(commands: Path) -> None:
    assert set(SlurmOptions.model_fields) <= set(SlurmNodes("test").run_opts()._opts)


def test_asking_for_a_schedulers_options_leaves_the_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert "log_dir" in option_names("local_cwd") and "queue" in option_names("kubernetes")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_venv_that_is_not_activated_comes_first_on_the_path(commands: Path) -> None:
    local_cwd("test")
    local_cwd("test")
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), str(commands)]


def test_entry_points_list_the_same_schedulers() -> None:
    registered = get_scheduler_factories()
    assert set(FACTORIES) <= set(registered), "the entry points in pyproject.toml lack a scheduler"
    assert isinstance(registered["slurm"]("test"), SlurmNodes), "reinstall: slurm's entry point is not ours"
