"""Statistics of training curves: how far an arm learned, whether it was still learning, whether it overfits.

A curve's point is a mean over the steps since the previous point. Points are weighted by these steps, as the last point
may cover few.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from statistics import fmean, variance
from typing import NamedTuple

from sidestack.pipelines.report.comparison import Learning, Training
from sidestack.pipelines.report.outputs import Curve, learning_curve, validation_curve


def summarize_learning(
    curves: Sequence[Mapping[str, Curve]], trainings: Sequence[Training], task: str
) -> Learning | None:
    """Return how an arm learned a task, as the mean over its replicates.

    Args:
        curves: of each replicate, by name. trainings: how long each was.
        task: the task.

    Returns:
        None if a training has no curve.
    """
    trained = [learning_curve(one, task) for one in curves]
    if not all(trained):
        return None
    last = _mean([_curve_part(curve, 0.75, 1.0) for curve in trained])
    before = _mean([_curve_part(curve, 0.5, 0.75) for curve in trained])
    assert last is not None, "the last point is in the last quarter"
    validated = [
        _validation_statistics(validation_curve(one, task), of) for one, of in zip(curves, trainings, strict=True)
    ]
    return Learning(
        train_ne=last.mean,
        late_fall=1.0 - last.mean / before.mean if before else None,
        late_fall_error=_error(before, last) if before else None,
        lowest_validation_ne=_mean_of([one.lowest for one in validated]),
        last_validation_ne=_mean_of([one.last for one in validated]),
        late_validation_fall=_mean_of([one.fall for one in validated]),
    )


class _ValidationStatistics(NamedTuple):
    """Validation statistics of one training; see `Learning`."""

    lowest: float | None = None
    last: float | None = None
    fall: float | None = None


def _validation_statistics(curve: Curve, training: Training) -> _ValidationStatistics:
    """Return the statistics of a validation curve.

    The curve has a point after each epoch of a search, and the arm is trained for the best number of epochs: later
    points are of epochs that it was not trained for.
    """
    values = [value for _, value in curve]
    if not values:
        return _ValidationStatistics()
    end = min(training.epochs or len(values), len(values)) if training.validation_days else len(values)
    earlier, later = values[max(end - 2, 0) : end], values[end - 1 : end + 1]
    pair = later if len(later) == 2 else earlier
    fall = 1.0 - pair[1] / pair[0] if len(pair) == 2 else None
    return _ValidationStatistics(min(values[:end]), values[end - 1], fall)


def _mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean over replicates; None if one of them has no value."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


class _CurvePart(NamedTuple):
    """A part of a curve: its mean, and the variance of that mean (None for a single point)."""

    mean: float
    variance: float | None


def _curve_part(curve: Curve, after: float, until: float) -> _CurvePart | None:
    """Return the part of a curve between two fractions of its steps; None without a point."""
    end = curve[-1][0]
    covered = [curve[0][0], *(later[0] - earlier[0] for earlier, later in pairwise(curve))]
    weighed = zip(curve, covered, strict=True)
    chosen = [(value, steps) for (step, value), steps in weighed if after * end < step <= until * end]
    if not chosen:
        return None
    values, weights = zip(*chosen, strict=True)
    return _CurvePart(fmean(values, weights), variance(values) / len(values) if len(values) > 1 else None)


def _mean(parts: Sequence[_CurvePart | None]) -> _CurvePart | None:
    """Return the mean of the same part of several curves; None if one of them has no point there."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    variances = [part.variance for part in known if part.variance is not None]
    of_mean = sum(variances) / len(parts) ** 2 if len(variances) == len(parts) else None
    return _CurvePart(fmean(part.mean for part in known), of_mean)


def _error(before: _CurvePart, last: _CurvePart) -> float | None:
    """Return the standard error of the fall from one part to the next."""
    if before.variance is None or last.variance is None:
        return None
    return sqrt(before.variance + last.variance) / before.mean
