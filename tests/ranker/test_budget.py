"""Settings derived by rule: enough steps for a small log, one pass over a large one; configured values win."""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.budget import (
    LARGE_LOG,
    MIN_STEPS,
    STEPS_AN_EPOCH,
    Day,
    decide,
    decisions_message,
    describe_decisions,
    even_days,
    left_to_rule,
    training_days,
    validation_days,
    warmup_steps,
    without_window,
)
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.id_feature import sid_rows
from tests.datasets import joined
from tests.ranker.dataset import SPEC, write_dataset
from tests.ranker.training import config_of

FIRST = date(2024, 1, 1)


def days_of(*rows: int, positives: int | None = None) -> list[Day]:
    """Return days with these numbers of rows; a tenth of them, or `positives`, are clicks."""
    return [
        Day(FIRST + timedelta(days=n), number, {"click": number // 10 if positives is None else positives})
        for n, number in enumerate(rows)
    ]


def config(**training: Any) -> RankerConfig:
    return parse(RankerConfig, {"arm": "none", "training": training}, "test").resolved()


@pytest.mark.parametrize(
    ("rows", "batch", "epochs"),
    [
        (16_000, 64, 8), (50_000, 64, 6), (70_000, 128, 8), (600_000, 1024, 8), (3_000_000, 4096, 6),
        (10_000_000, 4096, 2), (LARGE_LOG, 4096, 1), (10**10, 4096, 1),
    ],
)  # fmt: skip
def test_batch_and_epochs_follow_from_the_rows(rows: int, batch: int, epochs: int) -> None:
    training = decide(config(validation_days=1), even_days(SPEC.train, rows)).training
    assert (training.batch_size, training.epochs) == (batch, epochs)
    if batch > 64:
        assert rows // batch >= STEPS_AN_EPOCH


def test_a_small_log_gets_small_batches_several_epochs_and_a_window() -> None:
    training = decide(config(), days_of(*[5000] * 10)).training
    assert (training.batch_size, training.epochs, training.validation_days) == (64, 6, 1)
    assert 50_000 // training.batch_size * training.epochs >= MIN_STEPS


def test_a_large_log_gets_large_batches_and_one_pass_without_a_window() -> None:
    training = decide(config(), even_days(SPEC.train, LARGE_LOG)).training
    assert (training.batch_size, training.epochs, training.validation_days) == (4096, 1, 0)


def test_without_a_window_there_is_one_epoch() -> None:
    training = decide(config(), days_of(*[5000] * 4)).training
    assert (training.epochs, training.validation_days) == (1, 0)
    training = decide(config(validation_days=0), days_of(*[5000] * 10)).training
    assert (training.epochs, training.validation_days) == (1, 0)


def test_configured_values_are_kept() -> None:
    days = days_of(*[5000] * 10)
    training = decide(config(epochs=3, batch_size=1000, lanes=8), days).training
    assert (training.batch_size, training.epochs, training.validation_days) == (1000, 3, 0)
    training = decide(config(epochs=3, validation_days=2), days).training
    assert (training.batch_size, training.epochs, training.validation_days) == (64, 3, 2)
    training = decide(config(validation_days=3), days).training
    assert (training.epochs, training.validation_days) == (6, 3)


def test_derived_settings_are_stable_and_the_same_for_every_arm() -> None:
    days = days_of(*[5000] * 10)
    decided = decide(config(), days)
    assert decide(decided, days) == decided
    side = parse(RankerConfig, {"arm": "side"}, "test").resolved()
    assert decide(side, days).training == decided.training


def test_steps_share_applies_to_the_maximum_epochs_and_needs_no_window() -> None:
    training = decide(config(steps_share=0.25), days_of(*[5000] * 10)).training
    assert (training.epochs, training.validation_days) == (6, 0)


def test_batch_size_is_a_multiple_of_the_lanes() -> None:
    assert decide(config(lanes=6), days_of(100)).training.batch_size == 66


@pytest.mark.parametrize(
    ("days", "window"),
    [
        (days_of(*[2000] * 4), 0),  # too few dates
        (days_of(*[2000] * 5), 1),
        (days_of(*[2000] * 40), 4),
        (days_of(*[2000] * 20, positives=30), 4),  # 100 clicks take four days
        (days_of(*[2000] * 20, positives=10), 0),  # a quarter of the dates is not enough
        (days_of(*[10] * 9, 2000), 0),  # nearly all rows have the newest date
        ([Day(FIRST + timedelta(days=n), 100, {}) for n in range(5)], 1),  # positives are unknown
    ],
)
def test_validation_window_is_the_newest_tenth_when_it_is_informative(days: list[Day], window: int) -> None:
    assert validation_days(days) == window


def test_window_includes_the_dates_without_events_between_its_dates() -> None:
    days = [Day(FIRST + timedelta(days=3 * n), 1000, {"click": 60}) for n in range(20)]
    window = validation_days(days)
    assert window == 4  # two dates with events, three days apart
    dates = (days[0].date, days[-1].date)
    found = without_window(dates, decide(config(), days).training)
    assert found is not None
    before, held = found
    assert (held[0], before[1]) == (days[-2].date, days[-2].date - timedelta(days=1))


def test_a_window_of_all_dates_is_refused() -> None:
    two, four = (decide(config(validation_days=days), days_of(100)).training for days in (2, 4))
    first, last = date(2024, 1, 1), date(2024, 1, 4)
    assert without_window(SPEC.train, two) == ((first, date(2024, 1, 2)), (date(2024, 1, 3), last))
    assert without_window(SPEC.train, config_of("none").training) is None
    with pytest.raises(ConfigError, match=r"ranker\.training\.validation_days=4: training is 2024-01-01 to 2024-01-04"):
        without_window(SPEC.train, four)


@pytest.mark.parametrize(
    ("num_ids", "can_occur", "max_rows", "rows"),
    [
        (243, 2000, None, 243),  # a row for each id
        (3**15, 2000, None, 8192),
        (3**15, 2048, None, 8192),
        (3**15, 2049, None, 16384),
        (3**15, 10**9, None, 2**20),
        (3**15, 2000, 1000, 1000),
        (243, 2000, 1000, 243),
    ],
)
def test_rows_of_sid_tables_follow_from_the_ids_that_can_occur(
    num_ids: int, can_occur: int, max_rows: int | None, rows: int
) -> None:
    assert sid_rows(num_ids, can_occur, max_rows) == rows


def test_warm_up_is_a_share_of_the_steps_unless_a_number_is_configured() -> None:
    assert warmup_steps(config().training, 4000) == 200
    assert warmup_steps(config(warmup_share=0.1).training, 4000) == 400
    assert warmup_steps(config(warmup_steps=7).training, 4000) == 7


def test_rows_and_positives_are_read_from_the_snapshot_without_opening_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=64)
    clicks = [sum(joined(path, ["click"], day.date, day.date)["click"].to_pylist()) for day in days_of(*[64] * 4)]
    monkeypatch.setattr("sidestack.infra.parquet.open_parquet", lambda *_: pytest.fail("a file was opened"))
    days = training_days(read_dataset(path), SPEC.train)
    assert [(day.date, day.rows) for day in days] == [(FIRST + timedelta(days=n), 64) for n in range(4)]
    assert [dict(day.positives) for day in days] == [{"click": number} for number in clicks]


def test_log_names_decided_settings_but_not_configured_ones() -> None:
    days = days_of(*[5000] * 10)
    asked = config()
    assert decisions_message(asked, decide(asked, days), days, hashed_rows=8192) == (
        "ranker: by rule, from 50,000 rows of 10 dates: batch_size=64 (781 steps an epoch), epochs=6 at most,"
        " validation_days=1, max_rows=8192"
    )
    written = config_of("none")
    assert left_to_rule(written) == []
    assert decisions_message(written, decide(written, days), days, hashed_rows=0) == ""
    found = describe_decisions(asked, decide(asked, days), days, steps=4000)
    assert found["by_rule"] == ["batch_size", "epochs", "validation_days", "warmup_steps", "log_every"]
    assert (found["positives"], found["warmup_steps"], found["log_every"]) == ({"click": 5000}, 200, 100)
