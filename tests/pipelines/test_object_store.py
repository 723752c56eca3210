"""The pipeline with its data and its runs in an object store, moto's server on this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.benchmarks.forked_launcher import ForkedLauncher
from sidestack.infra.manifest import MANIFEST
from sidestack.pipelines import run as driver
from sidestack.pipelines.config import read_config
from sidestack.pipelines.graph import stages
from tests.components.golden import ROOT
from tests.object_store import SECRET, Bucket
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


@pytest.fixture
def bucket(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Return the bucket, with the environment set for stages in their own processes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return bucket


@pytest.mark.whole
def test_pipeline_runs_on_an_object_store_and_a_second_run_starts_no_stage(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stages are forked, and run through their own main programs."""
    log = OwnLog(tmp_path / "own", days=4, items=200)
    bucket.upload(log.path, "logs/own")
    added_day = log.file(log.add_day()).relative_to(log.path)  # uploaded later
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(driver, "launcher_of", lambda run: ForkedLauncher(logs_starts=True))
    prepare = {"source": {"kind": "tables", "path": f"{bucket.url}/logs/own", "test_days": 1}}
    values = {**SMALL, "prepare": prepare, "run": {**RUN, "runs_dir": f"{bucket.url}/runs"}}
    (here / "run.yaml").write_text(yaml.safe_dump(values))

    def run() -> tuple[list[str], int]:
        """Run the pipeline; return the lines of its result and the number of stages that were started."""
        driver.print_result(driver.run_pipeline(Path("run.yaml")))
        out, err = capfd.readouterr()
        assert SECRET not in out + err
        return out.splitlines(), sum(line.endswith("] starts") for line in err.splitlines())

    lines, started = run()
    assert started == 6
    output, report = (line.split()[1] for line in lines[-4:-2])
    assert output.startswith(f"{bucket.url}/runs/own/compare/") and Path(report).is_file()
    keys = bucket.keys("runs/")
    assert any(key.endswith("report.html") for key in keys) and any("store/events/date=" in key for key in keys)
    assert not [key for key in keys if ".checkpoint/" in key or key.endswith(".job.json")]
    assert run()[1] == 0 and committed(bucket.keys("runs/")) == committed(keys)

    shutil.rmtree(tmp_path / "mirror")  # another machine
    assert run()[1] == 0 and committed(bucket.keys("runs/")) == committed(keys)
    fetched = list((tmp_path / "mirror").rglob("*"))
    assert fetched and not [file for file in fetched if file.suffix == ".safetensors"]  # no stage was started

    bucket.put(f"logs/own/{added_day}", (log.path / added_day).read_bytes())
    prepared = committed(bucket.keys("runs/own/prepare/"))
    _, config = read_config(Path("run.yaml"), ())
    driver.run_stages(stages(config)[:1], config.run, {}, {})
    added = {*committed(bucket.keys("runs/own/prepare/"))} - {*prepared}
    tables = {key.split("/")[4] for key in added if "/store/" in key}
    assert tables == {"events", "requests", "labels"} and len(added) == 4  # three partitions of the day, and a snapshot

    assert {path.name for path in here.iterdir()} == {"run.yaml", ".cache"}


def committed(keys: list[str]) -> list[str]:
    return [key for key in keys if key.endswith(f"/{MANIFEST}")]


@pytest.mark.whole
def test_jobs_launched_on_an_object_store_report_their_failure(bucket: Bucket, tmp_path: Path) -> None:
    """Run the fake pipeline under torchrun, as users do."""

    def run(*overrides: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tests.pipelines.fake_plan", "--config", f"{bucket.url}/run.yaml", *overrides]
        return subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=600)

    bucket.put("run.yaml", yaml.safe_dump({"run": {"name": "fake", "runs_dir": f"{bucket.url}/runs"}}).encode())
    failed = run("--set", "ranker.fail_rank=1", "--set", "ranker.fault=data")
    assert failed.returncode == 1 and "column click: must be 0 or 1, is 7" in failed.stderr, failed.stderr
    kept = bucket.keys("runs/fake/prepare/")
    assert kept and not bucket.keys("runs/fake/ranker/")
    shutil.rmtree(tmp_path / "mirror")  # another machine
    done = run()
    assert done.returncode == 0, done.stderr
    assert f"[prepare] done before: {bucket.url}/runs/fake/prepare/" in done.stderr
    assert bucket.keys("runs/fake/prepare/") == kept and bucket.keys("runs/fake/ranker/")
    assert (
        tmp_path / done.stdout.splitlines()[-1]
    ).is_file() and SECRET not in done.stdout + done.stderr + failed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mirror"}
