"""What a cycle learns and judges: each label is learned once, when it is mature and after it was judged."""

from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestack.infra.snapshot import Dataset
from sidestack.pipelines.retrain.config import Bounds, EncoderPolicy, RetrainConfig
from sidestack.pipelines.retrain.decide import (
    dates_before,
    dates_judged,
    is_due,
    mature_dates,
    policy_of,
    revised_dates,
    windows_of,
)
from sidestack.pipelines.retrain.ledger import Cycle, Outcome, Plan

FIRST = date(2024, 3, 1)
NOW = datetime(2024, 3, 20, tzinfo=UTC)
FOLLOWUPS = {"click": 0.0, "conversion": 3.0}


def day(n: int) -> date:
    return FIRST + timedelta(days=n)


def end(n: int) -> datetime:
    return datetime.combine(day(n), time())


def cycle(**figures: float) -> Cycle:
    return Cycle(Plan(number=1, at=NOW, why="", newest=day(9)), Outcome(at=NOW, figures=figures))


@given(
    arrivals=st.lists(st.integers(1, 3), min_size=2, max_size=8),
    judged=st.integers(1, 3),
    followup=st.integers(0, 4),
    gaps=st.sets(st.integers(0, 30), max_size=5),
    accepted=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_each_label_is_learned_once_when_it_is_known_and_after_it_was_judged(
    arrivals: list[int], judged: int, followup: int, gaps: set[int], accepted: list[bool]
) -> None:
    """Replay cycles with accepted and rejected candidates, and follow the dates that the champion has learned."""
    followups = {"click": 0.0, "conversion": float(followup)}
    line: dict[str, list[date]] = {task: [] for task in followups}
    has_been_judged: dict[str, set[date]] = {task: set() for task in followups}
    done: dict[str, date] = {}
    known = 6
    for place, new in enumerate(arrivals):
        known += new
        dates = [day(n) for n in range(known) if n not in gaps]
        learned, measured = windows_of(dates, end(known), followups, done, judged)
        for task in followups:
            rows = [one for one in dates if task in learned and learned[task][0] <= one <= learned[task][1]]
            tested = [one for one in dates if task in measured and measured[task][0] <= one <= measured[task][1]]
            assert all(one not in line[task] for one in rows + tested), "no date is learned twice, or judged afterwards"
            assert all(one + timedelta(days=1 + followups[task]) <= day(known) for one in rows + tested)
            assert not rows or not tested or rows[-1] < tested[0]
            has_been_judged[task].update(tested)
            if accepted[place]:
                line[task] += rows
                if rows:
                    done[task] = rows[-1]
    for rows in line.values():
        assert rows == sorted(set(rows))
        first = [one for one in (day(n) for n in range(known) if n not in gaps)][: len(rows)]
        assert rows == first, "no date in between is skipped"


def test_label_is_mature_when_the_follow_up_of_its_whole_date_is_over() -> None:
    dates = [day(n) for n in range(6)]
    assert mature_dates(dates, end(6), 0.0) == dates
    assert mature_dates(dates, end(6), 3.0) == dates[:3]
    assert mature_dates(dates, end(6), 0.5) == dates[:5]


def test_the_first_cycle_learns_all_and_judges_the_newest() -> None:
    learned, measured = windows_of([day(n) for n in range(8)], end(8), FOLLOWUPS, {}, 2)
    assert learned == {"click": (day(0), day(5)), "conversion": (day(0), day(2))}
    assert measured == {"click": (day(6), day(7)), "conversion": (day(3), day(4))}


def test_a_task_without_enough_mature_dates_is_left_out() -> None:
    learned, measured = windows_of([day(n) for n in range(4)], end(4), FOLLOWUPS, {}, 1)
    assert "conversion" not in learned and "conversion" not in measured
    assert learned == {"click": (day(0), day(2))}


def test_ranges_that_touch_are_one() -> None:
    assert dates_judged({"a": (day(3), day(4)), "b": (day(5), day(6)), "c": (day(0), day(1))}) == (
        (day(0), day(1)), (day(3), day(6)),
    )  # fmt: skip


def test_a_ranker_with_new_sids_learns_the_dates_before_those_judged() -> None:
    dates = [day(n) for n in range(10)]
    assert dates_before({"click": (day(8), day(9))}, dates) == {"click": (day(0), day(7))}
    assert dates_before({"click": (day(8), day(9))}, dates, newest=3) == {"click": (day(5), day(7))}


@pytest.mark.parametrize(
    ("arrived", "every", "due", "message"),
    [
        (10, 1, False, "0 new dates since 2024-03-10"),
        (11, 1, True, "1 new date since 2024-03-10: 2024-03-11 to 2024-03-11"),
        (12, 3, False, "2 new dates since 2024-03-10; a cycle begins with 3"),
        (13, 3, True, "3 new dates"),
        (8, 1, False, "the newest date is 2024-03-08, before 2024-03-10 of cycle 1"),
    ],
)
def test_a_cycle_is_due_when_enough_new_dates_have_come(arrived: int, every: int, due: bool, message: str) -> None:
    dates = [day(n) for n in range(arrived)]
    found, why = is_due(RetrainConfig(every_days=every), dates, end(arrived), FOLLOWUPS, cycle())
    assert found is due and message in why


def test_the_first_cycle_is_due() -> None:
    found = is_due(RetrainConfig(), [day(0)], end(1), FOLLOWUPS, None)
    assert found == (True, f"the first cycle, {day(0)} to {day(0)}")


def test_labels_that_mature_without_a_new_date_begin_a_cycle() -> None:
    plan = cycle().plan.model_copy(update={"measured": {"click": (day(9), day(9)), "conversion": (day(6), day(6))}})
    dates, last = [day(n) for n in range(10)], Cycle(plan, Outcome(at=NOW))
    assert not is_due(RetrainConfig(), dates, end(10), FOLLOWUPS, last)[0]
    assert is_due(RetrainConfig(), dates, end(12), FOLLOWUPS, last) == (
        True, f"labels of conversion have matured: {day(7)} to {day(8)}",
    )  # fmt: skip
    assert not is_due(RetrainConfig(every_days=3), dates, end(12), FOLLOWUPS, last)[0]


def test_policy_is_chosen_by_schedule_or_by_drift() -> None:
    rebuild = EncoderPolicy(policy="rebuild", every=3, when={"reconstruction_ratio.sid.text": Bounds(max=1.5)})
    assert policy_of(rebuild, 0, None)[0] == "rebuild"
    assert policy_of(rebuild, 1, cycle())[0] == "append"
    assert policy_of(rebuild, 3, cycle()) == ("rebuild", "rebuild: one cycle in 3")
    name, why = policy_of(rebuild, 1, cycle(**{"reconstruction_ratio.sid.text": 2.0}))
    assert (name, why) == ("rebuild", "rebuild: reconstruction_ratio.sid.text was 2, to be at most 1.5")
    assert policy_of(EncoderPolicy(), 3, cycle())[0] == "append"


def test_plan_with_paths_survives_a_json_round_trip(tmp_path: Path) -> None:
    plan = Plan(number=1, at=NOW, why="new", learned={"click": (day(0), day(1))}, prepared=Path("prepare/ab"))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_learned_dates_that_changed_are_named() -> None:
    def snapshot(**digests: str) -> Dataset:
        entries = {
            table: [
                SimpleNamespace(table=table, date=day(int(number[1:])), digest=digest)
                for number, digest in digests.items()
            ]
            for table in ("requests", "events")
        }
        return cast(Dataset, SimpleNamespace(partitions=lambda table: entries[table]))

    before = snapshot(d0="a", d1="b", d3="c", d4="d")
    now = snapshot(d0="a", d1="x", d2="late", d3="c", d4="y")
    assert revised_dates(now, before, {"click": day(3), "conversion": day(1)}) == (day(1), day(2))
    assert revised_dates(before, before, {"click": day(4)}) == ()
    assert revised_dates(now, before, {}) == ()
