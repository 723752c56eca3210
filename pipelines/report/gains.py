"""Each arm's results from its measures: means over replicates, and gains with intervals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidestack.pipelines.report.comparison import DecileResult, Gain, MetricResult, Segment, TaskResult
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.report.measure import ArmMeasured, TaskMeasured, column_of
from sidestack.pipelines.report.segments import SEGMENTS
from sidestack.ranker.baseline.config import ARM as BASELINE
from sidestack.ranker.intervals import (
    OWN_DEVIATION,
    Sums,
    TrainingDeviation,
    estimate_gain,
    pooled_deviation,
    resample_users,
)
from sidestack.ranker.metric_registry import all_metrics

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Contest:
    """All arms on one task.

    Attributes:
        measured: the task's measures.
        sums: arm -> column of `TaskMeasured.columns` -> its sums.
        pooled: see `pooled_arms`.
        seed: of the draws of trainings. confidence: share of resamples inside an interval.
    """

    measured: TaskMeasured
    sums: Mapping[str, Mapping[str, Sums]]
    pooled: tuple[str, ...]
    seed: int
    confidence: float

    def gain(self, arm: str, other: str, column: str) -> Gain | None:
        """Return an arm's gain over another in one column; None over itself, and if it is not defined."""
        if arm == other:
            return None
        mine, theirs, better = self.sums[arm][column], self.sums[other][column], self.measured.columns[column]
        training = self._deviation(arm, other, column)
        found = estimate_gain(mine, theirs, better, training, self.seed, self.confidence)
        if found is None:
            return None
        return Gain(gain=found.gain, interval=found.interval, replicates=found.replicates, seeds=found.seeds)

    def _deviation(self, arm: str, other: str, column: str) -> TrainingDeviation:
        """Return the variation between trainings for a pair: from all pooled arms, if both are among them."""
        names = self.pooled if {arm, other} <= {*self.pooled} else (arm, other)
        found = {name: self.sums[name][column].trained_R for name in names}
        varying = [trained_R for name, trained_R in found.items() if name in (arm, other) or (trained_R > 0).all()]
        return pooled_deviation(np.stack(varying))


def pooled_arms(arms: Iterable[str], replicates: int) -> tuple[str, ...]:
    """Return the arms over which the variation between trainings is pooled; none if a pair has enough trainings itself.

    The baseline is excluded: variation over seeds in gradient boosting does not apply to rankers.
    """
    return tuple(name for name in arms if name != BASELINE) if replicates < OWN_DEVIATION else ()


def task_results(config: CompareConfig, measured: TaskMeasured) -> dict[str, TaskResult]:
    """Return every arm's results on a task."""
    contest = _contest(config, measured)
    return {name: _task_result(contest, name, config.reference) for name in measured.arms}


def _contest(config: CompareConfig, measured: TaskMeasured) -> _Contest:
    arms = measured.arms
    drawn_BK = resample_users(measured.sums_UK, config.resamples, config.seed)
    drawn_BAC = drawn_BK.reshape(config.resamples, len(arms), -1)
    sums = {}
    for at, (name, arm) in enumerate(arms.items()):
        columns = zip(measured.columns, np.stack(arm.sums_RC, axis=1), drawn_BAC[:, at].T, strict=True)
        sums[name] = {column: Sums(trained_R, drawn_B) for column, trained_R, drawn_B in columns}
    replicates = len(next(iter(arms.values())).replicates)
    return _Contest(measured, sums, pooled_arms(arms, replicates), config.seed, config.confidence)


def _task_result(contest: _Contest, name: str, reference: str) -> TaskResult:
    measured = contest.measured
    arm = measured.arms[name]
    return TaskResult(
        num=arm.replicates[0].num,
        positives=arm.replicates[0].positives,
        users=len(measured.sums_UK),
        metrics={metric: _metric_result(contest, name, metric) for metric in all_metrics()},
        deciles=_deciles(arm),
        segments={kind: tuple(_segments(contest, name, reference, kind)) for kind in measured.segments},
    )


def _metric_result(contest: _Contest, name: str, metric: str) -> MetricResult:
    found = [one.metrics[metric] for one in contest.measured.arms[name].replicates]
    values = [one.value for one in found if one.value is not None]
    if not values:
        return MetricResult(value=None)
    others = contest.measured.arms if metric in contest.measured.columns else ()
    gains = {other: contest.gain(name, other, metric) for other in others}
    return MetricResult(
        value=float(np.mean(values)),
        replicates=tuple(values),
        over={other: gain for other, gain in gains.items() if gain is not None},
        counts=found[0].counts,
    )


def _deciles(arm: ArmMeasured) -> tuple[DecileResult, ...]:
    return tuple(
        DecileResult(
            rows=tenth[0].rows,
            predicted=float(np.mean([one.predicted for one in tenth])),
            observed=float(np.mean([one.observed for one in tenth])),
        )
        for tenth in zip(*(replicate.deciles for replicate in arm.replicates), strict=True)
    )


def _segments(contest: _Contest, name: str, reference: str, kind: str) -> list[Segment]:
    return [
        Segment(
            name=segment,
            rows=found.rows,
            users=found.users,
            positives=found.positives,
            gain=contest.gain(name, reference, column_of(kind, segment)),
        )
        for segment, found in zip(SEGMENTS, contest.measured.segments[kind], strict=True)
    ]
