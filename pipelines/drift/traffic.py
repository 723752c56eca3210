"""Drift of traffic: volume, label rates, and impressions of new items and users."""

from collections.abc import Collection
from datetime import date

import numpy as np

from sidestack.infra.checks import check_events
from sidestack.infra.impressions import EVENTS, LABELS, read_impressions
from sidestack.infra.snapshot import Dataset
from sidestack.infra.tables import Entity
from sidestack.pipelines.drift.dates import Dates
from sidestack.pipelines.drift.result import Newcomers, Relative


def volume(now: Dataset, dates: Dates) -> Relative:
    """Compare the mean impressions per day."""
    rows = {entry.date: entry.rows for entry in now.partitions(EVENTS)}

    def mean(days: Collection[date]) -> float | None:
        return sum(rows[day] for day in days) / len(days) if days else None

    return Relative.of(mean(dates.new), mean(dates.earlier))


def label_rates(now: Dataset, dates: Dates) -> dict[str, Relative]:
    """Compare each task's share of positives among the judged rows with a known label.

    Both counts are facts in the manifests of the labels' partitions, so no file is opened.
    """
    facts = {entry.date: entry.facts for entry in now.partitions(LABELS)}

    def rate(task: str, days: Collection[date]) -> float | None:
        judged = sum(facts[day][f"judged_{task}"] for day in days)
        return sum(facts[day][f"positive_{task}"] for day in days) / judged if judged else None

    return {task: Relative.of(rate(task, dates.new), rate(task, dates.earlier)) for task in now.spec.tasks}


def newcomers(now: Dataset, before: Dataset, dates: Dates) -> dict[Entity, Newcomers]:
    """Count the items and users that the previous snapshot lacks, in the new dates' impressions and in the tables.

    Raises:
        DataError: rows break the tables' contract.
    """
    entities: tuple[Entity, ...] = ("item", "user")
    known_E = np.array([before.spec.content(entity).rows for entity in entities])
    all_E = np.array([now.spec.content(entity).rows for entity in entities])
    columns = [f"{entity}_id" for entity in entities]
    rows, new_E = 0, np.zeros(len(entities), np.int64)
    for day in dates.new:
        for table in read_impressions(now, columns, day, day, lambda part, where: check_events(part, now.spec, where)):
            rows += table.num_rows
            new_E += [
                int((table[name].to_numpy() >= known).sum()) for name, known in zip(columns, known_E, strict=True)
            ]
    return {
        entity: Newcomers(
            of_impressions=int(new_E[at]) / rows if rows else None,
            of_table=int(all_E[at] - known_E[at]) / int(all_E[at]) if all_E[at] else None,
        )
        for at, entity in enumerate(entities)
    }
