"""The tracking store: its creation (interrupted, concurrent), damaged files, unreachable databases and time limits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sidestack.infra.errors import ConfigError
from sidestack.infra.mlflow_store import (
    URI_VARIABLE,
    StoreError,
    call_with_timeout,
    connect,
    has_store,
    longer_timeouts,
    use_store,
)
from tests.components.golden import ROOT

FIRST_START = "from sidestack.infra.mlflow_store import connect; print(len(connect().search_experiments()))"
START_S = 240


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for a new store, which `connect` will create."""
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    use_store(tmp_path)
    return tmp_path


def started() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", FIRST_START],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended_well(process: "subprocess.Popen[str]") -> bool:
    out, err = process.communicate(timeout=START_S)
    assert (process.returncode, err) == (0, "")
    return out == "1\n"


@pytest.mark.slow
def test_two_processes_create_one_store(runs_dir: Path) -> None:
    assert all([ended_well(process) for process in (started(), started())])
    assert sorted(file.name for file in runs_dir.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["before the rename", "in the middle of the tables"])
def test_next_start_succeeds_when_the_first_is_killed(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*given: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        place = "pathlib.Path.replace" if stage == "before the rename" else "mlflow.store.db.utils._upgrade_db"
        patch.setattr(place, die)
        connect()
    assert not (runs_dir / "mlflow.db").exists() and (runs_dir / "mlflow.db.new").exists()
    assert ended_well(started())
    assert not (runs_dir / "mlflow.db.new").exists()


@pytest.mark.chaos
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_next_start_succeeds_when_the_first_is_killed_at_a_random_moment(
    tmp_path: Path, signum: signal.Signals
) -> None:
    moments = random.Random(signum)
    with pytest.MonkeyPatch.context() as patch:
        for number in range(6):
            patch.delenv(URI_VARIABLE, raising=False)
            use_store(tmp_path / str(number))
            (tmp_path / str(number)).mkdir()
            began = time.monotonic()
            if number == 0:
                assert ended_well(started())
                whole = time.monotonic() - began
                continue
            process = started()
            time.sleep(moments.uniform(0.2, 1.0) * whole)
            process.send_signal(signum)
            process.communicate(timeout=START_S)
            assert ended_well(started())


def test_full_disk_leaves_no_store(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("mlflow.store.db.utils._upgrade_db", full)
        connect()
    assert [file.name for file in runs_dir.iterdir()] == ["mlflow.db.lock"]


@pytest.mark.parametrize("content", [b"no database" * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_damaged_file_is_named(runs_dir: Path, content: bytes) -> None:
    file = runs_dir / "mlflow.db"
    file.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{file}: cannot be used as MLflow's store \(.*\); move it away"):
        connect()
    assert file.read_bytes() == content


def test_incomplete_store_is_named(runs_dir: Path) -> None:
    import sqlite3

    with sqlite3.connect(runs_dir / "mlflow.db") as half_made:
        half_made.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    with pytest.raises(StoreError, match="mlflow.db: cannot be used"):
        connect()


@pytest.mark.slow
def test_empty_file_is_replaced_by_a_store(runs_dir: Path) -> None:
    (runs_dir / "mlflow.db").touch()
    assert ended_well(started())


@pytest.mark.parametrize("value", ["", "  "])
def test_empty_tracking_uri_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(URI_VARIABLE, value)
    assert not has_store()
    assert use_store(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_unknown_kind_of_store_raises_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI_VARIABLE, "htp://user:planted@host")
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI 'htp://\*\*\*@host': mlflow knows no store"):
        connect()


def test_unreachable_database_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestack.infra.mlflow_store._CONNECT_SECONDS", 0.5)
    monkeypatch.setattr("mlflow.store.db.utils.create_sqlalchemy_engine_with_retry", lambda uri: time.sleep(20))
    monkeypatch.setenv(URI_VARIABLE, "postgresql://user:planted@host/db")
    with pytest.raises(StoreError, match="no answer within"):
        connect()


def test_bounded_raises_the_calls_own_timeout_error() -> None:
    def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        call_with_timeout(late, 5)
    assert call_with_timeout(lambda: 7, 5) == 7


def test_patient_restores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with longer_timeouts():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
