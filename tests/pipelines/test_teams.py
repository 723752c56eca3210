"""MLflow's server with PostgreSQL and S3 (moto's server): concurrent pipelines, and an outage of each part."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.infra.mlflow_store import URI_VARIABLE, connect
from sidestack.pipelines.track import track
from tests.components.golden import ROOT
from tests.object_store import free_port
from tests.pipelines.test_tracker import WHOLE, commit, recorded_runs, run_file, track_stages, tracker_of
from tests.tracking_server import answers

BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
LACKING = [name for name in ("psycopg2", "moto") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(bool(LACKING), reason=f"not installed, see requirements/teams.txt: {', '.join(LACKING)}"),
    pytest.mark.skipif(BINARIES is None, reason="not installed: PostgreSQL (Debian: postgresql)"),
]
BUCKET, PASSWORD = "mlflow", "planted"


class Database:
    """PostgreSQL of Debian's packages on loopback; it refuses to run as root, so root starts it as user postgres."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.getuid() == 0 else []
        if self.user:
            shutil.chown(folder, "postgres", "postgres")
        self.run("initdb", "-D", str(folder), "-A", "trust", "-U", "mlflow")
        self.start()
        self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", "mlflow")

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow:{PASSWORD}@127.0.0.1:{self.port}/mlflow"

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.run("pg_ctl", "-D", str(self.folder), "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder), "-m", "immediate", "stop")

    def run(self, program: str, *words: str) -> None:
        assert BINARIES is not None
        command = [*self.user, str(BINARIES / program), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", env={"HOME": str(self.folder)})


class Server:
    """`mlflow server` as docs/tracking.md describes it, on a fixed port."""

    def __init__(self, folder: Path, database: Database, store: str) -> None:
        self.port, self.log = free_port(), folder / "server.log"
        self.environment = {
            **os.environ, "MLFLOW_BACKEND_STORE_URI": database.uri, "MLFLOW_S3_ENDPOINT_URL": store,
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--artifacts-destination", f"s3://{BUCKET}"],
            env=self.environment, stdout=self.log.open("a"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while not answers(f"{self.uri}/health"):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.5)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Services:
    """The server, its database and its bucket."""

    def __init__(self, folder: Path, database: Database, server: Server, bucket: Any) -> None:
        self.folder, self.database, self.server, self.bucket = folder, database, server, bucket

    def artifacts(self) -> list[str]:
        """Return the keys of all objects in the bucket."""
        return [str(one.key) for one in self.bucket.objects.all()]

    @contextmanager
    def without_server(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()

    @contextmanager
    def without_database(self) -> Iterator[None]:
        self.database.stop()
        try:
            yield
        finally:
            self.database.start()

    @contextmanager
    def with_stopped_server(self) -> Iterator[None]:
        os.killpg(self.server.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.server.process.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    import boto3
    from moto.server import ThreadedMotoServer

    folder = tmp_path_factory.mktemp("teams")
    data = Path(tempfile.mkdtemp())  # the database's user cannot read pytest's folders
    port = free_port()
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    store.start()
    address = f"http://127.0.0.1:{port}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    bucket = boto3.resource("s3", endpoint_url=address, **keys).Bucket(BUCKET)
    bucket.create()
    database = Database(data)
    server = Server(folder, database, address)
    try:
        yield Services(folder, database, server, bucket)
    finally:
        server.stop()
        database.stop()
        store.stop()
        shutil.rmtree(data)


@pytest.fixture
def folder(tmp_path: Path, services: Services, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(URI_VARIABLE, services.server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # the default, 4, is too short on shared cores
    return tmp_path / "runs" / tmp_path.name


def test_two_concurrent_pipelines_are_recorded_with_their_artifacts_in_s3(tmp_path: Path, services: Services) -> None:
    environment = {**os.environ, URI_VARIABLE: services.server.uri, "PYTHONPATH": str(ROOT)}
    processes = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"run": {"name": name, "runs_dir": str(tmp_path / "runs")}}))
        command = [sys.executable, "-m", "tests.pipelines.fake_plan", "--config", str(file)]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0 and PASSWORD not in err.decode(), err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(URI_VARIABLE, services.server.uri)
        for name in ("one", "two"):
            found = recorded_runs(tmp_path / "runs" / name)
            assert set(found) == {name, "prepare", "ranker"} and {status for status, _ in found.values()} == {
                "FINISHED"
            }
            assert list((tmp_path / "runs" / name / "tracking").glob("*")) == []
            experiment = connect().get_experiment_by_name(name)
            own = [key for key in services.artifacts() if key.startswith(f"{experiment.experiment_id}/")]
            assert len([key for key in own if key.endswith("manifest.json")]) == 3


def test_command_uploads_a_run_made_without_the_server(folder: Path, services: Services) -> None:
    with services.without_server():
        track_stages(folder, tracker_of(folder))
    assert recorded_runs(folder) == {}
    track(run_file(folder))
    assert recorded_runs(folder) == WHOLE


@pytest.mark.parametrize("part", ["without_server", "without_database", "with_stopped_server"])
def test_stage_run_during_an_outage_is_recorded_at_the_end(folder: Path, services: Services, part: str) -> None:
    tracker = tracker_of(folder)
    assert tracker.parent_run
    with getattr(services, part)():
        tracker.add("prepare", commit(folder, "prepare", tracker.parent_run), {}, is_reused=False)
    tracker.add("ranker", commit(folder, "ranker", tracker.parent_run), {}, is_reused=False)
    tracker.close("FINISHED")
    if recorded_runs(folder) != WHOLE:  # the server may need a while to reconnect to its database
        track(run_file(folder))
    assert recorded_runs(folder) == WHOLE


def test_restart_after_an_outage_at_the_end_resumes_the_parent_run(folder: Path, services: Services) -> None:
    tracker = tracker_of(folder)
    tracker.add("prepare", commit(folder, "prepare", tracker.parent_run), {}, is_reused=False)
    with services.without_database():
        tracker.close("FAILED")
    again = tracker_of(folder)
    assert again.parent_run == tracker._journal.parent_run
    again.add("ranker", commit(folder, "ranker", again.parent_run), {}, is_reused=False)
    again.close("FINISHED")
    assert recorded_runs(folder) == WHOLE
