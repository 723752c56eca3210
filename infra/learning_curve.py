"""The steps at which a training adds a point to its learning curve.

A short training has points too, and no point covers only a few rows.
"""

POINTS = 40
"""Points of a curve if the configuration does not set the steps between two."""


def point_every(num_steps: int, log_every: int | None) -> int:
    """Return the number of steps between two points.

    Args:
        num_steps: steps of the training. log_every: the setting; None: `POINTS` points, at most one per step.
    """
    return log_every or max(1, num_steps // POINTS)


def is_point(step: int, every: int, end: int) -> bool:
    """Return whether a point follows a step: after every window of steps, and always at the end.

    The last point covers at least half a window. If fewer steps would be left after a window, that window is extended
    to the end, because a point of only a few rows would look like a jump of the curve.

    Args:
        step: from 1 to `end`. every: the steps of a window. end: the last step.
    """
    return step == end or (step % every == 0 and 2 * (end - step) >= every)
