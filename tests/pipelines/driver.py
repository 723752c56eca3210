"""Run the fake pipeline's driver as a program that tests kill and restart while its stages run."""

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
    """A run of the fake pipeline in a folder; its ranker works until `let_go` is called."""

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
        """Return the temporary directory, number and process id of each rank that has started to work."""
        return self.began.read_text().splitlines() if self.began.exists() else []

    def let_go(self) -> None:
        self.hold.touch()

    @contextmanager
    def driver(self, *overrides: str, ignored: bool = False, host: str = "") -> Iterator["subprocess.Popen[str]"]:
        """Start the driver in its own session, and kill it at the end.

        Args:
            overrides: of the run's file. ignored: whether SIGHUP is ignored, as under nohup. host: the host name that
                the driver sees.
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
            # Set in both cases: tests started by nohup would pass SIGHUP on as ignored.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def end(self, *overrides: str) -> "tuple[int, str]":
        """Run the driver to its end; return its exit status and its standard error."""
        with self.driver(*overrides) as process:
            _, err = process.communicate(timeout=PATIENCE_S)
            return process.returncode, err

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
        """Let the stages finish, and kill those that do not."""
        self.let_go()
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        for line in self.ranks():
            try:
                os.kill(int(line.split()[2]), signal.SIGKILL)
            except ProcessLookupError:
                continue


def wait_until(condition: Callable[[], Any], what: str, driver: "subprocess.Popen[str] | None" = None) -> None:
    """Wait until a condition holds; fail if the driver ends before, or after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if driver is not None and driver.poll() is not None:
            raise AssertionError(f"{what}: the driver has ended: {driver.communicate()[1]}")
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
