"""The baseline's output as one more arm of a comparison."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from threadpoolctl import threadpool_limits

from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE
from sidestack.infra.manifest import read_manifest
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.compare import compare
from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.report.config import CompareConfig
from sidestack.ranker.baseline.config import BaselineConfig
from sidestack.ranker.baseline.stage import run_baseline
from tests.pipelines.fabricated import committed, encoder_output, prepare_output, ranker_output
from tests.ranker.baseline.dataset import SPEC, days, with_column, write


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Commit a dataset, the baseline's output on it, and the output of an arm with random predictions."""
    root = tmp_path_factory.mktemp("baseline")
    dataset = committed(root / "dataset", "materialize", lambda staging: write(staging, days(200)), config="m")
    digest = read_manifest(dataset).digest
    config = parse(BaselineConfig, {"max_iter": 10, "min_samples_leaf": 5}, "test")

    def fit(staging: Path) -> None:
        with threadpool_limits(1, user_api="openmp"):
            run_baseline(StageRun(config, {"dataset": dataset}, staging, ALONE, RunLog(staging)))

    baseline = committed(root / "baseline", "baseline", fit, {"dataset": digest}, config="b")
    guessed = pq.read_table(baseline / "predictions")
    for task in SPEC.tasks:
        chance_N = np.random.default_rng(1).uniform(0.2, 0.4, guessed.num_rows).astype(np.float32)
        guessed = with_column(guessed, f"p_{task}", pa.array(chance_N))
    dates = {"train": [str(day) for day in SPEC.train], "held_out": [str(day) for day in SPEC.test]}
    none = ranker_output(root / "none", "none", guessed, summary={"dates": dates}, dataset=digest)
    return {
        "arm.none.0": none, "arm.baseline.0": baseline, "dataset": dataset,
        "encoder.sid": encoder_output(root / "encoder"), "prepare": prepare_output(root / "prepare"),
    }  # fmt: skip


def test_baseline_is_compared_like_an_arm(inputs: dict[str, Path], tmp_path: Path) -> None:
    settings = CompareConfig(resamples=100)
    compare(StageRun(settings, inputs, tmp_path, ALONE, RunLog(tmp_path)))
    found = Comparison.read(tmp_path)
    assert list(found.arms) == ["none", "baseline"] and found.warnings == ()
    arm = found.arms["baseline"]
    gain = arm.tasks["click"].gain("ne", "none")
    assert gain is not None and gain.gain > 0
    assert (arm.sid_table_bytes, arm.table_bytes, arm.feature_bytes_per_row) == (0, 0, 0)
    assert (arm.parameters, arm.flops_per_sample, arm.world_size, arm.roi) == (None, None, None, None)
    assert "baseline" in (tmp_path / "table.txt").read_text()
