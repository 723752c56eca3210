"""Rules for the number of training steps: a batch size with enough steps an epoch, and enough epochs."""


def batch_size(rows: int, least: int, largest: int, steps_an_epoch: int) -> int:
    """Return the largest power of two within bounds that makes enough steps an epoch; `least` where none does.

    Args:
        rows: rows of an epoch. least, largest: the bounds, powers of two. steps_an_epoch: the fewest steps wanted.
    """
    batch = largest
    while batch > least and rows // batch < steps_an_epoch:
        batch //= 2
    return batch


def whole_lanes(batch: int, lanes: int) -> int:
    """Return the batch size, rounded up to a multiple of the lanes (`infra.lanes.LaneReader`)."""
    return -(-batch // lanes) * lanes


def epochs_for(steps_an_epoch: int, min_steps: int, least: int, most: int) -> int:
    """Return the number of epochs that make at least `min_steps` steps, within bounds."""
    return min(max(-(-min_steps // max(steps_an_epoch, 1)), least), most)
