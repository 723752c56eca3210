"""What the predictions of all arms and replicates come down to: metrics of each, and sums by user for the gains."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra.tables import TASKS
from pipelines.report.arms import Arms
from pipelines.report.predictions import NO_LABEL, Predictions, read_predictions, require_same_rows
from pipelines.report.segments import SEGMENTS, EarlierClicks
from ranker.statistics import (
    Decile,
    TaskMetrics,
    UserAuc,
    auc_by_user,
    auc_influence,
    calibration_deciles,
    log_loss,
    task_metrics,
)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ALL, GAUC, AUC = "all", "gauc", "auc"


@dataclass(frozen=True)
class TaskRows:
    """The rows that count for one task, the same for every arm and replicate.

    Attributes:
        labelled_N: which of the held-out rows have a label.
        labels_M: 0 or 1. users_M: the place of each row's user among the task's users.
        num_users: users U among them.
        segments: `user` and `item` -> each row's place in `SEGMENTS`.
    """

    labelled_N: NDArray[np.bool_]
    labels_M: NDArray[np.int8]
    users_M: Integers
    num_users: int
    segments: dict[str, Integers]

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the sums by user: the loss on all rows, on each segment's, and each user's part in GAUC and in AUC."""
        return (ALL, *(f"{kind} {segment}" for kind in self.segments for segment in SEGMENTS), GAUC, AUC)

    def no_sums(self) -> Floats:
        """Give [U, C] zeros, to be added to."""
        return np.zeros((self.num_users, len(self.columns)))


@dataclass
class ArmMeasured:
    """One arm on one task.

    Attributes:
        metrics, user_aucs, deciles: by replicate.
        sums_RC: the sum of each of `TaskRows.columns`, by replicate.
        sums_UC: the same by user, over all replicates.
    """

    sums_UC: Floats
    metrics: list[TaskMetrics] = field(default_factory=list)
    user_aucs: list[UserAuc] = field(default_factory=list)
    deciles: list[tuple[Decile, ...]] = field(default_factory=list)
    sums_RC: list[Floats] = field(default_factory=list)


@dataclass
class Measured:
    """What the predictions of all arms come down to.

    Attributes:
        num_rows: held-out rows. num_users: users among them.
        rows: task -> the rows that count.
        arms: task -> arm -> what was measured.
    """

    num_rows: int
    num_users: int
    rows: dict[str, TaskRows]
    arms: dict[str, dict[str, ArmMeasured]]


def measure(arms: Arms, clicks: EarlierClicks) -> Measured:
    """Reduce each arm's predictions; no more than two outputs' are in memory at a time.

    Raises:
        DataError: predictions break their contract, or two outputs did not predict the same rows and labels.
    """
    reference = read_predictions(_first(arms))
    segments = clicks.segments(reference)
    rows = {task: _task_rows(reference, segments, task) for task in TASKS}
    measured = Measured(
        num_rows=len(reference),
        num_users=len(np.unique(reference.identity["user_id"])),
        rows=rows,
        arms={task: {name: ArmMeasured(rows[task].no_sums()) for name in arms} for task in TASKS},
    )
    for name, paths in arms.items():
        for path in paths:
            predictions = reference if path == _first(arms) else read_predictions(path)
            require_same_rows(predictions, reference)
            for task in TASKS:
                scores_M = predictions.probabilities[task][rows[task].labelled_N]
                _add_replicate(measured.arms[task][name], rows[task], scores_M)
    return measured


def _first(arms: Arms) -> Path:
    replicates: Sequence[Path] = next(iter(arms.values()))
    return replicates[0]


def _task_rows(reference: Predictions, segments: dict[str, Integers], task: str) -> TaskRows:
    labelled_N = reference.labels[task] != NO_LABEL
    users_U, users_M = np.unique(reference.identity["user_id"][labelled_N], return_inverse=True)
    return TaskRows(
        labelled_N=labelled_N,
        labels_M=reference.labels[task][labelled_N],
        users_M=users_M,
        num_users=len(users_U),
        segments={kind: segment_N[labelled_N] for kind, segment_N in segments.items()},
    )


def _add_replicate(arm: ArmMeasured, rows: TaskRows, scores_M: Floats) -> None:
    metrics = task_metrics(rows.labels_M, scores_M)
    user_auc = auc_by_user(rows.users_M, rows.labels_M, scores_M)
    parts = [_losses_by_user(rows, scores_M), _gauc_by_user(rows, user_auc), _auc_by_user(rows, metrics, scores_M)]
    sums_UC = np.column_stack(parts)
    arm.metrics.append(metrics)
    arm.user_aucs.append(user_auc)
    arm.deciles.append(calibration_deciles(rows.labels_M, scores_M))
    arm.sums_RC.append(sums_UC.sum(axis=0))
    arm.sums_UC += sums_UC


def _losses_by_user(rows: TaskRows, scores_M: Floats) -> Floats:
    """Give [U, 1 + kinds * segments]: the loss on all of a user's rows, and on each segment's."""
    num, width = rows.num_users, len(SEGMENTS)
    losses_M = log_loss(rows.labels_M, scores_M)
    parts = [_sum_by_cell(rows.users_M, losses_M, num)[:, None]]
    for segment_M in rows.segments.values():
        cells_M = rows.users_M * width + segment_M
        parts.append(_sum_by_cell(cells_M, losses_M, num * width).reshape(num, width))
    return np.concatenate(parts, axis=1)


def _gauc_by_user(rows: TaskRows, user_auc: UserAuc) -> Floats:
    """Give [U] what adds up to GAUC times the rows it weighs."""
    parts_U = np.zeros(rows.num_users)
    parts_U[user_auc.users_V] = user_auc.auc_V * user_auc.rows_V
    return parts_U


def _auc_by_user(rows: TaskRows, metrics: TaskMetrics, scores_M: Floats) -> Floats:
    """Give [U] what adds up to AUC, and over a resample's users to that of the resample, to first order."""
    if metrics.auc is None:
        return np.zeros(rows.num_users)
    return metrics.auc / rows.num_users + auc_influence(rows.users_M, rows.labels_M, scores_M)


def _sum_by_cell(cells_M: Integers, losses_M: Floats, num_cells: int) -> Floats:
    """Add up the losses of each cell's rows, [num_cells]."""
    # Without rows, bincount forgets its weights' type.
    return np.bincount(cells_M, weights=losses_M, minlength=num_cells).astype(np.float64)
