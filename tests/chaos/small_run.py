"""A small pipeline for tests that kill and restart it, and its result."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from sidestack.infra.manifest import MANIFEST, read_manifest
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.infra.record import HISTORY_FILE

CONFIG = Path(__file__).with_name("small.yaml")
NAME = "chaos"
ROOT = Path(__file__).parents[2]
MACHINE_METRICS = ("samples_per_second", "train_seconds", "peak_memory_bytes")
"""Figures of a comparison that depend on the machine and not on the models."""


@dataclass(frozen=True)
class SmallRun:
    """One run of the small pipeline, which may take several calls of its driver.

    Attributes:
        folder: the folder of the run's files and its MLflow store.
        settings: overrides, such as ``run.launch.ranker.max_restarts=1``.
    """

    folder: Path
    settings: tuple[str, ...] = ()

    @property
    def output(self) -> Path:
        """The file with the output of all calls of the driver."""
        return self.folder / "output.txt"

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the driver in its own session, so that a signal to this process does not reach it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        overrides = (f"run.runs_dir={self.folder / 'runs'}", *self.settings)
        command = [sys.executable, "-m", "sidestack.pipelines.run", "--config", str(CONFIG)]
        environment = {name: value for name, value in os.environ.items() if name != URI_VARIABLE}
        with self.output.open("ab") as output:
            return subprocess.Popen(
                [*command, *(word for one in overrides for word in ("--set", one))],
                cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    def printed(self) -> str:
        """Return the output of all calls of the driver so far."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def steps_logged(self) -> dict[str, int]:
        """Return the last step that each running stage has logged, by the stage's label."""
        steps = {}
        for file in (self.folder / "runs" / NAME).glob(f"*/.*.tmp/{HISTORY_FILE}"):
            with suppress(OSError, ValueError, IndexError, KeyError):  # renamed, or the last line is incomplete
                last = file.read_text(encoding="utf-8").splitlines()[-1]
                steps[file.parents[1].name] = int(json.loads(last)["step"])
        return steps

    def result(self) -> dict[str, Any]:
        """Return the digest of each stage's output, by the stage's label, and the comparison's figures, by path.

        Raises:
            AssertionError: a stage was committed more than once.
        """
        found, labels = dict[str, Any](), set[str]()
        for manifest in sorted((self.folder / "runs" / NAME).glob(f"*/*/{MANIFEST}")):
            label = manifest.parents[1].name
            assert label not in labels, f"{label} was committed twice"
            labels.add(label)
            if label == "compare":
                figures = json.loads((manifest.parent / "comparison.json").read_text(encoding="utf-8"))
                found.update(_figures(figures, label))
            else:
                found[label] = read_manifest(manifest.parent).digest
        return found

    def open_runs(self) -> list[str]:
        """Return the names of runs that the tracking store shows as RUNNING."""
        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder}/runs/mlflow.db")
        experiments = [one.experiment_id for one in client.search_experiments()]
        return [str(run.info.run_name) for run in client.search_runs(experiments, "attributes.status = 'RUNNING'")]


def _figures(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield nested figures with their paths, without `MACHINE_METRICS`."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in MACHINE_METRICS:
                yield from _figures(one, f"{name}/{key}")
    else:
        yield name, value
