"""A pipeline's MLflow run when the store is unreachable at the start, in the middle or at the end."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.infra.commit import committing
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import ConfigError, StageError
from sidestack.infra.journal import journals
from sidestack.infra.mlflow_store import URI_VARIABLE, connect, longer_timeouts
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.track import track
from sidestack.pipelines.tracker import Tracker
from tests.tracking_server import SECRET_PAGE, TrackingServer, tracking_server

CONFIG = {"prepare": {"text": "raw"}}
AWAY = "http://somebody:hunter2@127.0.0.1:9"
FAULTS = ["401", "403", "404", "429", "500", "503", "page", "hang"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with tracking_server(tmp_path_factory.mktemp("server")) as one:
        yield one


@pytest.fixture
def folder(tmp_path: Path, server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run's folder with a unique name, and so with its own experiment; the server is the tracking store."""
    monkeypatch.setenv(URI_VARIABLE, server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # the default, 4, is too short on shared cores
    return tmp_path / "runs" / tmp_path.name


def tracker_of(folder: Path, config: dict[str, Any] = CONFIG) -> Tracker:
    return Tracker(folder, folder.parent, "a title", config)


def commit(folder: Path, label: str, parent_run: str = "") -> Path:
    """Commit a stage as a job does: with a record, and logged under the parent run if there is one."""
    out = folder / label / "0123456789ab"
    with committing(out, ALONE, stage=label, key=f"key of {label}") as directory:
        log = RunLog.open(0, label, directory, {"text": label}, {}, f"key of {label}", parent_run or None)
        for step in range(3):
            log.metrics(step, {"loss": 1.0 / (step + 1)})
        log.summary({"ne": 0.9})
    log.finish("FINISHED", out)
    return out


def recorded_runs(folder: Path) -> dict[str, tuple[str, dict[str, float]]]:
    """Return status and metrics of all runs in a folder's experiment, by name; the names must differ."""
    with longer_timeouts():  # a server that was just started is slow
        client = connect()
        experiment = client.get_experiment_by_name(folder.name)
        runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
    found = {run.info.run_name: (run.info.status, dict(run.data.metrics)) for run in runs}
    assert len(found) == len(runs), [run.info.run_name for run in runs]
    return found


METRICS = {"loss": pytest.approx(1 / 3), "summary/ne": 0.9}
WHOLE = {"a title": ("FINISHED", {}), "prepare": ("FINISHED", METRICS), "ranker": ("FINISHED", METRICS)}


def run_file(folder: Path) -> Path:
    file = folder.parent.parent / "run.yaml"
    file.write_text(yaml.safe_dump({"run": {"name": folder.name, "runs_dir": str(folder.parent)}}))
    return file


def track_stages(folder: Path, tracker: Tracker) -> None:
    for label in ("prepare", "ranker"):
        out = commit(folder, label, tracker.parent_run)
        tracker.add(label, out, {}, is_reused=False)
    tracker.close("FINISHED", [out / "summary.json"])


def test_reachable_store_is_updated_at_once_without_a_journal(folder: Path) -> None:
    track_stages(folder, tracker_of(folder))
    assert recorded_runs(folder) == WHOLE
    assert journals(folder) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_unreachable_store_costs_seconds_and_is_updated_by_one_command(
    folder: Path, server: TrackingServer, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    connect()  # importing mlflow is not part of the measured time
    began = time.monotonic()
    with server.failing(fault):
        track_stages(folder, tracker_of(folder))
    assert time.monotonic() - began < 60  # with mlflow's defaults, the first request alone takes 250 s
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and len(err) < 400 and "the run continues" in err
    assert SECRET_PAGE.split()[-1] not in err
    assert recorded_runs(folder) == {}
    assert track(run_file(folder)) == 1
    assert recorded_runs(folder) == WHOLE
    assert journals(folder) == []
    assert track(run_file(folder)) == 0


@pytest.mark.slow
def test_server_that_never_ends_a_response_counts_as_unreachable(folder: Path, server: TrackingServer) -> None:
    with server.failing("drip"):
        tracker = tracker_of(folder)
        assert tracker.parent_run == ""


def test_outage_in_the_middle_loses_nothing(folder: Path, server: TrackingServer) -> None:
    tracker = tracker_of(folder)
    with server.failing("503"):
        out = commit(folder, "prepare", tracker.parent_run)  # the stage's job cannot reach the store
        tracker.add("prepare", out, {}, is_reused=False)
        assert tracker.parent_run == ""  # the next stage does not try the store
    tracker.add("ranker", commit(folder, "ranker", tracker.parent_run), {}, is_reused=False)
    tracker.close("FINISHED")
    assert recorded_runs(folder) == WHOLE
    assert journals(folder) == []


def test_next_run_uploads_what_an_outage_at_the_end_left(folder: Path, server: TrackingServer) -> None:
    tracker = tracker_of(folder)
    for label in ("prepare", "ranker"):
        tracker.add(label, commit(folder, label, tracker.parent_run), {}, is_reused=False)
    with server.failing("500"):
        tracker.close("FINISHED")
    assert recorded_runs(folder)["a title"][0] == "RUNNING"
    Tracker(folder, folder.parent, "the next", CONFIG).close("FINISHED")
    assert recorded_runs(folder) == {**WHOLE, "the next": ("FINISHED", {})}
    assert journals(folder) == []


@pytest.mark.parametrize("how", ["killed", "failed", "killed while away"])
def test_restart_resumes_the_parent_run(folder: Path, server: TrackingServer, how: str) -> None:
    if how == "killed while away":
        with server.failing("503"):
            tracker_of(folder)
    else:
        tracker = tracker_of(folder)
        tracker.add("prepare", commit(folder, "prepare", tracker.parent_run), {}, is_reused=False)
        if how == "failed":
            tracker.close("FAILED")
            assert recorded_runs(folder)["a title"][0] == "FAILED"
    again = tracker_of(folder)
    assert recorded_runs(folder)["a title"][0] == "RUNNING"
    if how == "killed while away":
        commit(folder, "prepare", again.parent_run)
    again.add("prepare", folder / "prepare/0123456789ab", {}, is_reused=True)
    again.add("ranker", commit(folder, "ranker", again.parent_run), {}, is_reused=False)
    again.close("FINISHED")
    assert recorded_runs(folder) == WHOLE


def test_another_configuration_starts_another_run_and_leaves_none_running(folder: Path) -> None:
    tracker_of(folder)  # killed
    Tracker(folder, folder.parent, "another", {"prepare": {"text": "other"}}).close("FINISHED")
    assert recorded_runs(folder) == {"a title": ("KILLED", {}), "another": ("FINISHED", {})}
    assert journals(folder) == []


def test_partly_logged_stage_is_recorded_once(folder: Path) -> None:
    tracker = tracker_of(folder)
    out = folder / "prepare" / "0123456789ab"
    out.parent.mkdir(parents=True)
    log = RunLog.open(0, "prepare", out.parent, {}, {}, "key of prepare", tracker.parent_run)
    del log  # its process is killed
    tracker.add("prepare", commit(folder, "prepare", tracker.parent_run), {}, is_reused=False)
    tracker.close("FINISHED")
    assert recorded_runs(folder)["prepare"] == ("FINISHED", METRICS)


def test_late_upload_keeps_the_original_times(folder: Path, server: TrackingServer) -> None:
    with server.failing("503"):
        track_stages(folder, tracker_of(folder))
    (kept,) = journals(folder)
    track(run_file(folder))
    client = connect()
    (run,) = [
        run
        for run in client.search_runs([client.get_experiment_by_name(folder.name).experiment_id])
        if run.info.run_name == "a title"
    ]
    assert (run.info.start_time, run.info.end_time) == tuple(
        int(at.timestamp() * 1000) for at in (kept.entries.began, kept.entries.ended)
    )


def test_moved_run_is_uploaded_from_its_new_folder(folder: Path, server: TrackingServer) -> None:
    with server.failing("503"):
        track_stages(folder, tracker_of(folder))
    moved = folder.parent.parent / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    assert track(run_file(moved)) == 1
    assert recorded_runs(folder) == WHOLE


def test_command_reports_that_the_store_is_still_unreachable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI_VARIABLE, AWAY)
    track_stages(folder, tracker_of(folder))
    monkeypatch.setattr("sidestack.infra.mlflow_store._PATIENT", {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    with pytest.raises(StageError, match=r"http://\*\*\*@127.0.0.1:9: MlflowException: .*stays in") as caught:
        track(run_file(folder))
    assert "hunter2" not in str(caught.value)
    assert len(journals(folder)) == 1


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "file:///mlruns", "http://", "http://host:port", "htp://host", "http://[1"]
)
def test_malformed_address_is_a_configuration_error(folder: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv(URI_VARIABLE, uri)
    with pytest.raises(ConfigError, match=URI_VARIABLE):
        tracker_of(folder)


def test_unreadable_journal_does_not_stop_the_run(folder: Path) -> None:
    (folder / "tracking").mkdir(parents=True)
    (folder / "tracking" / "torn.json").write_text("{")
    tracker_of(folder).close("FINISHED")
    assert recorded_runs(folder) == {"a title": ("FINISHED", {})}
