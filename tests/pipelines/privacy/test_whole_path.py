"""No raw id in any file or output, from the raw log to the exported ranker, including MLflow's store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.prepare.log.masking import Masking
from tests.components.golden import ROOT
from tests.datasets import content
from tests.pipelines.privacy.persons import ENV, KEY, leaks, persons_config, product, secrets, write_persons
from tests.ranker.training import SMALL

RUN_S = 900


def run(folder: Path, module: str, *words: str) -> str:
    """Run a module, and return its standard output and error."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env={
            **os.environ, ENV: KEY, "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        },
        cwd=folder, capture_output=True, text=True, timeout=RUN_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def write_config(folder: Path) -> None:
    one = {"ranks": 1, "cpu": 1}
    values = {
        "prepare": persons_config(folder / "log") | {"cache_dir": str(folder / "runs/cache")},
        "encoder": {"training": {"epochs": 1, "batch_size": 16, "lanes": 2}},
        "ranker": SMALL,
        "baseline": {"enabled": False},
        "run": {
            "name": "persons", "runs_dir": str(folder / "runs"), "replicates": 1, "arms": ["none", "side"], "jobs": 1,
            "launch": {name: one for name in ("prepare", "encoder", "materialize", "ranker", "compare")},
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.whole
def test_no_raw_id_is_in_any_output_from_prepare_to_export(tmp_path: Path) -> None:
    events = write_persons(tmp_path / "log", days=8, items=90, users=30, a_day=72)
    write_config(tmp_path)
    output = run(tmp_path, "sidestack.pipelines.run", "--config", "run.yaml")
    encoder, dataset, ranker = (made_by(tmp_path, name) for name in ("encoder", "materialize", "ranker-side"))
    inputs = ("--model", str(ranker), "--dataset", str(dataset), "--input", f"encoder.sid={encoder}")
    output += run(tmp_path, "sidestack.ranker.export", *inputs, "--out", "exported")
    masked = run(
        tmp_path, "sidestack.pipelines.privacy.mask", "--config", "run.yaml", "--kind", "item", product("i01")
    ).strip()
    assert masked == Masking(KEY.encode()).masked("item", product("i01"))
    assert masked in content(read_dataset(dataset), "items")["item_key"].to_pylist()

    (tmp_path / "log").rename(tmp_path.with_name(f"{tmp_path.name}-log"))
    assert leaks(tmp_path, [*secrets(events), KEY]) == []
    assert not [text for text in secrets(events) if text in output]
    assert "mlflow.db" in dict(leaks(tmp_path, [ENV]))  # the search works: the name of the key's variable is stored


def made_by(folder: Path, stage: str) -> Path:
    """Return the output that a stage committed."""
    (found,) = {file.parent for file in (folder / "runs/persons").glob(f"{stage}/*/manifest.json")}
    return found
