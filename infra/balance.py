"""Balance batches by weight: the cost of rows beyond their number, such as the entries of their histories."""

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

SHARE = 8
"""A batch may exceed the average weight of as many rows by 1/SHARE of it,"""
SLACK = 256
"""or by this much, if that is more: a smaller excess is not worth a change of order."""


def balance_pieces(rows_P: Integers, weights_P: Integers, batch_rows: int, room: int) -> Integers:
    """Exchange pieces of equal rows between batches until no batch weighs much more than the others, where possible.

    In each exchange, the batch furthest above its bound (`SHARE`, `SLACK`) swaps a piece for the lightest piece of as
    many rows in the lightest batch. It chooses the piece that brings it nearest to the mean. Other batches keep their
    order. A very heavy piece ends up in a batch with light ones.

    Args:
        rows_P: rows of the pieces, in their order. weights_P: weights of the pieces, at least 0.
        batch_rows: rows of a batch. room: rows that still fit into the current batch, from 1 to batch_rows.

    Returns:
        int64 [P], positions in `rows_P`; the number of rows at every position is unchanged.
    """
    end_P = np.cumsum(rows_P) + batch_rows - room
    first_P, last_P = (end_P - rows_P) // batch_rows, (end_P - 1) // batch_rows
    order_P = np.arange(len(rows_P))
    weight_G = np.bincount(first_P, weights_P, minlength=int(last_P[-1]) + 1).astype(np.int64)
    is_cut_P = first_P != last_P
    # A piece that ends in a later batch counts in each of its batches; it is not moved.
    for first, last, weight in zip(first_P[is_cut_P], last_P[is_cut_P], weights_P[is_cut_P], strict=True):
        weight_G[first + 1 : last + 1] += weight
    rows_G = np.diff(np.clip(np.arange(len(weight_G) + 1) * batch_rows, batch_rows - room, end_P[-1]))
    mean_G = rows_G * weight_G.sum() // rows_P.sum()
    bound_G = mean_G + np.maximum(mean_G // SHARE, SLACK)
    edges_G1 = np.searchsorted(first_P, np.arange(len(weight_G) + 1))
    is_open_G = np.ones(len(weight_G), bool)
    while (above_G := np.where(is_open_G, weight_G - bound_G, 0)).max() > 0:
        heavy, light = int(np.argmax(above_G)), int(np.argmin(weight_G - mean_G))
        ours_O, theirs_X = (_whole(is_cut_P, *edges_G1[batch : batch + 2]) for batch in (heavy, light))
        theirs_O = _lightest(rows_P, weights_P[order_P], theirs_X)[rows_P[ours_O]]
        gain_O = np.where(theirs_O < 0, 0, weights_P[order_P[ours_O]] - weights_P[order_P[theirs_O]])
        can_O = (gain_O > 0) & (gain_O <= bound_G[light] - weight_G[light])
        is_open_G[heavy] = can_O.any()  # else no exchange brings it nearer to the mean
        if is_open_G[heavy]:
            apart_O = np.abs(gain_O - (weight_G[heavy] - mean_G[heavy]))
            one = np.argmin(np.where(can_O, apart_O, np.iinfo(np.int64).max))
            pair = [ours_O[one], theirs_O[one]]
            order_P[pair] = order_P[pair[::-1]]
            weight_G[[heavy, light]] += np.array([-1, 1]) * gain_O[one]
    return order_P


def _whole(is_cut_P: npt.NDArray[np.bool_], low: int, high: int) -> Integers:
    """Return the positions in [low, high) of pieces that are not cut."""
    return np.flatnonzero(~is_cut_P[low:high]) + low


def _lightest(rows_P: Integers, weights_P: Integers, places: Integers) -> Integers:
    """Return, indexed by number of rows, the lightest piece of that size among `places`; -1 where there is none."""
    found = np.full(rows_P.max() + 1, -1)
    falling = places[np.argsort(weights_P[places], kind="stable")[::-1]]
    found[rows_P[falling]] = falling  # of pieces with equal rows, the last assignment wins: the lightest
    return found
