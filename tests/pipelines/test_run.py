"""The driver with fake stages that local_cwd and torchrun launch on two ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.infra.errors import CommitError, ConfigError, StageError
from sidestack.infra.mlflow_store import connect
from sidestack.pipelines.graph import Stage, key
from sidestack.pipelines.track import track
from tests.components.golden import ROOT
from tests.pipelines.fake_plan import run_fake

RUN_S = 240
PROGRAM = [sys.executable, "-m", "tests.pipelines.fake_plan"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a directory with a run's file, and set the stages' environment."""
    path = tmp_path_factory.mktemp("driver")
    values = {"prepare": {"text": "raw"}, "ranker": {}, "run": {"name": "fake", "runs_dir": str(path / "runs")}}
    path.joinpath("run.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}/runs/mlflow.db")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(ROOT)
        yield path


@pytest.fixture(scope="module")
def first(base: Path) -> "subprocess.CompletedProcess[str]":
    """Run the driver once as a user does, without an activated venv."""
    return subprocess.run(
        [*PROGRAM, "--config", str(base / "run.yaml")],
        env={**os.environ, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=RUN_S,
    )  # fmt: skip


def again(base: Path, *overrides: str) -> Path:
    return run_fake(base / "run.yaml", list(overrides))


def runs(status: str) -> list[Any]:
    client = connect()
    (experiment,) = [e for e in client.search_experiments() if e.name == "fake"]
    return list(client.search_runs([experiment.experiment_id], f"attributes.status = '{status}'"))


def test_first_run_launches_every_stage_and_ends_with_the_comparison(
    first: "subprocess.CompletedProcess[str]", base: Path
) -> None:
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == "hello: table.txt"
    assert lines[-3].startswith("report  ") and Path(lines[-3].split()[1]).is_file()
    assert lines[-2].startswith("MLflow  ") and f"sqlite:///{base}/runs/mlflow.db" in lines[-2]
    assert lines[-1].endswith("comparison.json") and Path(lines[-1]).is_file()
    assert "[prepare] raw from 1 ranks" in first.stderr
    assert "[ranker] hello from 2 ranks" in first.stderr
    out = Path(lines[-1]).parent
    assert {"rank0.txt", "rank1.txt"} <= {file.name for file in out.iterdir()}


def test_output_is_free_of_library_noise(first: "subprocess.CompletedProcess[str]") -> None:
    assert all(line.startswith(("[prepare] ", "[ranker] ")) for line in first.stderr.splitlines()), first.stderr


def test_parent_and_children_are_tracked(first: "subprocess.CompletedProcess[str]") -> None:
    by_name = {run.info.run_name: run for run in runs("FINISHED")}
    assert {"fake", "prepare", "ranker"} <= set(by_name)
    files = {file.path for file in connect().list_artifacts(by_name["fake"].info.run_id)}
    assert {"comparison.json", "table.txt", "report.html"} <= files
    assert by_name["ranker"].data.metrics == {"loss": 0.5, "summary/ne": 0.9}


def test_second_run_launches_nothing_and_gives_the_same_output(
    first: "subprocess.CompletedProcess[str]", base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = again(base)
    assert out == Path(first.stdout.splitlines()[-1]).parent
    err = capfd.readouterr().err
    assert err.count("done before: ") == 2 and "starts" not in err
    reused = [run for run in runs("FINISHED") if "sidestack.reused_from" in run.data.tags]
    assert {run.info.run_name for run in reused} == {"prepare", "ranker"}


def test_failing_rank_stops_the_run_with_its_traceback(
    first: "subprocess.CompletedProcess[str]", base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageError) as caught:
        again(base, "ranker.fail_rank=1")
    message = str(caught.value)
    assert message.startswith("[ranker] failed: rank 1: Traceback")
    assert "RuntimeError: the deliberate bug" in message and "fake_stage.py" in message
    err = capfd.readouterr().err
    # Only the ranker's section changed, so prepare is reused.
    assert "[prepare] done before: " in err and "[ranker] starts" in err
    assert "fake" in {run.info.run_name for run in runs("FAILED")}
    assert runs("RUNNING") == []


@pytest.mark.slow
def test_users_fault_is_reported_without_a_traceback(first: "subprocess.CompletedProcess[str]", base: Path) -> None:
    with pytest.raises(StageError, match=r"rank 1: DataError: part.parquet: row group 3") as caught:
        again(base, "ranker.fail_rank=1", "ranker.fault=data")
    assert "Traceback" not in str(caught.value)


@pytest.mark.slow
def test_killed_rank_is_reported_with_its_signal(first: "subprocess.CompletedProcess[str]", base: Path) -> None:
    with pytest.raises(StageError, match="SIGKILL"):
        again(base, "ranker.fail_rank=1", "ranker.fault=kill")


@pytest.mark.whole
def test_stage_that_takes_too_long_is_cancelled(first: "subprocess.CompletedProcess[str]", base: Path) -> None:
    with pytest.raises(StageError, match="cancelled after 0.2 minutes"):
        again(base, "ranker.sleep_s=600", "run.timeout_minutes=0.2")


@pytest.mark.whole
def test_sigterm_cancels_the_stage_and_leaves_nothing_running(
    first: "subprocess.CompletedProcess[str]", base: Path
) -> None:
    arguments = ["--config", str(base / "run.yaml"), "--set", "ranker.sleep_s=601"]
    ranker = base / "runs" / "fake" / "ranker"
    earlier = set(ranker.glob(".*.asleep"))  # another test's stage may have slept here
    driver = subprocess.Popen([*PROGRAM, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + RUN_S
        while set(ranker.glob(".*.asleep")) <= earlier and time.monotonic() < deadline:
            time.sleep(0.2)
        driver.send_signal(signal.SIGTERM)
        _, err = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM" in err
    assert runs("RUNNING") == []
    assert "fake" in {run.info.run_name for run in runs("KILLED")}
    left = [
        p for p in Path("/proc").glob("[0-9]*/cmdline") if str(base).encode() in _read(p) and b"fake_stage" in _read(p)
    ]
    assert left == []


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_directory_without_a_manifest_is_neither_reused_nor_overwritten(
    first: "subprocess.CompletedProcess[str]", base: Path
) -> None:
    out = again(base)
    manifest = out / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    try:
        with pytest.raises(CommitError, match="is not a directory of ours"):
            again(base)
        assert (out / "rank0.txt").is_file()
    finally:
        manifest.write_bytes(kept)


def test_altered_file_of_a_committed_stage_is_detected(first: "subprocess.CompletedProcess[str]", base: Path) -> None:
    file = again(base) / "rank0.txt"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + b"X")
    try:
        with pytest.raises(CommitError, match=r"rank0.txt: SHA-256 .* remove .* to have it made again"):
            again(base)
    finally:
        file.write_bytes(kept)


@pytest.mark.parametrize("name", ["file/runs", "x" * 300])
def test_runs_directory_that_cannot_be_created_is_named(name: str, tmp_path: Path) -> None:
    from sidestack.pipelines.run import run_lock

    (tmp_path / "file").write_text("mine")
    with pytest.raises(StageError, match=r"cannot be written \(.+\); see run\.runs_dir"):
        with run_lock(tmp_path / name):
            pass


def test_two_drivers_do_not_share_a_run(first: "subprocess.CompletedProcess[str]", base: Path) -> None:
    from sidestack.pipelines.run import run_lock

    with run_lock(base / "runs" / "fake"), pytest.raises(StageError, match="another driver is running"):
        again(base)


@pytest.mark.whole
def test_unreachable_tracking_store_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"run": {"name": "fake", "runs_dir": str(tmp_path / "runs")}}))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert (run_fake(file, []) / "comparison.json").is_file()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[tracking] ")]
    assert len(lines) == 1 and lines[0].startswith("[tracking] http://127.0.0.1:9: MlflowException: ")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert track(file) == 1  # the run can also be uploaded to another store
    by_name = {run.info.run_name: run for run in runs("FINISHED")}
    assert set(by_name) == {"fake", "prepare", "ranker"}
    assert by_name["ranker"].data.metrics == {"loss": 0.5, "summary/ne": 0.9}
    files = {artifact.path for artifact in connect().list_artifacts(by_name["fake"].info.run_id)}
    assert {"comparison.json", "table.txt", "report.html"} <= files


def test_invalid_tracking_address_launches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"run": {"name": "never", "runs_dir": str(tmp_path / "runs")}}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI './mlruns': must be a server's address"):
        run_fake(file, [])
    assert not (tmp_path / "runs").exists()


PRINTING = {
    "a command": (
        "from sidestack.pipelines.run import exit_status\nwith exit_status(): print('held out \\u00b7 \\u2500')"
    ),
    "a table": "from sidestack.infra.console import wide_console\nwide_console().print('held out \\u00b7 \\u2500')",
    "a stage": (
        "from sidestack.infra.stage import run_stage\nfrom sidestack.infra.config import Config\n"
        "run_stage('x', 'compare', Config, [], lambda run: print('held out \\u00b7 \\u2500'), ['--out', 'OUT'])"
    ),
}


@pytest.mark.parametrize("kind", PRINTING)
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "locale"],
)
def test_a_result_is_printed_on_a_stream_that_lacks_its_characters(
    kind: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTING[kind].replace("OUT", str(tmp_path / "out"))],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "held out ? ?\n"), done.stderr


@pytest.mark.parametrize(
    "override", ["ranker.no_such=1", "run.name=a/b", "run.scheduler=slurm,run", "run.cluster=kubernets"]
)
def test_faulty_config_launches_nothing(tmp_path: Path, override: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"run": {"name": "never", "runs_dir": str(tmp_path / "runs")}}))
    with pytest.raises(ConfigError):
        run_fake(file, [override])
    assert not (tmp_path / "runs").exists()


def test_faulty_scheduler_options_launch_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run: scheduler 'kubernetes': needs scheduler_options.queue"):
        again(base, f"run.runs_dir={tmp_path}", "run.scheduler=kubernetes")
    assert not list(tmp_path.rglob("manifest.json"))


def test_code_edited_during_the_run_is_reported(
    first: "subprocess.CompletedProcess[str]",
    base: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def key_of_edited_code(stage: Stage, digests: dict[str, str], source: str) -> str:
        asked.append(stage.label)
        is_edited = stage.label == "ranker" and asked.count("ranker") > 1
        return "f" * 64 if is_edited else key(stage, digests, source)

    monkeypatch.setattr("sidestack.pipelines.execution.key", key_of_edited_code)
    again(base)
    lines = [line for line in capfd.readouterr().err.splitlines() if "changed during this run" in line]
    assert len(lines) == 1 and lines[0].startswith("[ranker] ")
