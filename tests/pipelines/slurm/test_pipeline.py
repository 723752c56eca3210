"""The whole pipeline and scheduled retraining on a real Slurm cluster of two nodes, with one rank per node."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.infra.manifest import read_manifest
from sidestack.pipelines.config import PipelineConfig, read_config
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.retrain.ledger import Ledger
from tests.components.golden import ROOT
from tests.infra.deploy.scrontab import parse_scrontab
from tests.pipelines.retrain.nights import SMALL, laid_over
from tests.pipelines.slurm.nodes import call

pytestmark = pytest.mark.slurm
LIMIT_S = 1500
ONE_RANK = {"ranks": 1, "cpu": 1, "memory_mb": 2500}
ON_TWO_NODES = ("encoder", "materialize", "ranker")
ON_ONE_NODE = ("prepare", "baseline", "compare")


def write_config(folder: Path, changes: Mapping[str, Any]) -> Path:
    """Write the small log's configuration with its stages on Slurm, and return the file."""
    launch = {stage: {"nodes": 2, **ONE_RANK} for stage in ON_TWO_NODES}
    launch |= {stage: {"nodes": 1, **ONE_RANK} for stage in ON_ONE_NODE}
    run = {
        "runs_dir": str(folder / "runs"), "scheduler": "slurm", "launch": launch,
        "scheduler_options": {"partition": "main", "time": "00:10:00"},
    }  # fmt: skip
    values = laid_over(SMALL, {"run": run, "prepare": {"cache_dir": str(folder / "cache")}})
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(laid_over(values, changes)))
    return file


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/runs/mlflow.db"}


def jobs() -> set[str]:
    """Return the ids of all jobs that Slurm knows."""
    return set(call("squeue", "--noheader", "--states=all", "--format=%i").split())


def ranks_of(config: PipelineConfig, stage: str) -> list[int]:
    """Return the number of ranks of each output of a stage."""
    folder = run_dir(config.run) / stage
    manifests = [folder, *folder.glob("*")]
    return [read_manifest(one).facts["world_size"] for one in manifests if (one / "manifest.json").exists()]


def test_pipeline_runs_with_a_rank_on_each_node(cluster: None, tmp_path: Path) -> None:
    file = write_config(tmp_path, {"ranker": {"arm": "side"}, "run": {"arms": ["none", "side"]}})
    command = [sys.executable, "-m", "sidestack.pipelines.run", "--config", str(file)]
    before = jobs()
    subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), check=True, timeout=LIMIT_S)
    launched = jobs() - before
    _, config = read_config(file, [])
    assert len(launched) >= 6
    assert {number for stage in ON_TWO_NODES for number in ranks_of(config, stage)} == {2}
    assert next(run_dir(config.run).rglob("report.html")).stat().st_size > 10_000
    assert not list(tmp_path.glob("slurm-*")) and not list(ROOT.glob("slurm-*"))
    subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), check=True, timeout=LIMIT_S)
    assert jobs() <= before | launched, "a second call launches nothing"


def submit(folder: Path, file: Path) -> Path:
    """Run the schedule's entry as slurmctld would, wait for its end, and return its log.

    Debian's Slurm has no scrontab, so this submits the batch script that scrontab would: the entry's command with its
    options.
    """
    (entry,) = parse_scrontab((ROOT / "infra/deploy/schedule/scrontab").read_text())
    log = folder / "retrain.log"
    options = {**entry.options, "--partition": "main", "--chdir": str(folder), "--output": str(log)}
    command = entry.command.replace(".venv/bin/python", sys.executable).replace("/shared/retrain.yaml", str(file))
    uri = environment(folder)["MLFLOW_TRACKING_URI"]
    command = command.replace("http://mlflow.example.com:5000", uri)
    assert str(file) in command and uri in command and sys.executable in command
    words = [f"{name}={value}" for name, value in options.items()]
    subprocess.run(
        ["sbatch", "--wait", *words], input=f"#!/bin/sh\n{command}\n", text=True, check=True, timeout=LIMIT_S,
        env=environment(folder),
    )  # fmt: skip
    return log


def test_scrontab_entry_runs_one_retraining_cycle(cluster: None, tmp_path: Path) -> None:
    file = write_config(tmp_path, {})
    log = submit(tmp_path, file)
    _, config = read_config(file, [])
    (cycle,) = Ledger(run_dir(config.run)).cycles
    assert cycle.outcome is not None and cycle.outcome.promoted, log.read_text()
    known = jobs()
    submit(tmp_path, file)
    assert len(Ledger(run_dir(config.run)).cycles) == 1, log.read_text()
    assert len(jobs() - known) == 1, "the second driver finds nothing new and launches no job"
