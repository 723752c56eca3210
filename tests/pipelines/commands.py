"""A command of `pipelines` as its users run it: in a process of its own, over a file of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.components.golden import ROOT


def run_command(module: str, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a module over `run.yaml` of a folder, where its MLflow store lies, too."""
    return subprocess.run(
        [sys.executable, "-m", module, "--config", str(folder / "run.yaml"), *words],
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
