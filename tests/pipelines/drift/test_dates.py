"""Which dates are new, and which earlier dates they are compared with."""

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import pytest

from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.partitions import PartitionEntry, date_slice
from sidestack.infra.snapshot import Dataset, Snapshot
from sidestack.pipelines.drift.dates import EARLIER_DATES, choose_dates
from tests.encoder.fabricated import SPEC


def day(number: int) -> date:
    return date(2024, 1, 1) + timedelta(days=number)


def dataset(days: Sequence[int]) -> Dataset:
    entries = [
        PartitionEntry(table=table, slice=date_slice(day(one)), path="", digest="", columns="", files=())
        for table in ("events", "labels", "requests")
        for one in days
    ]
    return Dataset(Path("snapshot"), SPEC, Snapshot(store=".", partitions=tuple(entries)))


@pytest.mark.parametrize(
    ("now", "before", "new"),
    [
        ([1, 2, 3], None, [3]),
        ([1, 2, 3], [1, 2, 3], [3]),
        ([1, 2, 3], [], [3]),
        ([1, 2, 3, 5], [1, 2], [3, 5]),
        ([1, 2, 3, 4], [1, 3], [2, 4]),
    ],
)
def test_dates_missing_from_the_earlier_snapshot_are_new_by_default(
    now: list[int], before: list[int] | None, new: list[int]
) -> None:
    dates = choose_dates(None, dataset(now), None if before is None else dataset(before))
    assert dates.new == tuple(map(day, new))
    assert dates.earlier == tuple(day(one) for one in now if one < new[0])


def test_chosen_dates_are_compared_with_a_bounded_number_of_earlier_ones() -> None:
    dates = choose_dates((day(50), day(51)), dataset(range(60)), None)
    assert dates.new == (day(50), day(51))
    assert dates.earlier == tuple(day(one) for one in range(50 - EARLIER_DATES, 50))


def test_a_snapshot_without_events_or_without_the_chosen_dates_is_refused() -> None:
    with pytest.raises(DataError, match="snapshot: the snapshot lists no events"):
        choose_dates(None, dataset([]), None)
    with pytest.raises(ConfigError, match="drift.new_dates: 2024-01-09 to 2024-01-10: .* 2024-01-02 to 2024-01-03"):
        choose_dates((day(8), day(9)), dataset([1, 2]), None)
