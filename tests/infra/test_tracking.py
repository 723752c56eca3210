"""A stage's log: its files, and the MLflow runs that are made from them."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch
import yaml

from sidestack.infra.commit import committing
from sidestack.infra.distributed import World
from sidestack.infra.manifest import read_manifest
from sidestack.infra.mlflow_runs import ChildRun, end_parent, flatten, log_artifacts, metric_name, open_parent, replay
from sidestack.infra.mlflow_store import connect, use_store
from sidestack.infra.tracking import Mirror, RunLog

ONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")
CONFIG = {"arm": "side", "lr": 0.1, "towers": {"widths": [4, 2], "note": "x" * 9000}}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the runs folder of one SQLite store for the module, because creating its tables takes seconds."""
    path = tmp_path_factory.mktemp("runs")
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    use_store(path)
    yield path
    os.environ.pop("MLFLOW_TRACKING_URI")
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="module")
def client(runs_dir: Path) -> Any:
    return connect()


@pytest.mark.parametrize("name", ["my runs", "50%20off", "what?", "a#b", "größe"])
def test_store_is_created_in_a_runs_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    with sqlalchemy.create_engine(use_store(tmp_path / name)).connect():
        assert [path.name for path in (tmp_path / name).iterdir()] == ["mlflow.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_connections_to_a_local_store_wait_for_its_lock(runs_dir: Path, client: Any) -> None:
    with (runs_dir / "mlflow.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=connect)
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join(60)
    assert not second.is_alive()


def test_artifacts_are_written_to_the_new_place_after_a_move(
    tmp_path: Path, runs_dir: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_parent(client, "moving", "before", runs_dir, {})
    (runs_dir / "note.txt").write_text("x")
    log_artifacts(client, first, [runs_dir / "note.txt"])
    moved = tmp_path / "moved"
    shutil.copytree(runs_dir, moved)
    files = {path: path.stat().st_mtime_ns for path in runs_dir.rglob("*") if path.is_file()}
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    use_store(moved)
    moved_client = connect()
    second = open_parent(moved_client, "moving", "after", moved, {})
    log_artifacts(moved_client, second, [moved / "note.txt"])
    assert len(list((moved / "mlartifacts").rglob(f"{second}/artifacts/note.txt"))) == 1
    assert {path: path.stat().st_mtime_ns for path in runs_dir.rglob("*") if path.is_file()} == files
    (old,) = [
        one
        for one in moved_client.search_experiments()
        if one.experiment_id == moved_client.get_run(first).info.experiment_id
    ]
    assert old.name == f"moving (artifacts at {(runs_dir / 'mlartifacts/moving').as_uri()})"
    assert f"{moved} was moved; its earlier MLflow runs are in experiment {old.name!r}" in capsys.readouterr().err
    third = open_parent(moved_client, "moving", "again", moved, {})
    assert moved_client.get_run(third).info.experiment_id == moved_client.get_run(second).info.experiment_id
    assert not capsys.readouterr().err


def commit_dataset(path: Path) -> Path:
    with committing(path, ONE, stage="prepare") as out:
        out.joinpath("rows.txt").write_text("1\n")
    return path


def commit_ranker(path: Path, dataset: Path, parent: str | None) -> Path:
    with committing(path, ONE, stage="ranker", key="k1") as out:
        out.joinpath("config.yaml").write_text(yaml.safe_dump({"ranker": CONFIG}))  # as `infra.stage` writes it
        log = RunLog.open(0, "ranker", out, CONFIG, {"dataset": dataset}, "k1", parent)
        for step in range(3):
            log.metrics(step, {"loss": 1.0 / (step + 1), "auc": float("nan")})
        log.note(2, {"sha256": "ab12"})
        log.summary({"click": {"ne": 0.75, "gain": float("inf")}, "arm": "side"})
    log.finish("FINISHED", path)
    return path


def children(client: Any, parent: str) -> list[Any]:
    experiment = client.get_run(parent).info.experiment_id
    return list(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'"))


def content(client: Any, run: Any) -> dict[str, Any]:
    """Return a run's content without its times and its parent."""
    history = client.get_metric_history(run.info.run_id, "loss")
    tags = {k: v for k, v in run.data.tags.items() if k in ("sidestack.stage", "sidestack.arm")}
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "metrics": run.data.metrics,
        "history": [(point.step, point.value) for point in history],
        "tags": tags,
        "datasets": [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs],
        "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
    }


def test_log_files_are_written_without_mlflow(tmp_path: Path) -> None:
    dataset = commit_dataset(tmp_path / "data")
    out = commit_ranker(tmp_path / "ranker", dataset, parent=None)
    lines = [json.loads(line) for line in out.joinpath("history.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "loss": 1.0, "auc": None}
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert lines[3] == {"step": 2, "sha256": "ab12"}
    summary = json.loads(out.joinpath("summary.json").read_text())
    assert summary == {"click": {"ne": 0.75, "gain": None}, "arm": "side"}
    # The manifest covers the log, although the log was still open when the manifest was written.
    assert set(read_manifest(out).files) == {"config.yaml", "history.jsonl", "summary.json"}


class RecordingMirror:
    """Records the rows that would be sent to MLflow."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def put(self, row: tuple[float, int, dict[str, float]]) -> None:
        self.rows.append(row[1:])


def test_resumed_log_continues_the_checkpoints_history(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    first = RunLog.open(0, "encoder", tmp_path / "before", {}, {}, "", None)
    assert first.history() == ""
    first.metrics(1, {"loss": 0.1 + 0.2, "auc": float("nan")})
    first.note(1, {"sha256": "ab12"})
    mirror: Any = RecordingMirror()
    second = RunLog(tmp_path, mirror)
    second.resume(first.history())
    second.metrics(2, {"loss": 0.25})
    lines = [json.loads(line) for line in second.history().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.1 + 0.2, "auc": None}, {"step": 1, "sha256": "ab12"}, {"step": 2, "loss": 0.25},
    ]  # fmt: skip
    assert mirror.rows == [(1, {"loss": 0.1 + 0.2}), (1, {}), (2, {"loss": 0.25})]


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog.open(1, "encoder", tmp_path, {}, {}, "", parent_run="never-looked-up")
    log.metrics(0, {"loss": 1.0})
    log.note(0, {"sha256": "ab12"})
    log.resume('{"step": 0, "loss": 1.0}\n')
    assert log.history() == ""
    log.summary({"loss": 1.0})
    log.info("hello")
    with log.progress(4, "items") as advance:
        advance(4)
    log.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_progress_without_a_terminal_prints_a_few_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog.open(0, "encoder", tmp_path, {}, {}, "", None)
    with log.progress(1000, "items") as advance:
        for _ in range(1000):
            advance(1)
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        f"items: {count} of 1,000" for count in ("250", "500", "750", "1,000")
    ]


def test_progress_ends_at_its_total(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog.open(0, "materialize", tmp_path, {}, {}, "", None)
    with log.progress(5, "dates") as advance:
        for _ in range(2):  # three ranks with at most two dates each
            advance(3)
    assert capfd.readouterr().err.splitlines()[-1].startswith("dates: 5 of 5 (")


def test_live_and_replayed_runs_have_the_same_content(client: Any, runs_dir: Path, tmp_path: Path) -> None:
    dataset = commit_dataset(tmp_path / "data")
    first = open_parent(client, "sameness", "sameness", runs_dir, {"ranker": CONFIG})
    out = commit_ranker(tmp_path / "ranker", dataset, parent=first)
    end_parent(client, first, "FINISHED")
    second = open_parent(client, "sameness", "sameness", runs_dir, {"ranker": CONFIG})
    replay(client, second, out, {"dataset": dataset})
    (live,), (replayed,) = children(client, first), children(client, second)

    recorded = content(client, live)
    assert recorded == content(client, replayed)
    assert recorded["name"] == "ranker-side" and recorded["status"] == "FINISHED"
    assert recorded["metrics"] == {"loss": pytest.approx(1 / 3), "summary/click.ne": 0.75}
    assert recorded["history"] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert recorded["params"]["towers.widths"] == "[4, 2]"
    assert len(recorded["params"]["towers.note"]) == 500
    assert recorded["datasets"] == [("dataset", read_manifest(dataset).digest[:36])]
    assert {"manifest.json", "config.yaml", "summary.json"} <= set(recorded["artifacts"])
    assert "sidestack.reused_from" not in live.data.tags
    assert replayed.data.tags["sidestack.reused_from"] == str(out)


@pytest.mark.parametrize("is_reused", [False, True])
def test_run_of_an_encoder_is_named_after_its_directory(client: Any, runs_dir: Path, *, is_reused: bool) -> None:
    parent = open_parent(client, "names", "names", runs_dir, {})
    for label in ("encoder", "encoder-L3-d5-g3", "by_hand"):
        ChildRun.start(client, parent, "encoder", {}, {}, "", runs_dir / label / "0123", is_reused=is_reused)
    names = {child.info.run_name for child in children(client, parent)}
    assert names == {"encoder", "encoder-L3-d5-g3"}


def test_hundreds_of_params_are_logged(client: Any, runs_dir: Path) -> None:
    config = {f"key{i}": i for i in range(250)}
    parent = open_parent(client, "many", "many", runs_dir, {"prepare": config})
    assert len(client.get_run(parent).data.params) == 250


def test_artifacts_of_a_local_store_are_in_the_runs_folder(client: Any, runs_dir: Path, tmp_path: Path) -> None:
    dataset = commit_dataset(tmp_path / "data")
    parent = open_parent(client, "place", "place", runs_dir, {})
    commit_ranker(tmp_path / "ranker", dataset, parent)
    assert list(runs_dir.joinpath("mlartifacts", "place").rglob("manifest.json"))


def test_runs_of_a_killed_driver_are_ended_and_live_ones_kept(client: Any, runs_dir: Path) -> None:
    script = (
        "from pathlib import Path;"
        "from sidestack.infra.mlflow_runs import *; from sidestack.infra.mlflow_store import connect;"
        f"c = connect(); p = open_parent(c, 'swept', 'swept', Path({str(runs_dir)!r}), {{}});"
        "ChildRun.start(c, p, 'encoder', {}, {}, '', Path('out')); print(p)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    killed = ended.stdout.strip()
    assert client.get_run(killed).info.status == "RUNNING", ended.stderr

    mine = open_parent(client, "swept", "swept", runs_dir, {})
    open_parent(client, "swept", "swept", runs_dir, {})
    assert client.get_run(killed).info.status == "KILLED"
    assert [child.info.status for child in children(client, killed)] == ["KILLED"]
    assert client.get_run(mine).info.status == "RUNNING"


def test_failing_store_logs_one_warning_and_the_run_continues(
    tmp_path: Path, runs_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = RunLog.open(0, "encoder", tmp_path, {}, {}, "", parent_run="no-such-run")
    log.metrics(0, {"loss": 1.0})
    log.finish("FINISHED")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(r"warning: tracking: MLflow is not recording this run \(.*no-such-run", lines[0])
    assert json.loads(tmp_path.joinpath("history.jsonl").read_text()) == {"step": 0, "loss": 1.0}


def test_artifacts_may_be_whole_directories(client: Any, runs_dir: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("figures").mkdir()
    tmp_path.joinpath("figures", "ne.png").touch()
    parent = open_parent(client, "figures", "figures", runs_dir, {})
    log_artifacts(client, parent, [tmp_path / "figures", tmp_path / "absent.txt"])
    assert [file.path for file in client.list_artifacts(parent)] == ["figures"]
    assert [file.path for file in client.list_artifacts(parent, "figures")] == ["figures/ne.png"]


NAMES = ["price $", "price €", "price_", "a//b", "a/b", "/a", "../a", ".", "", "x" * 300, "x" * 301, "größe", "a b"]


def test_metric_names_are_valid_and_stay_distinct(client: Any, runs_dir: Path) -> None:
    names = [metric_name(name) for name in NAMES]
    assert len(set(names)) == len(NAMES)
    assert {name for name in NAMES if metric_name(name) == name} == {"price_", "a/b", "größe", "a b"}
    parent = open_parent(client, "odd", "odd", runs_dir, {name: place for place, name in enumerate(NAMES)})
    child = ChildRun.start(client, parent, "ranker", {}, {}, "", runs_dir / "ranker" / "0123")
    child.log_history([(0.0, 1, {name: float(place) for place, name in enumerate(NAMES)})])
    found = client.get_run(child.run_id).data.metrics
    assert found == {name: float(place) for place, name in enumerate(names)}
    assert len(client.get_run(parent).data.params) == len(NAMES)


def test_secrets_in_urls_are_masked_in_params(client: Any, runs_dir: Path) -> None:
    parent = open_parent(client, "uris", "uris", runs_dir, {"source": "s3://key:planted@bucket/log"})
    assert client.get_run(parent).data.params == {"source": "s3://***@bucket/log"}


class Child:
    """A child run whose store is unreachable for some requests."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.rows: list[Any] = []
        self.ended: list[Any] = []

    def log_history(self, rows: list[Any]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("away")
        self.rows += rows

    def finish(self, *given: Any) -> None:
        self.ended.append(given)


def test_rows_are_sent_again_when_the_store_is_reachable_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sidestack.infra.tracking._FLUSH_SECONDS", 0.01)
    monkeypatch.setattr("sidestack.infra.tracking._PAUSE_SECONDS", 0.02)
    child: Any = Child(failures=3)
    mirror = Mirror(lambda: child)
    for step in range(20):
        mirror.put((0.0, step, {"loss": 1.0}))
        time.sleep(0.01)
    mirror.finish("FINISHED", tmp_path)
    assert [step for _, step, _ in child.rows] == list(range(20))
    assert child.ended == [("FINISHED", tmp_path)]
    assert capfd.readouterr().err.endswith(
        "warning: tracking: MLflow is not recording this run (ConnectionError: away)\n"
    )


def test_restarted_stage_replaces_its_killed_run(client: Any, runs_dir: Path) -> None:
    parent = open_parent(client, "restarts", "restarts", runs_dir, {})
    out = runs_dir / "encoder" / "0123"
    killed = ChildRun.start(client, parent, "encoder", {}, {}, "k1", out)
    failed = ChildRun.start(client, parent, "encoder", {}, {}, "k2", out)
    client.set_terminated(failed.run_id, "FAILED")
    made = [ChildRun.start(client, parent, "encoder", {}, {}, key, out).run_id for key in ("k1", "k2")]
    found = {child.info.run_id for child in children(client, parent)}
    assert found == {failed.run_id, *made} and killed.run_id not in found


def test_deleted_experiment_is_restored(client: Any, runs_dir: Path) -> None:
    first = open_parent(client, "deleted", "deleted", runs_dir, {})
    client.delete_experiment(client.get_run(first).info.experiment_id)
    assert client.get_run(open_parent(client, "deleted", "deleted", runs_dir, {})).info.status == "RUNNING"


def test_flatten_keeps_empty_mappings_and_lists() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": 1, "a.c": {}, "d": [1, 2]}
