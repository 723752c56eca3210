"""Run MLflow's server, with faults on request, in its own process on loopback: `python -m tests.tracking_server`."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.components.golden import ROOT

SECRET_PAGE = "<!doctype html><title>Bad gateway</title> proxy-7.internal.example"
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True)
class TrackingServer:
    """A running server. `folder` has its store, and a file `fault` while it is made to fail."""

    folder: Path
    port: int

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def failing(self, fault: str) -> Iterator[None]:
        """Answer every request with a fault: a status, `hang`, `drip` or `page` (20 MB of HTML)."""
        file = self.folder / "fault"
        file.write_text(fault)
        try:
            yield
        finally:
            file.unlink()


@contextmanager
def tracking_server(folder: Path) -> Iterator[TrackingServer]:
    """Run a server with its store in a folder, and yield it once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = TrackingServer(folder, free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.tracking_server", str(folder), str(server.port)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=folder.joinpath("server.log").open("w"),
    )  # fmt: skip
    try:
        for _ in range(600):
            assert process.poll() is None, folder.joinpath("server.log").read_text()[-2000:]
            if answers(f"{server.uri}/health"):
                break
            time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def dripping() -> Iterator[bytes]:
    for _ in range(600):
        yield b"<"
        time.sleep(0.5)


def with_faults(application: Application, fault_file: Path) -> Application:
    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        fault = fault_file.read_text() if fault_file.exists() else ""
        if not fault:
            return application(environ, start)
        if fault == "hang":
            time.sleep(60)
        status = fault if fault.isdecimal() else "502"
        start(f"{status} Told To", [("Content-Type", "text/html"), ("Retry-After", "3600")])
        if fault == "drip":
            return dripping()
        return [SECRET_PAGE.encode(), *[b"x" * 1_000_000] * (20 if fault == "page" else 0)]

    return answer


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/server.db"
    os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = "mlflow-artifacts:/"
    os.environ["_MLFLOW_SERVER_ARTIFACT_DESTINATION"] = str(folder / "artifacts")
    os.environ["MLFLOW_TRACKING_URI"] = os.environ["_MLFLOW_SERVER_FILE_STORE"]
    from mlflow.server import app
    from mlflow.tracking import MlflowClient
    from werkzeug.serving import make_server

    MlflowClient().search_experiments()  # creates the database's tables
    make_server("127.0.0.1", port, with_faults(app, folder / "fault"), threaded=True).serve_forever()


if __name__ == "__main__":
    main()
