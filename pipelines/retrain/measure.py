"""Metrics of candidate, champion and reference on the judged dates: overall, by day, and paired by user."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from sidestack.pipelines.retrain.config import GatesConfig
from sidestack.pipelines.retrain.gates import Judged
from sidestack.ranker.config import Dates
from sidestack.ranker.intervals import Sums, TrainingDeviation, estimate_gain, resample_users
from sidestack.ranker.measures import TaskMeasures, measure_task
from sidestack.ranker.metric_registry import CALIBRATION, HEADLINE, NE, all_metrics
from sidestack.ranker.predictions import Predictions, require_same_rows, sorted_predictions, sorting

CANDIDATE, CHAMPION, REFERENCE = "candidate", "champion", "reference"
MODELS = (CANDIDATE, CHAMPION, REFERENCE)


@dataclass(frozen=True)
class Measured:
    """Measures on the judged dates.

    Attributes:
        tasks: by task, the inputs of gates. models: by model and task, the value of each metric.
        by_day: one row for each model, task and date: num, positives, and every metric except those within users, as
            users have few impressions a day.
    """

    tasks: dict[str, Judged]
    models: dict[str, dict[str, dict[str, float | None]]]
    by_day: list[dict[str, Any]]


def measure(outputs: Mapping[str, Path], labels: Mapping[str, Dates], gates: GatesConfig, folder: Path) -> Measured:
    """Measure all models on the same rows.

    Args:
        outputs: predictions by model, of `MODELS`. Gates are about the first: the candidate, if there is one.
        labels: by task, the dates that are judged. gates: settings of the interval.
        folder: where rows are sorted; temporary files are removed.

    Raises:
        DataError: predictions break their contract, or are for different rows.
    """
    tasks = tuple(labels)
    found = _measures(outputs, tasks, labels, folder)
    judged = {task: _judged(found, task, gates) for task in tasks}
    models = {
        model: {task: {name: one.metrics[name].value for name in all_metrics()} for task, one in by_task.items()}
        for model, by_task in found.items()
    }
    by_day = [row for day in _days(labels) for row in _of_day(outputs, day, labels, folder)]
    return Measured(judged, models, by_day)


def _measures(
    outputs: Mapping[str, Path], tasks: Sequence[str], labels: Mapping[str, Dates], folder: Path
) -> dict[str, dict[str, TaskMeasures]]:
    """Check that all models predicted the same rows, and return each model's measures by task."""
    found: dict[str, dict[str, TaskMeasures]] = {}
    with sorting(folder) as database, ExitStack() as stack:
        first: Predictions | None = None
        for model, path in outputs.items():
            predictions = stack.enter_context(sorted_predictions(path, tasks, database, labels))
            if first is not None:
                require_same_rows(predictions, first)
            first = first or predictions
            found[model] = {task: measure_task(predictions, task) for task in tasks}
    return found


def _judged(found: Mapping[str, Mapping[str, TaskMeasures]], task: str, gates: GatesConfig) -> Judged:
    own = next(iter(found.values()))[task]
    ne, calibration = (own.metrics[metric.name].value for metric in (NE, CALIBRATION))
    gain = _gain(own, found[CHAMPION][task], gates) if CANDIDATE in found and CHAMPION in found else None
    return Judged(own.num, own.positives, len(own.metrics[HEADLINE.name].parts_U), ne, calibration, gain)


def _gain(own: TaskMeasures, champion: TaskMeasures, gates: GatesConfig) -> tuple[float, float, float] | None:
    """Return the candidate's gain and its interval over users only, as this one training is promoted."""
    sums_U2 = np.column_stack([one.metrics[HEADLINE.name].parts_U for one in (own, champion)])
    drawn_B2 = resample_users(sums_U2, gates.resamples, gates.seed)
    arm, reference = (Sums(sums_U2[:, n].sum(keepdims=True), drawn_B2[:, n]) for n in (0, 1))
    assert HEADLINE.better is not None
    found = estimate_gain(arm, reference, HEADLINE.better, TrainingDeviation(0.0, 0), gates.seed, gates.confidence)
    return None if found is None else (found.gain, *found.interval)


def _days(labels: Mapping[str, Dates]) -> list[date]:
    return sorted({day for first, last in labels.values() for day in _between(first, last)})


def _between(first: date, last: date) -> Iterator[date]:
    for n in range((last - first).days + 1):
        yield first + timedelta(days=n)


def _of_day(
    outputs: Mapping[str, Path], day: date, labels: Mapping[str, Dates], folder: Path
) -> Iterator[dict[str, Any]]:
    of_day = {task: (day, day) for task, (first, last) in labels.items() if first <= day <= last}
    for model, path in outputs.items():
        with sorting(folder) as database, sorted_predictions(path, tuple(of_day), database, of_day) as predictions:
            for task in of_day:
                found = measure_task(predictions, task)
                values = {name: found.metrics[name].value for name, one in all_metrics().items() if one.order != "user"}
                identity = {"model": model, "task": task, "date": day.isoformat()}
                yield {**identity, "num": found.num, "positives": found.positives, **values}
