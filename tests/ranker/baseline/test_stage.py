"""The baseline's stage on one process: training rows, predictions and summary."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import DataError
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.ranker.baseline.config import BaselineConfig
from sidestack.ranker.baseline.stage import run_baseline
from sidestack.ranker.metrics import prediction_schema
from tests.datasets import joined
from tests.ranker.baseline.dataset import SPEC, days, with_column, write
from tests.ranker.dataset import all_days

SMALL = {"max_iter": 20, "min_samples_leaf": 5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("baseline") / "dataset", days(400))


def run(dataset: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Run the stage's body and return its summary."""
    out.mkdir()
    config = parse(BaselineConfig, {**SMALL, **settings}, "test")
    log = RunLog.open(0, "baseline", out, {}, {}, "", None)
    run_baseline(StageRun(config, {"dataset": dataset}, out, ALONE, log))
    log.finish("FINISHED")
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def done(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "out"
    run(dataset, out)
    return out


def predicted(out: Path) -> pa.Table:
    return pq.read_table(out / "predictions").sort_by("row")


def test_every_held_out_row_is_predicted_once_with_its_labels(dataset: Path, done: Path) -> None:
    found, events = predicted(done), joined(dataset, None, *SPEC.test)
    assert found.schema.equals(prediction_schema(SPEC.tasks))
    assert found["row"].to_pylist() == list(range(events.num_rows))
    for name in ("user_id", "item_id", "event_time", "click"):
        assert found[name].to_pylist() == events[name].to_pylist()
    pairs = zip(events["click"].to_pylist(), events["conversion"].to_pylist(), strict=True)
    assert found["conversion"].to_pylist() == [label if click else None for click, label in pairs]
    summary = json.loads((done / "summary.json").read_text())
    assert summary["arm"] == "baseline" and summary["held_out_rows"] == events.num_rows
    assert summary["tasks"]["click"]["auc"] > 0.5  # clicks depend on the item, whose click rate is a feature


def test_each_task_trains_on_rows_with_a_known_label(dataset: Path, done: Path) -> None:
    events = joined(dataset, ["click", "conversion"], *SPEC.train).to_pydict()
    pairs = list(zip(events["click"], events["conversion"], strict=True))
    judged = sum(click == 1 and label is not None for click, label in pairs)
    assert 0 < judged < sum(events["click"])  # some labels are unknown
    assert json.loads((done / "summary.json").read_text())["train_rows"] == {"click": len(pairs), "conversion": judged}


def test_rows_with_unknown_labels_are_not_trained_on(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unknown = {
        day: with_column(rows, "conversion", pa.nulls(rows.num_rows, pa.int8())) for day, rows in days(400).items()
    }
    summary = run(write(tmp_path / "unknown", unknown), tmp_path / "out")
    assert summary["train_rows"]["conversion"] == 0 and summary["tasks"]["conversion"]["num"] == 0
    assert set(predicted(tmp_path / "out")["p_conversion"].to_pylist()) == {0.5}
    assert "conversion: 0 training rows without a distinguishing feature; 0.5 for every row" in capfd.readouterr().err


def test_predictions_are_reproducible_and_depend_on_the_seed(dataset: Path, done: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "again")
    run(dataset, tmp_path / "other", seed=1)
    assert predicted(tmp_path / "again").equals(predicted(done))
    assert not predicted(tmp_path / "other")["p_click"].equals(predicted(done)["p_click"])


def test_rows_above_the_limit_are_sampled_and_logged(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = run(dataset, tmp_path / "out", max_train_rows=400)
    kept = summary["train_rows"]["click"]
    assert 300 < kept < 500
    assert f"learns from {kept} rows, a sample of 1,600: baseline.max_train_rows" in capfd.readouterr().err
    assert summary["held_out_rows"] == 800


def test_validation_reads_no_test_date(dataset: Path, tmp_path: Path) -> None:
    holdout = {"kind": "validation", "validation_days": 1}
    summary = run(dataset, tmp_path / "out", holdout=holdout)
    assert summary["dates"]["held_out"] == [SPEC.train[1].isoformat()] * 2
    known = {day: rows for day, rows in days(400).items() if day <= SPEC.train[1]}
    run(write(tmp_path / "known", known), tmp_path / "without", holdout=holdout)
    assert predicted(tmp_path / "without").equals(predicted(tmp_path / "out"))


def test_the_number_of_trees_is_chosen_on_the_latest_rows(dataset: Path, tmp_path: Path) -> None:
    """Labels inverted on the last training date make every tree a step in the wrong direction."""
    turned = {}
    for day, rows in days(400).items():
        click_N = np.arange(rows.num_rows) % 2 if day != SPEC.train[1] else 1 - np.arange(rows.num_rows) % 2
        rows = with_column(rows, "click", pa.array(click_N.astype(np.int8)))
        rows = with_column(rows, "rank", pa.array((np.arange(rows.num_rows) % 2).astype(np.float32)))
        turned[day] = with_column(rows, "conversion", pa.nulls(rows.num_rows, pa.int8()))
    summary = run(write(tmp_path / "turned", turned), tmp_path / "out", stopping_share=0.25)
    assert summary["trees"]["click"] == 1


def test_identical_rows_are_predicted_by_their_smoothed_rate(tmp_path: Path) -> None:
    alike = {}
    for day, rows in days().items():
        rows = rows.take(pa.array(np.zeros(60, np.int64)))
        for name, values in (("click", [1, 0, 0] * 20), ("conversion", [None] * 60)):
            rows = with_column(rows, name, pa.array(values, pa.int8()))
        alike[day] = with_column(rows, "request_id", pa.array(np.arange(60)))
    holdout = {"kind": "validation", "validation_days": 3}  # leaves one training date, without earlier dates
    summary = run(write(tmp_path / "alike", alike), tmp_path / "out", holdout=holdout)
    assert summary["features"] == [] and summary["train_rows"]["click"] == 60
    assert set(predicted(tmp_path / "out")["p_click"].to_pylist()) == {np.float32(21 / 62)}


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    known = {day: rows for day, rows in days().items() if day < all_days()[4]}
    with pytest.raises(DataError, match="the snapshot has no events from 2024-01-05 to 2024-01-06"):
        run(write(tmp_path / "known", known), tmp_path / "out")
