"""The pipeline with its data and its runs in an object store: moto's server, on this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.commit import MANIFEST
from tests.components.golden import ROOT
from tests.object_store import SECRET, Bucket, moto_server, use
from tests.pipelines.own_log import OwnLog

SMALL: dict[str, Any] = {
    "encoder": {"training": {"epochs": 1, "batch_size": 32, "lanes": 2, "checkpoint_every": 2}},
    "ranker": {
        "arm": "side",
        "model": {"embedding_dim": 8, "dense_hidden": 8, "content_hidden": 8, "cross_rank": 8, "over_arch": [16, 8]},
        "training": {"epochs": 1, "batch_size": 64, "lanes": 2},
    },
    "baseline": {"enabled": False},
    "compare": {"resamples": 100},
}
RUN = {
    "name": "own",
    "replicates": 1,
    "arms": ["none", "side"],
    "launch": {name: {"ranks": 1, "cpu": 1} for name in ("prepare", "encoder", "materialize", "ranker")},
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    use(monkeypatch, endpoint, tmp_path / "mirror")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Bucket(endpoint)


def run(folder: Path, module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as people do, in a folder of its own."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=900)


def started(said: str) -> int:
    return sum(" starts with " in line for line in said.splitlines())


@pytest.mark.slow
def test_the_whole_pipeline_runs_from_and_to_a_store_and_a_second_run_does_no_work(
    bucket: Bucket, tmp_path: Path
) -> None:
    log = OwnLog(tmp_path / "own", days=4, items=200)
    bucket.upload(log.path, "logs/own")
    shutil.rmtree(log.path)
    here = tmp_path / "here"
    here.mkdir()
    prepare = {"source": {"kind": "tables", "path": f"{bucket.url}/logs/own", "test_days": 1}}
    values = {**SMALL, "prepare": prepare, "run": {**RUN, "runs_dir": f"{bucket.url}/runs"}}
    (here / "run.yaml").write_text(yaml.safe_dump(values))

    first = run(here, "pipelines.run", "--config", "run.yaml")
    assert first.returncode == 0, first.stderr
    output, report = (line.split()[1] for line in first.stdout.splitlines()[-4:-2])
    assert output.startswith(f"{bucket.url}/runs/own/compare/") and Path(report).is_file()
    keys = bucket.keys("runs/")
    assert any(key.endswith("report.html") for key in keys) and any("store/events/date=" in key for key in keys)
    assert not [key for key in keys if ".checkpoint/" in key or key.endswith(".job.json")]

    second = run(here, "pipelines.run", "--config", "run.yaml")
    assert second.returncode == 0 and started(second.stderr) == 0, second.stderr
    assert committed(bucket) == committed_in(keys)

    shutil.rmtree(tmp_path / "mirror")  # another machine
    third = run(here, "pipelines.run", "--config", "run.yaml")
    assert third.returncode == 0 and started(third.stderr) == 0, third.stderr
    assert (tmp_path / "mirror").is_dir() and committed(bucket) == committed_in(keys)
    weights = [file for file in (tmp_path / "mirror").rglob("*.safetensors")]
    assert not weights  # nor was what nobody reads fetched

    assert {path.name for path in here.iterdir()} == {"run.yaml", ".cache"}
    for one in (first, second, third):
        assert SECRET not in one.stdout + one.stderr


def committed(bucket: Bucket) -> list[str]:
    return committed_in(bucket.keys("runs/"))


def committed_in(keys: list[str]) -> list[str]:
    return [key for key in keys if key.endswith(f"/{MANIFEST}")]
