"""What the curves of a training tell: how far it learned, whether it still was learning, whether it began to overfit.

Points of a curve are means over the steps since the point before, so they are weighted by these: the last point may
stand for few.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from statistics import fmean, variance
from typing import NamedTuple

from pipelines.report.comparison import Learning
from pipelines.report.outputs import Curve, learning_curve, validation_curve


def learned(curves: Sequence[Mapping[str, Curve]], task: str) -> Learning | None:
    """Say how an arm learned a task.

    Args:
        curves: of each replicate, by name.
        task: the task.

    Returns:
        None where the training left no curve.
    """
    trained = mean_curve([learning_curve(one, task) for one in curves])
    validated = [value for _, value in mean_curve([validation_curve(one, task) for one in curves])]
    if not trained:
        return None
    end = trained[-1][0]
    before, last = _part(trained, 0.5 * end, 0.75 * end), _part(trained, 0.75 * end, end)
    assert last is not None, "the last point is in the last quarter"
    return Learning(
        train_ne=last.mean,
        late_fall=1.0 - last.mean / before.mean if before else None,
        late_fall_error=_error(before, last) if before else None,
        lowest_validation_ne=min(validated, default=None),
        last_validation_ne=validated[-1] if validated else None,
    )


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over replicates, at the steps that all of them have."""
    values = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(one) for one in values))) if values else []
    return [(step, fmean(one[step] for one in values)) for step in steps]


class _Part(NamedTuple):
    """A part of a curve: its mean, and the variance of that mean, None of a single point."""

    mean: float
    variance: float | None


def _error(before: _Part, last: _Part) -> float | None:
    """Return the standard error of the fall from one part to the next."""
    if before.variance is None or last.variance is None:
        return None
    return sqrt(before.variance + last.variance) / before.mean


def _part(curve: Curve, after: float, until: float) -> _Part | None:
    """Return the part of a curve at the steps above `after`, up to `until`; None without a point."""
    covered = [curve[0][0], *(later[0] - earlier[0] for earlier, later in pairwise(curve))]
    chosen = [(value, steps) for (step, value), steps in zip(curve, covered, strict=True) if after < step <= until]
    if not chosen:
        return None
    values, weights = zip(*chosen, strict=True)
    return _Part(fmean(values, weights), variance(values) / len(values) if len(values) > 1 else None)
