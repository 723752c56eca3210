"""Reduction of the predictions of all arms and replicates: metrics of each, and sums by user for the gains.

Memory: users times arms, plus the sort buffers of `ranker.predictions`; independent of the number of rows.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidestack.pipelines.report.arms import Arms
from sidestack.pipelines.report.segments import SEGMENTS, EarlierPositives
from sidestack.ranker.measures import TaskMeasures, measure_task
from sidestack.ranker.metric_registry import HEADLINE, Better, compared_metrics
from sidestack.ranker.predictions import Predictions, require_same_rows, sorted_predictions, sorting

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SegmentRows:
    """Counts of one segment: rows, users and positives."""

    rows: int
    users: int
    positives: int


@dataclass
class ArmMeasured:
    """Measures of one arm on one task.

    Attributes:
        sums_UC: the sum of each column of `TaskMeasured` by user, over all replicates.
        sums_RC: the same by replicate, over all users.
        replicates: the metrics of each.
    """

    sums_UC: Floats
    sums_RC: list[Floats] = field(default_factory=list)
    replicates: list[TaskMeasures] = field(default_factory=list)


@dataclass
class TaskMeasured:
    """Measures of all arms on one task.

    Attributes:
        columns: what is summed by user: name of a metric or segment (`column_of`) -> which direction is better.
        sums_UK: the arms' sums by user side by side, K = arms * columns; each arm's `sums_UC` is a view of it.
        arms: arm -> its measures.
        segments: `user` and `item` -> the counts of each of `SEGMENTS`, the same for every arm.
    """

    columns: dict[str, Better]
    sums_UK: Floats
    arms: dict[str, ArmMeasured]
    segments: dict[str, tuple[SegmentRows, ...]] = field(default_factory=dict)


@dataclass
class Measured:
    """Measures of all arms on all tasks.

    Attributes:
        num_rows: held-out rows. num_users: users among them.
        tasks: task -> its measures.
    """

    num_rows: int
    num_users: int
    tasks: dict[str, TaskMeasured]


def column_of(kind: str, segment: str) -> str:
    """Return the column name of the headline metric's sums over one segment of `user` or `item`."""
    return f"{kind} {segment}"


def measure(arms: Arms, tasks: Sequence[str], earlier: EarlierPositives, folder: Path) -> Measured:
    """Reduce each arm's predictions; each output is read together with the first.

    Args:
        arms: the outputs. tasks: what they predict. earlier: counts that define segments.
        folder: where rows are sorted; temporary files are removed.

    Raises:
        DataError: predictions break their contract, or two outputs did not predict the same rows and labels.
    """
    first = next(iter(arms.values()))[0]
    with sorting(folder) as database, sorted_predictions(first, tasks, database) as reference:
        found = {task: _task(reference, task, arms, earlier) for task in tasks}
        for name, paths in arms.items():
            for path in paths:
                same = path == first
                with nullcontext(reference) if same else sorted_predictions(path, tasks, database) as predictions:
                    require_same_rows(predictions, reference)
                    for task, measured in found.items():
                        _add_replicate(measured, name, predictions, task, earlier)
        return Measured(len(reference), reference.count_users(), found)


def _task(reference: Predictions, task: str, arms: Arms, earlier: EarlierPositives) -> TaskMeasured:
    assert HEADLINE.better is not None
    columns = {metric.name: metric.better for metric in compared_metrics() if metric.better is not None}
    columns |= {column_of(kind, segment): HEADLINE.better for kind in earlier.by for segment in SEGMENTS}
    width = len(columns)
    sums_UK = np.zeros((len(reference.users(task)), len(arms) * width))
    views = {name: sums_UK[:, place * width : (place + 1) * width] for place, name in enumerate(arms)}
    measured = {name: ArmMeasured(sums_UC) for name, sums_UC in views.items()}
    return TaskMeasured(columns, sums_UK, measured, _segment_rows(reference, task, earlier))


def _segment_rows(reference: Predictions, task: str, earlier: EarlierPositives) -> dict[str, tuple[SegmentRows, ...]]:
    """Count the rows, users and positives of each segment."""
    num_users = len(reference.users(task))
    counts_3S = {kind: np.zeros((3, len(SEGMENTS)), np.int64) for kind in earlier.by}
    has_rows_US = {kind: np.zeros((num_users, len(SEGMENTS)), bool) for kind in earlier.by}
    for rows in reference.judged(task, "row"):
        for kind, place_M in earlier.segments(rows, reference.path).items():
            counts_3S[kind][0] += np.bincount(place_M, minlength=len(SEGMENTS))
            counts_3S[kind][2] += np.bincount(place_M[rows.labels_M == 1], minlength=len(SEGMENTS))
            has_rows_US[kind][rows.users_M, place_M] = True
    for kind, has_rows in has_rows_US.items():
        counts_3S[kind][1] = has_rows.sum(axis=0)
    return {kind: tuple(SegmentRows(*counts) for counts in found.T.tolist()) for kind, found in counts_3S.items()}


def _add_replicate(
    measured: TaskMeasured, name: str, predictions: Predictions, task: str, earlier: EarlierPositives
) -> None:
    found = measure_task(predictions, task)
    parts = {metric: one.parts_U for metric, one in found.metrics.items()}
    parts |= _segment_parts(predictions, task, earlier)
    sums_UC = np.column_stack([parts[column] for column in measured.columns])
    arm = measured.arms[name]
    arm.replicates.append(found)
    arm.sums_RC.append(sums_UC.sum(axis=0))
    arm.sums_UC += sums_UC


def _segment_parts(predictions: Predictions, task: str, earlier: EarlierPositives) -> dict[str, Floats]:
    """Return each user's contribution to the headline metric of each segment's rows."""
    num_users = len(predictions.users(task))
    tallies = {column_of(kind, segment): HEADLINE.tally(num_users) for kind in earlier.by for segment in SEGMENTS}
    for rows in predictions.judged(task, HEADLINE.order):
        for kind, place_M in earlier.segments(rows, predictions.path).items():
            for place, segment in enumerate(SEGMENTS):
                tallies[column_of(kind, segment)].add(rows.where(place_M == place))
    return {column: tally.measure().parts_U for column, tally in tallies.items()}
