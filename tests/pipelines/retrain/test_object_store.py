"""Retraining with its runs in an object store, each night on a machine with an empty mirror."""

import shutil
from pathlib import Path

import pytest

from sidestack.infra.errors import StageError
from sidestack.infra.manifest import is_committed
from sidestack.infra.remote.urls import local_path, mirror
from sidestack.pipelines.retrain.ledger import CYCLES, PLAN_FILE, Ledger
from tests.object_store import Bucket
from tests.pipelines.retrain.nights import config_in, run_nights


@pytest.mark.whole
def test_each_night_continues_on_another_machine(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = config_in(tmp_path)
    runs = local_path(f"{bucket.url}/runs")
    config = config.model_copy(update={"run": config.run.model_copy(update={"runs_dir": runs})})
    (first,) = run_nights(config, range(1))
    assert first.outcome.promoted, first.outcome.gates
    shutil.rmtree(mirror())
    (second,) = run_nights(config, range(1, 2))
    assert second.plan.number == 2 and second.plan.champion == 1
    assert is_committed(runs / "nights" / second.outcome.candidate.ranker)

    behind = Ledger(runs / "nights")  # read on this machine before another machine begins a cycle
    bucket.put(f"runs/nights/{CYCLES}/0003/{PLAN_FILE}", b"{}")
    with pytest.raises(StageError, match="another machine began this cycle"):
        behind.open(second.plan.model_copy(update={"number": 3}))
