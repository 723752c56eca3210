"""Trainings whose tasks are trained and measured on dates of their own: a label counts only there."""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestack.infra.config import parse
from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.config import Dates, HoldoutConfig
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.reader import Split, to_ranker_batch
from sidestack.ranker.spans import SpannedRows, spans_of
from tests.distributed import run_distributed
from tests.ranker.dataset import SPEC, write_dataset
from tests.ranker.test_resume import predictions, summary, train_ranker
from tests.ranker.training import ONE, config_of

ROWS = 128
"""Rows per date."""
DAYS = [SPEC.train[0] + timedelta(days=n) for n in range(6)]
HOLDOUT: dict[str, Any] = {
    "kind": "dates",
    "learned": {"click": [DAYS[3], DAYS[4]], "conversion": [DAYS[0], DAYS[0]]},
    "measured": {"click": [DAYS[5], DAYS[5]], "conversion": [DAYS[1], DAYS[1]]},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("spans") / "dataset", rows_a_day=ROWS, impressions=4)


days = st.integers(0, 20).map(lambda n: date(2024, 2, 20) + timedelta(days=n))


@given(dates=st.tuples(days, days), labels=st.dictionaries(st.sampled_from("abc"), st.tuples(days, days)))
def test_spans_name_the_tasks_of_every_date(dates: Dates, labels: dict[str, Dates]) -> None:
    found: dict[date, frozenset[str]] = {}
    for (first, last), tasks in spans_of(dates, labels):
        assert first <= last
        for n in range((last - first).days + 1):
            assert found.setdefault(first + timedelta(days=n), tasks) is tasks, "a date belongs to one span"
    expected = {}
    for n in range(30):
        day = date(2024, 2, 15) + timedelta(days=n)
        of_day = {task for task, (first, last) in labels.items() if first <= day <= last}
        if of_day and dates[0] <= day <= dates[1]:
            expected[day] = frozenset(of_day)
    assert found == expected
    assert list(found) == sorted(found)


def weights_by_day(split: Split) -> dict[date, tuple[float, float]]:
    """Return the sums of the label weights of click and conversion, by date."""
    config = config_of("none", training={"batch_size": 32, "lanes": 1})
    reader = split.open(config.training, ONE, is_training=False)
    found: dict[date, tuple[float, float]] = {}
    for batch in reader.batches(range(1)):
        converted = to_ranker_batch(batch, split.features)
        day_B = [time.date() for time in batch.rows.column("event_time").to_pylist()]
        for day, row in zip(day_B, converted.weights_BT.tolist(), strict=True):
            click, conversion = found.get(day, (0.0, 0.0))
            found[day] = (click + row[0], conversion + row[1])
    return found


def test_label_weights_follow_the_dates_of_each_task(dataset: Path) -> None:
    opened = read_dataset(dataset)
    config = config_of("none", holdout=HOLDOUT)
    fitting, held_out = open_splits(opened, config)
    assert isinstance(fitting.rows(), SpannedRows)
    every = weights_by_day(Split((DAYS[0], DAYS[5]), opened, fitting.features))
    learned, measured = weights_by_day(fitting), weights_by_day(held_out)
    assert learned == {
        DAYS[0]: (0.0, every[DAYS[0]][1]), DAYS[3]: (every[DAYS[3]][0], 0.0), DAYS[4]: (every[DAYS[4]][0], 0.0),
    }  # fmt: skip
    assert measured == {DAYS[1]: (0.0, every[DAYS[1]][1]), DAYS[5]: (every[DAYS[5]][0], 0.0)}
    assert all(click == ROWS and conversion > 0 for click, conversion in every.values())


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_uses_and_predicts_only_the_dates_of_each_task(dataset: Path, tmp_path: Path, world_size: int) -> None:
    out = tmp_path / "out"
    run_distributed(train_ranker, dataset, out, "none", None, HOLDOUT, world_size=world_size)
    found = predictions(out)
    assert found.num_rows == 2 * ROWS
    day = pc.cast(found["event_time"], "date32").to_pylist()
    assert {one for one, label in zip(day, found["click"].to_pylist(), strict=True) if label is not None} == {DAYS[5]}
    assert {one for one, label in zip(day, found["conversion"].to_pylist(), strict=True) if label is not None} == {
        DAYS[1]
    }
    report = summary(out)
    assert report["tasks"]["click"]["num"] == ROWS
    assert report["budget"]["rows"] == 3 * ROWS
    assert report["labels"]["train"]["conversion"] == [str(DAYS[0]), str(DAYS[0])]


def test_task_without_dates_is_neither_trained_nor_measured(dataset: Path, tmp_path: Path, world: World) -> None:
    """Only clicks have dates; rows of conversion dates are not read."""
    click = {"click": HOLDOUT["learned"]["click"]}
    measured = {"click": HOLDOUT["measured"]["click"]}
    train_ranker(world, dataset, tmp_path / "out", "none", holdout={**HOLDOUT, "learned": click, "measured": measured})
    report = summary(tmp_path / "out")
    assert report["tasks"]["conversion"]["num"] == 0
    assert report["budget"]["rows"] == 2 * ROWS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learned": {}}, "learned and measured go with kind=dates"),
        ({"kind": "test"}, "learned and measured go with kind=dates"),
        ({"learned": {"click": [DAYS[4], DAYS[3]]}}, "learned.click: 2024-01-05 is after 2024-01-04"),
        ({"measured": {"click": [DAYS[4], DAYS[5]]}}, "2024-01-05 is not after the last date learned, 2024-01-05"),
    ],
)
def test_invalid_dates_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(HoldoutConfig, {**HOLDOUT, **change}, "test")


def test_an_unknown_task_and_one_loss_over_all_tasks_are_refused(dataset: Path) -> None:
    config = config_of("none", holdout={**HOLDOUT, "learned": {"order": [DAYS[0], DAYS[1]]}})
    with pytest.raises(ConfigError, match="task 'order' is unknown; tasks are click, conversion"):
        open_splits(read_dataset(dataset), config)
    with pytest.raises(ConfigError, match="entire_space learns all tasks of a row"):
        config_of("none", holdout=HOLDOUT, training={"children": "entire_space"})
