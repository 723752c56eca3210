"""Rows of ids in tables of bounded size: a slow reference over nights, the bound, and rows that stay in place."""

from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import numpy as np
import pytest

from sidestack.infra.errors import ConfigError
from sidestack.ranker.admission import NEVER, IdRows, Integers, reassigned_rows
from sidestack.ranker.config import AdmissionConfig
from tests.ranker.training import config_with

FIRST_DAY = date(2024, 1, 1)
SMALL = AdmissionConfig(min_count=3, max_age_days=4, max_rows=20, fallback_rows=6)


@dataclass
class Reference:
    """Reference implementation of the admission rules, id by id."""

    settings: AdmissionConfig
    row: dict[int, int] = field(default_factory=dict)
    """Row of each id that has one of its own."""
    count: dict[int, int] = field(default_factory=dict)
    last_seen: dict[int, date] = field(default_factory=dict)

    def night(self, day: date, seen: list[int]) -> None:
        for id in seen:
            self.count[id] = self.count.get(id, 0) + 1
            self.last_seen[id] = day
        for id, last in self.last_seen.items():
            if (day - last).days >= self.settings.max_age_days:
                self.count[id] = 0
                self.row.pop(id, None)
        taken = set(self.row.values())
        free = [row for row in range(self.settings.fallback_rows, self.settings.max_rows) if row not in taken]
        waiting = [id for id, count in self.count.items() if count >= self.settings.min_count and id not in self.row]
        for id in sorted(waiting, key=lambda id: (-self.count[id], id)):
            if free:
                self.row[id] = free.pop(0)

    def rows(self, num_ids: int) -> list[int]:
        return [self.row.get(id, id % self.settings.fallback_rows) for id in range(num_ids)]


def see_night(ids: IdRows, settings: AdmissionConfig, day: date, seen: Integers, num_ids: int) -> None:
    """Count one night's ids in two parts, as a date of two row groups is read."""
    ids.grow(num_ids, settings.fallback_rows)
    for part in np.array_split(seen, 2):
        ids.add_counts(*np.unique(part, return_counts=True), day)


@pytest.mark.parametrize("seed", range(5))
def test_rows_match_a_slow_reference_over_ten_nights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, reference = IdRows.empty(), Reference(SMALL)
    for night in range(10):
        num_ids, day = 15 + 8 * night, FIRST_DAY + timedelta(days=night + int(rng.integers(0, 2)) * (night > 8))
        seen = (num_ids * rng.random(60) ** 2).astype(np.int64)
        before, evictable = dict(reference.row), ids.row_I.copy()
        see_night(ids, SMALL, day, seen, num_ids)
        turnover = ids.admit(SMALL, day)
        reference.night(day, seen.tolist())
        assert ids.row_I.tolist() == reference.rows(num_ids), night
        assert {id: count for id, count in enumerate(ids.count_I.tolist()) if count} == {
            id: count for id, count in reference.count.items() if count
        }
        assert turnover.own_rows == len(reference.row)
        assert turnover.admitted == len(reference.row.keys() - before.keys())
        assert turnover.evicted == len(before.keys() - reference.row.keys())
        given = sorted(row for id, row in reference.row.items() if before.get(id) != row)
        assert reassigned_rows(evictable, ids.row_I, SMALL.max_rows, SMALL.fallback_rows).tolist() == given
    assert ids.counted_to == day.toordinal()
    assert any(0 < count < 3 for count in reference.count.values())


def test_free_rows_go_to_the_highest_count_and_then_to_the_lowest_id() -> None:
    settings = AdmissionConfig(min_count=2, max_age_days=9, max_rows=5, fallback_rows=2)
    ids = IdRows.empty()
    ids.grow(8, 2)
    ids.add_counts(np.array([7, 6, 5, 4, 1]), np.array([2, 9, 2, 2, 1]), FIRST_DAY)
    assert ids.admit(settings, FIRST_DAY) == (3, 0, 1, 3)
    assert ids.row_I.tolist() == [0, 1, 0, 1, 3, 4, 2, 1]


def test_row_stays_with_its_id_until_the_id_expires_and_its_count_restarts() -> None:
    settings = AdmissionConfig(min_count=2, max_age_days=2, max_rows=2, fallback_rows=1)
    ids = IdRows.empty()
    ids.grow(2, 1)
    ids.add_counts(np.array([1]), np.array([2]), FIRST_DAY)
    ids.admit(settings, FIRST_DAY)
    found = []
    for night, id in enumerate([0, 0, 1], start=1):
        day = FIRST_DAY + timedelta(days=night)
        ids.add_counts(np.array([id]), np.array([50]), day)
        ids.admit(settings, day)
        found.append((ids.row_I.tolist(), ids.count_I.tolist()))
    assert found == [([0, 1], [50, 2]), ([1, 0], [100, 0]), ([1, 0], [100, 50])]


def test_larger_table_keeps_the_rows_of_its_ids() -> None:
    ids = IdRows.empty()
    see_night(ids, SMALL, FIRST_DAY, np.repeat(np.arange(40), 3), 40)
    assert ids.admit(SMALL, FIRST_DAY).waiting == 40 - 14
    before = ids.row_I.copy()
    larger = SMALL.model_copy(update={"max_rows": 30})
    assert ids.admit(larger, FIRST_DAY).admitted == 10
    assert np.array_equal(ids.row_I[:14], before[:14])
    assert reassigned_rows(before, ids.row_I, 30, 6).tolist() == [*range(20, 30)]


def test_rows_stay_within_the_bound_and_do_not_move_in_a_hundred_nights() -> None:
    settings = AdmissionConfig(min_count=4, max_age_days=7, max_rows=1000, fallback_rows=100)
    rng, ids = np.random.default_rng(0), IdRows.empty()
    full = evicted = 0
    for night in range(100):
        num_ids, day = 3000 + 500 * night, FIRST_DAY + timedelta(days=night)
        newest = np.minimum(rng.exponential(2000, 20_000), num_ids - 1).astype(np.int64)
        before = ids.row_I.copy()
        see_night(ids, settings, day, num_ids - 1 - newest, num_ids)
        turnover = ids.admit(settings, day)
        own = np.flatnonzero(ids.row_I >= settings.fallback_rows)
        assert len(np.unique(ids.row_I[own])) == len(own) == turnover.own_rows <= 900
        assert ids.row_I.min() >= 0 and ids.row_I.max() < settings.max_rows
        stayed = own[own < len(before)]
        stayed = stayed[before[stayed] >= settings.fallback_rows]
        assert np.array_equal(ids.row_I[stayed], before[stayed])
        assert (ids.last_seen_I[own] != NEVER).all()
        assert (day.toordinal() - ids.last_seen_I[own]).max() < settings.max_age_days
        full += turnover.own_rows == 900
        evicted += turnover.evicted
    assert full > 50 and evicted > 5000


def test_counts_do_not_overflow() -> None:
    ids = IdRows.empty()
    ids.grow(1, 1)
    for _ in range(3):
        ids.add_counts(np.array([0]), np.array([2**30]), FIRST_DAY)
    assert ids.count_I.tolist() == [2**31 - 1]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"table_rows": {"user_id": 9}, "admission": {"user_id": SMALL}}, "user_id: may be in admission or in table_r"),
        ({"admission": {"user_id": {**dict(SMALL), "fallback_rows": 20}}}, "fallback_rows=20 must be less than max_r"),
        ({"admission": {"user_id": {**dict(SMALL), "max_rows": 2**31}}}, "user_id.max_rows: Input should be less"),
        ({"admission": {"user_id": {"max_rows": 9}}}, "user_id.min_count: Field required"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with({}, model=model)
