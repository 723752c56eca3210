"""The fake pipeline's driver as a program that is killed, and started again, while its stages run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.components.golden import ROOT

PATIENCE_S = 240


class Run:
    """A run of the fake pipeline in a folder, whose ranker works until `let_go`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.hold = folder / "hold"
        self.began = folder / "hold.began"
        values = {
            "prepare": {"text": "raw"},
            "ranker": {"hold": str(self.hold)},
            "run": {"name": "fake", "runs_dir": str(folder / "runs"), **settings},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(values))

    @property
    def ranker(self) -> Path:
        return self.folder / "runs/fake/ranker"

    @property
    def record(self) -> Path:
        (file,) = self.ranker.glob("*.job.json")
        return file

    def ranks(self) -> list[str]:
        """Return of every rank that began to work its temporary directory, number and process id."""
        return self.began.read_text().splitlines() if self.began.exists() else []

    def let_go(self) -> None:
        self.hold.touch()

    @contextmanager
    def driver(self, *overrides: str, ignored: bool = False, host: str = "") -> Iterator["subprocess.Popen[str]"]:
        """Start the driver in a session of its own; it is killed at the end.

        Args:
            overrides: of its file. ignored: SIGHUP is, as under nohup. host: what the machine is called meanwhile.
        """
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/runs/mlflow.db",
            "PYTHONPATH": str(ROOT),
        }
        words = [word for override in overrides for word in ("--set", override)]
        command = [sys.executable, "-m", "tests.pipelines.fake_plan", "--config", str(self.folder / "run.yaml"), *words]
        if host:
            command = ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh", *command]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
            # Set either way: tests that were started by nohup would hand SIGHUP on as ignored.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def end(self, *overrides: str) -> "tuple[int, str]":
        """Run the driver to its end; return its status and what it told."""
        with self.driver(*overrides) as process:
            _, told = process.communicate(timeout=PATIENCE_S)
            return process.returncode, told

    def processes(self) -> list[str]:
        """Return the command lines of this run's stages that are alive."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = file.read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(self.folder) in line and "fake_stage" in line:
                found.append(line)
        return found

    def end_all(self) -> None:
        """Let the stages end, or kill them."""
        self.let_go()
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        for line in self.ranks():
            try:
                os.kill(int(line.split()[2]), signal.SIGKILL)
            except ProcessLookupError:
                continue


def wait_until(is_so: Callable[[], Any], what: str, driver: "subprocess.Popen[str] | None" = None) -> None:
    """Wait for what must come while a driver runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        if driver is not None and driver.poll() is not None:
            raise AssertionError(f"{what}: the driver has ended: {driver.communicate()[1]}")
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
