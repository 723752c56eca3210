"""How many steps a training takes, by rule: batches that leave enough of them an epoch, and epochs that make enough."""


def batch_size(rows: int, least: int, largest: int, steps_an_epoch: int) -> int:
    """Return the largest power of two, between two, that leaves so many steps an epoch; the least where none does.

    Args:
        rows: of an epoch. least, largest: powers of two. steps_an_epoch: the fewest.
    """
    batch = largest
    while batch > least and rows // batch < steps_an_epoch:
        batch //= 2
    return batch


def whole_lanes(batch: int, lanes: int) -> int:
    """Return the batch, or the next larger one that so many lanes can share out (`infra.lanes.LaneReader`)."""
    return -(-batch // lanes) * lanes


def epochs_for(steps_an_epoch: int, min_steps: int, least: int, most: int) -> int:
    """Return as many epochs as make `min_steps` steps, within bounds."""
    return min(max(-(-min_steps // max(steps_an_epoch, 1)), least), most)
