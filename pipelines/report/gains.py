"""From what was measured to each arm's results: means over replicates, and gains with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.report.comparison import DecileResult, Gain, Gauc, Segment, TaskResult
from pipelines.report.config import CompareConfig
from pipelines.report.measure import ALL, AUC, GAUC, ArmMeasured, Measured, TaskRows
from pipelines.report.segments import SEGMENTS
from ranker.intervals import GainEstimate, Sums, estimate_gain, resample_users, training_draws
from ranker.statistics import TaskMetrics

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Contest:
    """All arms on one task.

    Attributes:
        rows: the rows that count. arms: arm -> what was measured.
        sums: arm -> column of `TaskRows.columns` -> its sums.
        training_B: draws of the mean over trainings (see `ranker.intervals.training_draws`).
        reference: the arm that gains are over. confidence: share of resamples inside an interval.
    """

    rows: TaskRows
    arms: Mapping[str, ArmMeasured]
    sums: Mapping[str, Mapping[str, Sums]]
    training_B: Floats
    reference: str
    confidence: float

    def estimate(self, arm: str, other: str, column: str) -> GainEstimate | None:
        """Give an arm's gain over another in one column; None over itself."""
        if arm == other:
            return None
        return estimate_gain(self.sums[arm][column], self.sums[other][column], self.training_B, self.confidence)

    def estimate_raised(self, arm: str, column: str) -> GainEstimate | None:
        """Give the gain over the reference in a figure to be raised: arm / reference - 1, not 1 - arm / reference."""
        lost = self.estimate(arm, self.reference, column)
        if lost is None:
            return None
        low, high = lost.interval
        return GainEstimate(-lost.gain, (-high, -low), tuple(-gain for gain in lost.replicates))


def task_results(config: CompareConfig, measured: Measured, task: str) -> dict[str, TaskResult]:
    """Give every arm's results on a task."""
    contest = _contest(config, measured.rows[task], measured.arms[task])
    return {name: _task_result(contest, name) for name in contest.arms}


def _contest(config: CompareConfig, rows: TaskRows, arms: Mapping[str, ArmMeasured]) -> _Contest:
    sums_UK = np.concatenate([arm.sums_UC for arm in arms.values()], axis=1)
    drawn_BAC = resample_users(sums_UK, config.resamples, config.seed).reshape(config.resamples, len(arms), -1)
    sums = {}
    for at, (name, arm) in enumerate(arms.items()):
        columns = zip(rows.columns, np.stack(arm.sums_RC, axis=1), drawn_BAC[:, at].T, strict=True)
        sums[name] = {column: Sums(trained_R, drawn_B) for column, trained_R, drawn_B in columns}
    replicates = len(next(iter(arms.values())).metrics)
    training_B = training_draws(config.resamples, replicates, config.seed)
    return _Contest(rows, arms, sums, training_B, config.reference, config.confidence)


def _task_result(contest: _Contest, name: str) -> TaskResult:
    metrics = contest.arms[name].metrics
    over = {
        other: found
        for other in contest.arms
        if metrics[0].ne is not None and (found := _gain(contest.estimate(name, other, ALL))) is not None
    }
    against = over.get(contest.reference)
    itself = name == contest.reference and metrics[0].ne is not None
    in_auc = contest.estimate_raised(name, AUC)
    return TaskResult(
        num=metrics[0].num,
        positives=metrics[0].positives,
        ne=_mean(metrics, "ne"),
        ne_replicates=tuple(one.ne for one in metrics if one.ne is not None),
        ne_gain=against.ne_gain if against else 0.0 if itself else None,
        ne_gain_interval=against.ne_gain_interval if against else None,
        ne_gain_seeds=against.ne_gain_seeds if against else None,
        auc=_mean(metrics, "auc"),
        auc_gain=in_auc.gain if in_auc else None,
        auc_gain_interval=in_auc.interval if in_auc else None,
        auc_gain_seeds=in_auc.seeds if in_auc else None,
        calibration=_mean(metrics, "calibration"),
        gauc=_gauc(contest, name),
        deciles=_deciles(contest.arms[name]),
        segments={kind: tuple(_segments(contest, name, kind)) for kind in contest.rows.segments},
        over=over,
    )


def _gain(estimate: GainEstimate | None) -> Gain | None:
    if estimate is None:
        return None
    return Gain(
        ne_gain=estimate.gain,
        ne_gain_interval=estimate.interval,
        ne_gain_replicates=estimate.replicates,
        ne_gain_seeds=estimate.seeds,
    )


def _mean(metrics: Sequence[TaskMetrics], name: str) -> float | None:
    values = [value for one in metrics if (value := getattr(one, name)) is not None]
    return float(np.mean(values)) if values else None


def _gauc(contest: _Contest, name: str) -> Gauc | None:
    found = contest.arms[name].user_aucs
    values = [one.gauc for one in found if one.gauc is not None]
    if not values:
        return None
    raised = contest.estimate_raised(name, GAUC)  # both arms share the weights, which drop out of the ratio
    return Gauc(
        gauc=float(np.mean(values)),
        users=len(found[0].users_V),
        rows=int(found[0].rows_V.sum()),
        gain=raised.gain if raised else None,
        gain_interval=raised.interval if raised else None,
        gain_seeds=raised.seeds if raised else None,
    )


def _deciles(arm: ArmMeasured) -> tuple[DecileResult, ...]:
    return tuple(
        DecileResult(
            rows=tenth[0].rows,
            predicted=float(np.mean([one.predicted for one in tenth])),
            observed=float(np.mean([one.observed for one in tenth])),
        )
        for tenth in zip(*arm.deciles, strict=True)
    )


def _segments(contest: _Contest, name: str, kind: str) -> list[Segment]:
    rows = contest.rows
    found = []
    for place, segment in enumerate(SEGMENTS):
        inside_M = rows.segments[kind] == place
        found.append(
            Segment(
                name=segment,
                rows=int(inside_M.sum()),
                users=len(np.unique(rows.users_M[inside_M])),
                positives=int(rows.labels_M[inside_M].sum()),
                gain=_gain(contest.estimate(name, contest.reference, f"{kind} {segment}")),
            )
        )
    return found
