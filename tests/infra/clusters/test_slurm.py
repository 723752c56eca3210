"""Slurm's further options, and jobs of several nodes as one group."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.infra.clusters.jobs import rendered, write_cluster

ALL = {"account": "a", "qos": "q", "reservation": "r", "nodelist": "n[1-2]", "exclude": "n3", "constraint": "h100"}


@pytest.fixture(autouse=True)
def _without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchx find no `sinfo`, which it asks for the partition's memory."""
    monkeypatch.setenv("PATH", str(tmp_path))


def script(options: dict[str, Any] | None = None, **arguments: Any) -> str:
    return str(rendered("slurm", options, **arguments).materialize())


def test_options_reach_every_part_of_a_job() -> None:
    text = script(ALL, j="2x1")
    assert text.count("#SBATCH --job-name") == 2
    for name, value in ALL.items():
        assert text.count(f"--{name}={value}") == 2


def test_options_come_from_the_clusters_file_and_given_ones_before(tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, "scheduler: slurm\noptions: {partition: gpu, account: theirs, qos: high}\n")
    text = script({"account": "mine"}, cluster=cluster)
    assert "--partition=gpu" in text and "--qos=high" in text and "--account=mine" in text


def test_a_step_has_the_cores_that_were_asked_for() -> None:
    """From Slurm 22.05 on, srun does not take them from sbatch: all ranks of a node would share one core."""
    srun = next(line for line in script(cpu=32).splitlines() if line.startswith("srun "))
    assert "--cpus-per-task=32" in srun


def test_several_nodes_can_be_one_group() -> None:
    text = script({"heterogeneous": False}, j="3x2")
    assert "hetjob" not in text and text.count("#SBATCH --job-name") == 1
    assert "--nodes=3 " in text.replace("\n", " ") and "--ntasks-per-node=1" in text
    assert text.count("srun ") == 1 and "encoder-%t.out" in text
    assert "hetjob" in script(j="3x2")


def test_one_group_finds_its_first_host(tmp_path: Path) -> None:
    """The script's own words, run by bash with stand-ins of Slurm's commands."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("scontrol", 'printf "n7\\nn8\\n"'), ("srun", 'echo "first=$SLURM_JOB_NODELIST_HET_GROUP_0"')):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_ID": "12"}
    text = script({"heterogeneous": False}, j="2x1")
    ended = subprocess.run(["/bin/bash", "-c", text], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "first=n7\n" in ended.stdout


def test_one_node_needs_no_group() -> None:
    assert "--nodes" not in script({"heterogeneous": False}, j="1x2")
