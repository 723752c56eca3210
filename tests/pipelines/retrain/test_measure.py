"""Metrics of candidate and champion on each task's dates, in total and by day."""

from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.infra.errors import DataError
from sidestack.pipelines.retrain.config import GatesConfig
from sidestack.pipelines.retrain.measure import CANDIDATE, CHAMPION, measure
from sidestack.ranker.config import Dates
from sidestack.ranker.metrics import normalized_entropy, prediction_schema
from sidestack.ranker.statistics import log_loss

FIRST = date(2024, 5, 1)
ROWS = 400
"""Rows of a date."""
DAYS = 4
TASKS = ("click", "conversion")
LABELS: dict[str, Dates] = {
    "click": (FIRST + timedelta(days=2), FIRST + timedelta(days=3)), "conversion": (FIRST, FIRST),
}  # fmt: skip


def predictions(path: Path, noise: float, first_row: int = 0) -> pa.Table:
    """Write predictions of the same rows in two unordered files; less noise makes them better."""
    rng, own = np.random.default_rng(3), np.random.default_rng(int(noise * 100))
    num = ROWS * DAYS
    logit_N = rng.normal(-1.0, 1.5, num)
    labels = {task: (rng.random(num) < 1 / (1 + np.exp(-logit_N))).astype(np.int8) for task in TASKS}
    p_N = (1 / (1 + np.exp(-logit_N - own.normal(0, noise, num)))).astype(np.float32)
    begin = datetime(FIRST.year, FIRST.month, FIRST.day)
    times = [begin + timedelta(days=n // ROWS, minutes=n % ROWS) for n in range(num)]
    rows = pa.table(
        [
            pa.array(np.arange(num) + first_row), pa.array(rng.integers(0, 60, num)), pa.array(rng.integers(0, 9, num)),
            pa.array(times, pa.timestamp("us")), *(pa.array(labels[task]) for task in TASKS), pa.array(p_N),
            pa.array(p_N),
        ],
        schema=prediction_schema(TASKS),
    )  # fmt: skip
    (path / "predictions").mkdir(parents=True)
    half = num // 2
    pq.write_table(rows.slice(half), path / "predictions/part-00000.parquet")
    pq.write_table(rows.slice(0, half), path / "predictions/part-00001.parquet")
    return rows


def slow_ne(rows: pa.Table, task: str, dates: Dates) -> float:
    """Compute the NE of a range of dates row by row."""
    loss, positives, num = 0.0, 0, 0
    for row in rows.to_pylist():
        if dates[0] <= row["event_time"].date() <= dates[1]:
            loss += log_loss(np.array([row[task]]), np.array([row[f"p_{task}"]]))[0]
            positives, num = positives + row[task], num + 1
    return normalized_entropy(loss, num, positives)


def test_each_task_is_measured_on_its_dates(tmp_path: Path) -> None:
    rows = {
        CANDIDATE: predictions(tmp_path / CANDIDATE, noise=0.1),
        CHAMPION: predictions(tmp_path / CHAMPION, noise=1.0),
    }
    outputs = {model: tmp_path / model for model in rows}
    found = measure(outputs, LABELS, GatesConfig(), tmp_path)
    for model, table in rows.items():
        for task, dates in LABELS.items():
            assert found.models[model][task]["ne"] == pytest.approx(slow_ne(table, task, dates), rel=1e-6)
    assert found.tasks["click"].rows == 2 * ROWS and found.tasks["conversion"].rows == ROWS
    gain = found.tasks["click"].gain
    assert gain is not None
    expected = 1 - slow_ne(rows[CANDIDATE], "click", LABELS["click"]) / slow_ne(
        rows[CHAMPION], "click", LABELS["click"]
    )
    assert gain[0] == pytest.approx(expected, rel=1e-6) and gain[1] < gain[0] < gain[2]
    by_day = {(row["model"], row["task"], row["date"]): row for row in found.by_day}
    assert {key[2] for key in by_day} == {str(FIRST), str(FIRST + timedelta(days=2)), str(FIRST + timedelta(days=3))}
    day = FIRST + timedelta(days=3)
    of_day = by_day[CHAMPION, "click", str(day)]
    assert of_day["num"] == ROWS
    assert of_day["ne"] == pytest.approx(slow_ne(rows[CHAMPION], "click", (day, day)), rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CANDIDATE, CHAMPION], "no temporary file is left"


def test_models_with_different_rows_are_not_compared(tmp_path: Path) -> None:
    predictions(tmp_path / CANDIDATE, noise=0.1)
    predictions(tmp_path / CHAMPION, noise=1.0, first_row=7)
    with pytest.raises(DataError, match="cannot be paired"):
        measure({model: tmp_path / model for model in (CANDIDATE, CHAMPION)}, LABELS, GatesConfig(), tmp_path)


def test_a_champion_alone_is_measured_without_a_gain(tmp_path: Path) -> None:
    predictions(tmp_path / CHAMPION, noise=1.0)
    found = measure({CHAMPION: tmp_path / CHAMPION}, LABELS, GatesConfig(), tmp_path)
    assert found.tasks["click"].gain is None and list(found.models) == [CHAMPION]
