"""Run a command of `pipelines` as users do: in its own process, on its own file."""

import os
import subprocess
import sys
from pathlib import Path

from tests.components.golden import ROOT


def run_command(module: str, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a module on a folder's `run.yaml`, with the MLflow store in the same folder."""
    return subprocess.run(
        [sys.executable, "-m", module, "--config", str(folder / "run.yaml"), *words],
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
