"""Decisions of a cycle: new dates, mature labels, and the encoders' policy.

A task's labels of a date are mature if their follow-up is over at the snapshot's end. A cycle trains on mature dates
that the champion has not learned, except the newest: on these candidate and champion are judged, and the next cycle
trains on them. So a date is judged before it is learned, and each label is learned once along a line of champions.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from typing import NamedTuple

from sidestack.infra.snapshot import Dataset
from sidestack.pipelines.retrain.config import EncoderPolicy, PolicyName, RetrainConfig
from sidestack.pipelines.retrain.ledger import Cycle, Version
from sidestack.ranker.config import Dates


class Windows(NamedTuple):
    """By task: first and last date of training, and of judging."""

    learned: dict[str, Dates]
    measured: dict[str, Dates]


def dates_with_rows(dataset: Dataset) -> list[date]:
    """Return the dates that have impressions, in order."""
    return [entry.date for entry in dataset.partitions("events") if entry.rows]


def end_of(dataset: Dataset, dates: Sequence[date]) -> datetime:
    """Return the snapshot's end time."""
    return dataset.snapshot.as_of or datetime.combine(dates[-1] + timedelta(days=1), time())


def mature_dates(dates: Iterable[date], end: datetime, followup_days: float) -> list[date]:
    """Return the dates whose labels are all known at a time.

    Args:
        dates: in order. end: the time. followup_days: how long after an impression its label is known.
    """
    followup = timedelta(days=1 + followup_days)
    return [day for day in dates if datetime.combine(day, time()) + followup <= end]


def windows_of(
    dates: Sequence[date],
    end: datetime,
    followup_days: Mapping[str, float],
    learned_to: Mapping[str, date],
    judged_days: int,
) -> Windows:
    """Return the dates to train on and to judge on.

    Args:
        dates: those with rows, in order. end: the snapshot's end.
        followup_days: of every task; 0 where its label is known at once.
        learned_to: by task, the last date that the champion has learned; a task that it has not learned is missing.
        judged_days: how many dates of a task are judged.

    Returns:
        windows by task, without tasks that have no new mature dates or too few dates to judge on.
    """
    learned: dict[str, Dates] = {}
    measured: dict[str, Dates] = {}
    for task, days in followup_days.items():
        known = mature_dates(dates, end, days)
        before, judged = known[:-judged_days], known[-judged_days:]
        done = learned_to.get(task, date.min)
        new = [day for day in before if day > done]
        if not judged or judged[0] <= done or not (before or task in learned_to):
            continue
        measured[task] = (judged[0], judged[-1])
        if new:
            learned[task] = (new[0], new[-1])
    return Windows(learned, measured)


def dates_before(measured: Mapping[str, Dates], dates: Sequence[date], newest: int | None = None) -> dict[str, Dates]:
    """Return, by task, the dates before the judged ones: the training dates of a ranker from scratch.

    Args:
        measured: by task, the dates that are judged. dates: with rows, in order.
        newest: maximum number of dates; None: all.
    """
    learned: dict[str, Dates] = {}
    for task, (first, _) in measured.items():
        before = [day for day in dates if day < first][-(newest or len(dates)) :]
        if before:
            learned[task] = (before[0], before[-1])
    return learned


def dates_judged(measured: Mapping[str, Dates]) -> tuple[Dates, ...]:
    """Return the dates judged for any task, as sorted, disjoint and non-adjacent ranges."""
    found: list[Dates] = []
    for first, last in sorted(measured.values()):
        if found and first <= found[-1][1] + timedelta(days=1):
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


def learned_to(learned: Mapping[str, Dates], champion: Version | None) -> dict[str, date]:
    """Return, by task, the last date that a candidate has learned."""
    before = {} if champion is None else champion.learned_to
    return {**before, **{task: last for task, (_, last) in learned.items()}}


def policy_of(config: EncoderPolicy, trained: int, last: Cycle | None) -> tuple[PolicyName, str]:
    """Return the encoders' policy in the next cycle, and the reason.

    Args:
        config: the policy. trained: number of cycles that have trained so far. last: the last of them.
    """
    if config.policy in ("append", "never") or not trained:
        return config.policy, ""
    figures = last.outcome.figures if last is not None and last.outcome is not None else {}
    outside = [
        f"{name} was {figures[name]:.4g}, to be {bounds}"
        for name, bounds in config.when.items()
        if name in figures and not bounds.holds(figures[name])
    ]
    if outside:
        return config.policy, f"{config.policy}: {', '.join(outside)}"
    if trained % config.every == 0:
        return config.policy, f"{config.policy}: one cycle in {config.every}" if config.every > 1 else ""
    return "append", ""


def is_due(
    config: RetrainConfig,
    dates: Sequence[date],
    end: datetime,
    followup_days: Mapping[str, float],
    last: Cycle | None,
) -> tuple[bool, str]:
    """Return whether a cycle is due, and the reason: enough dates have arrived, or enough labels have matured.

    Args:
        config: the section. dates, end, followup_days: see `windows_of`. last: the last cycle that trained.
    """
    if last is None or last.plan.newest is None:
        return True, f"the first cycle, {dates[0]} to {dates[-1]}"
    newest = last.plan.newest
    if dates[-1] < newest:
        return False, f"the newest date is {dates[-1]}, before {newest} of cycle {last.plan.number}: nothing is learned"
    new = [day for day in dates if day > newest]
    named = f"{len(new)} new date{'s' if len(new) != 1 else ''} since {newest}"
    if len(new) >= config.every_days:
        return True, f"{named}: {new[0]} to {new[-1]}"
    for task, (_, judged_to) in last.plan.measured.items():
        known = [day for day in mature_dates(dates, end, followup_days[task]) if day > judged_to]
        if len(known) >= config.every_days:
            return True, f"labels of {task} have matured: {known[0]} to {known[-1]}"
    return False, f"{named}; a cycle begins with {config.every_days}"


def revised_dates(now: Dataset, before: Dataset, learned: Mapping[str, date]) -> tuple[date, ...]:
    """Return dates that a version has learned and whose requests or events have changed since.

    Args:
        now, before: snapshots. learned: by task, the last date that was learned.
    """
    last = max(learned.values(), default=date.min)
    rows = [
        {(entry.table, entry.date): entry.digest for table in ("requests", "events") for entry in one.partitions(table)}
        for one in (before, now)
    ]
    changed = {day for (table, day), digest in rows[0].items() if rows[1].get((table, day)) != digest}
    late = {day for (_, day) in rows[1].keys() - rows[0].keys()}
    return tuple(sorted(day for day in changed | late if day <= last))
