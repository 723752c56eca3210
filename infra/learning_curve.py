"""When a training adds a point to its learning curve: so that a short training has points too, and none is of a few
rows alone.
"""

POINTS = 40
"""Points of a curve where the configuration does not say how many steps lie between two."""


def point_every(num_steps: int, log_every: int | None) -> int:
    """Return the steps between two points of a training of so many steps; None: `POINTS` of them, one a step at most.

    Args:
        num_steps: of the training. log_every: the setting.
    """
    return log_every or max(1, num_steps // POINTS)


def is_point(step: int, every: int, end: int) -> bool:
    """Return whether a point follows a step: every so many of them, and always at the end.

    The last point is of half a window's steps at least: where fewer would be left after a window, that window runs on
    to the end, because a point of a few rows alone would look like a jump of the curve.

    Args:
        step: from 1 to `end`. every: the steps of a window. end: the last step.
    """
    return step == end or (step % every == 0 and 2 * (end - step) >= every)
