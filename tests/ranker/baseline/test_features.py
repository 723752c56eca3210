"""Features of the baseline, compared with a slow reference, and their independence of later rows."""

import math
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.baseline.counts import SMOOTHING
from sidestack.ranker.baseline.features import RowFeatures
from tests.ranker.baseline.dataset import SPEC, brands, days, with_column, write
from tests.ranker.dataset import all_days, items

WINDOW = (SPEC.train[0], SPEC.test[1])
DAYS = days()
CHANGED = all_days()[2]


def features(path: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return all rows, and their features by name."""
    blocks = list(RowFeatures(read_dataset(path), SPEC.tasks).read(WINDOW))
    rows = [row for table, _ in blocks for row in table.to_pylist()]
    return rows, {name: np.concatenate([found[name] for _, found in blocks]) for name in blocks[0][1]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    return features(write(tmp_path_factory.mktemp("features") / "plain", DAYS))


def counted_by(row: dict[str, Any], brand: list[int | None]) -> dict[str, int | None]:
    topics = row["topics"]
    return {
        "user": row["user_id"],
        "item": row["item_id"],
        "category.brand": brand[row["item_id"]],
        "sparse.topics": topics[0] if topics else None,
    }


def test_counts_match_a_slow_reference(plain: tuple[list[dict[str, Any]], dict[str, np.ndarray]]) -> None:
    rows, found = plain
    brand = brands().to_pylist()
    checked = Counter[str]()
    for place, row in enumerate(rows):
        if place % 7:
            continue
        day = row["event_time"].date()
        shown = clicks = [one for one in rows if one["event_time"].date() < day]
        orders = [one for one in shown if one["event_time"].date() + timedelta(days=2) < day]
        orders = [one for one in orders if one["click"] == 1 and one["conversion"] is not None]
        for group, own in counted_by(row, brand).items():
            mine = {name: [one for one in of if counted_by(one, brand)[group] == own] for name, of in
                    (("shown", shown), ("click", clicks), ("conversion", orders))}  # fmt: skip
            expected = {f"{group}.log_impressions": math.log1p(len(mine["shown"]))}
            for task, every in (("click", clicks), ("conversion", orders)) if group != "sparse.topics" else ():
                positives = sum(one[task] for one in mine[task])
                overall = sum(one[task] for one in every) / len(every) if every else math.nan
                expected[f"{group}.log_{task}"] = math.log1p(positives)
                expected[f"{group}.rate_{task}"] = (positives + SMOOTHING * overall) / (len(mine[task]) + SMOOTHING)
            for name, value in expected.items():
                value = math.nan if own is None else value
                assert found[name][place] == pytest.approx(value, rel=1e-6, nan_ok=True), (name, row)
                checked[name] += not math.isnan(value) and value > 0
    assert len(checked) == 3 * 5 + 1 and min(checked.values()) > 3  # the reference was not all zeros


def test_context_and_history_match_a_slow_reference(
    plain: tuple[list[dict[str, Any]], dict[str, np.ndarray]],
) -> None:
    rows, found = plain
    vectors = {
        name: [None if one is None else np.array(one, np.float64) for one in items()[name].to_pylist()]
        for name in SPEC.embeddings
    }
    for place, row in enumerate(rows):
        own, history = row["item_id"], row["history_item_ids"]
        expected: dict[str, float] = {
            "dense.rank": row["rank"], "dense.price": row["price"], "sparse.slot.0": row["slot"][0],
            "hour": row["event_time"].hour, "weekday": row["event_time"].weekday(),
            "history.length": len(history), "history.times_item": history.count(own), "history.days_since": math.nan,
        }  # fmt: skip
        if history:
            expected["history.days_since"] = (row["event_time"] - row["history_times"][-1]) / timedelta(days=1)
        for name, of_item in vectors.items():
            known = [unit(of_item[one]) for one in history if of_item[one] is not None]
            newest = of_item[history[-1]] if history else None
            expected[f"{name}.to_mean"] = cosine(of_item[own], np.mean(known, axis=0) if known else None)
            expected[f"{name}.to_newest"] = cosine(of_item[own], newest)
        for name, value in expected.items():
            assert found[name][place] == pytest.approx(value, rel=1e-3, abs=2e-3, nan_ok=True), (name, row)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def cosine(one: np.ndarray | None, other: np.ndarray | None) -> float:
    return math.nan if one is None or other is None else float(unit(one) @ unit(other))


def flipped(rows: pa.Table, task: str) -> pa.Table:
    """Return rows with inverted labels: the conversions of clicked rows, or the clicks, without conversions."""
    if task == "conversion":
        clicked = pc.equal(rows["click"], 1)
        return with_column(rows, task, pc.cast(pc.and_(clicked, pc.equal(pc.fill_null(rows[task], 0), 0)), pa.int8()))
    none = pa.array(np.zeros(rows.num_rows, np.int8))
    turned = pc.cast(pc.equal(rows["click"], 0), pa.int8())
    return with_column(with_column(rows, "conversion", none), "click", turned)


def other_items(rows: pa.Table) -> pa.Table:
    return with_column(rows, "item_id", pa.array((rows["item_id"].to_numpy() + 1) % SPEC.num_items))


@pytest.mark.parametrize(
    ("change", "seen_after"),
    [
        (lambda rows: flipped(rows, "click"), 1),
        (lambda rows: flipped(rows, "conversion"), 3),  # two days of follow-up, and the day itself
        (other_items, 0),
    ],
    ids=["clicks", "conversions", "items"],
)
def test_change_affects_features_only_after_it_is_known(
    plain: tuple[list[dict[str, Any]], dict[str, np.ndarray]],
    tmp_path: Path,
    change: Callable[[pa.Table], pa.Table],
    seen_after: int,
) -> None:
    """A date's labels do not change one byte of the features of its rows and of earlier rows."""
    rows, before = plain
    _, after = features(write(tmp_path / "changed", {**DAYS, CHANGED: change(DAYS[CHANGED])}))
    known_on = datetime.combine(CHANGED + timedelta(days=seen_after), time())
    is_before_N = np.array([row["event_time"] < known_on for row in rows])
    assert before.keys() == after.keys()
    for name, values_N in before.items():
        assert values_N[is_before_N].tobytes() == after[name][is_before_N].tobytes(), name
    assert any(
        not np.array_equal(values_N[~is_before_N], after[name][~is_before_N], equal_nan=True)
        for name, values_N in before.items()
    )


def test_features_do_not_depend_on_later_dates(
    plain: tuple[list[dict[str, Any]], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    shorter: dict[date, pa.Table] = {day: rows for day, rows in DAYS.items() if day <= CHANGED}
    rows, found = features(write(tmp_path / "shorter", shorter))
    for name, values_N in plain[1].items():
        assert values_N[: len(rows)].tobytes() == found[name].tobytes(), name
