"""`infra.serve` or `mlflow models serve` as a child process on loopback, and a client with a persistent connection."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Literal

HOST = "127.0.0.1"
Program = Literal["infra.serve", "mlflow models serve"]

_START_SECONDS = 180.0
_REQUEST_SECONDS = 60.0
_STOP_SECONDS = 10.0
_MIB = 2**20


class ScoringServer:
    """A running server, and one connection to it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        """Wrap a process that was just started; `wait_until_ready` waits for it."""
        self._process = process
        self._log = log
        self._connection = HTTPConnection(HOST, port, timeout=_REQUEST_SECONDS)

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: the server exited, or does not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError, HTTPException):
                self._connection.request("GET", "/ping")
                response = self._connection.getresponse()
                response.read()
                if response.status == 200:
                    return
            self._connection.close()
            time.sleep(0.2)
        raise RuntimeError(f"the server did not come up:\n{self._log.read_text(encoding='utf-8')[-2000:]}")

    def post(self, body: bytes, connection: HTTPConnection | None = None) -> tuple[int, Any]:
        """Send a request, and return the status and the JSON of the response.

        Args:
            body: of the request. connection: by default this client's persistent one.
        """
        connection = connection or self._connection
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def connect(self) -> HTTPConnection:
        """Return a new connection for another client."""
        return HTTPConnection(HOST, self._connection.port, timeout=_REQUEST_SECONDS)

    def reconnect(self) -> None:
        """Let the next request open a new connection."""
        self._connection.close()

    def resident_mib(self) -> float:
        """Return the memory of the process with the model, without the launcher that started it."""
        return max(resident_mib(pid) for pid in self.pids() if _serves(pid))

    def pids(self) -> list[int]:
        """Return the running processes: the one with the model, and its launcher if there is one."""
        return _group(self._process.pid)

    def stop(self) -> None:
        """Stop the server and its launcher, and wait until both have exited."""
        self._connection.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)  # a session of its own: see `serving`
            deadline = time.monotonic() + _STOP_SECONDS
            while time.monotonic() < deadline:
                # The launcher exits first; the server, not our child, may still be answering its last request.
                if self._process.poll() is not None and not self.pids():
                    return
                time.sleep(0.05)


@contextlib.contextmanager
def serving(
    model: Path | str, log: Path, program: Program = "infra.serve", options: Sequence[str] = ()
) -> Iterator[ScoringServer]:
    """Serve a model while the block runs.

    Args:
        model: its folder, or a URI such as `models:/name@alias`.
        log: the file for the server's output.
        program: the serving program, with one worker.
        options: further words of its command line.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    # MLflow's launcher looks for uvicorn on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if program == "infra.serve":
        command = ["sidestack.infra.serve", "--model", str(model), "--host", HOST, "--port", str(port)]
    else:
        command = ["mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
        command += ["-h", HOST, "-p", str(port), "-w", "1"]
    command = [sys.executable, "-m", *command, *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PATH": path}, start_new_session=True
        )
    server = ScoringServer(process, port, log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def resident_mib(pid: int) -> float:
    """Return a process's resident memory, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def _group(leader: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == leader:
                found.append(pid)
    return found


def _serves(pid: int) -> bool:
    """Return whether a process is the server; `infra.serve` becomes it, MLflow's launcher starts it."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return any(word.endswith(b"uvicorn") for word in words)
