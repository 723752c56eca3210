"""Held-out items, chosen by a hash of their id, so that the choice does not depend on the table's order or size."""

import numpy as np
import numpy.typing as npt

from sidestack.encoder.signals import SignalBatch, SignalSpec, concatenated, signal_batch
from sidestack.infra.lanes import LaneReader
from sidestack.infra.revisions import Revisions


def held_out(item_ids_N: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Return which items are held out: those whose hash (splitmix64's finalizer) is among the lowest.

    Args:
        item_ids_N: int64 [N].
        share: the share of all items to hold out, in [0, 1).

    Returns:
        bool [N].
    """
    with np.errstate(over="ignore"):
        x = item_ids_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x < np.uint64(int(share * 2**64))


def collect_held_out(
    reader: LaneReader, signals: SignalSpec, share: float, rows: int, revisions: Revisions
) -> SignalBatch:
    """Read the newest rows of this rank's held-out items into memory, at most `rows`.

    Args:
        reader: reads the items in order (no seed), with `signals.columns`.
        signals: which signals.
        share: see `held_out`.
        rows: the most rows to keep; reading stops there.
        revisions: the items that have several rows.
    """
    parts: list[SignalBatch] = []
    kept = 0
    for batch in reader.epoch(0):
        ids_N = batch.table[signals.id_column].to_numpy()
        chosen_N = held_out(ids_N, share) & batch.valid_N & revisions.are_newest(ids_N, batch.rows_N)
        parts.append(signal_batch(batch.table.filter(chosen_N), signals))
        kept += len(parts[-1])
        if kept >= rows:
            break
    return concatenated(parts).sliced(0, rows)
