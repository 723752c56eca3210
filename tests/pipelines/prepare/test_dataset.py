"""The keys of partitions, which change while labels mature, and each rank's share of the dates."""

from dataclasses import replace
from datetime import date, datetime, timedelta

import pytest

from sidestack.infra.distributed import ALONE
from sidestack.pipelines.prepare.contract import label_keys
from sidestack.pipelines.prepare.dataset import days_of_rank

DAY = date(2024, 1, 10)
FOLLOWUP = {"conversion": 3.0}


def key_at(end: datetime | None, followup: dict[str, float] = FOLLOWUP) -> str:
    return label_keys({"log": "x"}, followup, DAY, end)["labels"]


def test_key_of_labels_changes_while_more_of_them_become_known() -> None:
    """The key changes from three days after the date's first moment to three days after its last moment."""
    begins = datetime(2024, 1, 13)
    keys = [key_at(begins + timedelta(hours=hours)) for hours in range(-48, 72, 6)]
    before, within, after = keys[:9], keys[9:12], keys[12:]
    assert len(set(before)) == len(set(after)) == 1 and len(set(keys)) == 5
    assert len({before[0], *within, after[0]}) == 5
    assert key_at(None) == after[0]


def test_key_of_labels_depends_on_the_followup_even_when_all_are_known() -> None:
    """The follow-up may decide how far ahead a source looks for labels."""
    assert len({key_at(datetime(2025, 1, 1), {"conversion": days}) for days in (1.0, 2.0, 2.5)}) == 3
    assert key_at(datetime(2025, 1, 1), {}) != key_at(datetime(2025, 1, 1))


@pytest.mark.parametrize("end", [None, datetime(2024, 1, 13, 12), datetime(2025, 1, 1)])
def test_events_and_requests_do_not_depend_on_the_end(end: datetime | None) -> None:
    keys, other = label_keys({"log": "x"}, FOLLOWUP, DAY, end), label_keys({"log": "x"}, {}, DAY, None)
    assert keys["events"] == keys["requests"] == other["events"]
    assert label_keys({"log": "y"}, FOLLOWUP, DAY, end)["labels"] != keys["labels"]


@pytest.mark.parametrize(("days", "ranks"), [(0, 2), (1, 3), (7, 2), (8, 3), (3, 8)])
def test_ranks_share_the_dates_evenly_and_in_blocks(days: int, ranks: int) -> None:
    dates = [DAY + timedelta(days=number) for number in range(days)]
    shares = [days_of_rank(replace(ALONE, rank=rank, size=ranks), dates) for rank in range(ranks)]
    assert [day for part in shares for day in part] == dates
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
