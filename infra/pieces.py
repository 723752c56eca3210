"""Pieces: runs of rows that stay together when rows are shuffled, such as the impressions of a request."""

import numpy as np
import numpy.typing as npt

from sidestack.infra.balance import balance_pieces

Integers = npt.NDArray[np.int64]


def piece_starts(starts: Integers | None, rows: int, keep_rows: int) -> Integers:
    """Return the rows of a row group at which its pieces begin, ascending from 0.

    Args:
        starts: the rows at which runs begin (see `RowSource.starts`); None: every row is a run.
        rows: rows of the row group. keep_rows: the most rows of a piece; a longer run is cut into pieces of this size.

    Returns:
        int64 [P].
    """
    if starts is None or keep_rows == 1:
        return np.arange(rows)
    runs_R = np.union1d(0, starts)
    lengths_R = np.diff(runs_R, append=rows)
    pieces_R = -(-lengths_R // keep_rows)
    first_R = np.cumsum(pieces_R) - pieces_R
    number_P = np.arange(pieces_R.sum()) - np.repeat(first_R, pieces_R)
    starts_P: Integers = np.repeat(runs_R, pieces_R) + number_P * keep_rows
    return starts_P


def pieces_in_batches(
    starts_P: Integers, mix_N: Integers, batch_rows: int, room: int, weights_P: Integers | None = None
) -> Integers:
    """Order rows so that pieces stay whole, follow the order of a shuffle, and fill batches by first fit.

    With weights, pieces of equal rows are then exchanged between batches to balance their weights (`infra.balance`).

    Args:
        starts_P: the first rows of the pieces, ascending from 0.
        mix_N: a permutation of the N rows; pieces are ordered by the positions of their first rows in it.
        batch_rows: rows of a batch. room: rows that still fit into the current batch, from 1 to batch_rows.
        weights_P: weights of the pieces.

    Returns:
        int64 [N], a permutation of the rows; `mix_N` itself if every piece is one row and there are no weights.
    """
    if len(starts_P) == len(mix_N) and weights_P is None:
        return mix_N
    number_N = np.full(len(mix_N), -1)  # number of the piece that begins at a row; -1: none does
    number_N[starts_P] = np.arange(len(starts_P))
    lengths_P = np.diff(starts_P, append=len(mix_N))
    order_P = number_N[mix_N]
    if len(starts_P) < len(mix_N):
        order_P = order_P[order_P >= 0]
        order_P = order_P[_first_fit(lengths_P[order_P], batch_rows, room)]
    if weights_P is not None:
        order_P = order_P[balance_pieces(lengths_P[order_P], weights_P[order_P], batch_rows, room)]
    first_P, lengths_P = starts_P[order_P], lengths_P[order_P]
    before_P = np.cumsum(lengths_P) - lengths_P
    order_N: Integers = np.arange(len(mix_N)) + np.repeat(first_P - before_P, lengths_P)
    return order_N


def _first_fit(lengths_P: Integers, batch_rows: int, room: int) -> Integers:
    """Order pieces so that each batch is filled by whole pieces as long as a remaining piece fits.

    The next piece is the first one, in the order given, that fits into the rest of the batch. If none fits, it is the
    first of all, which then ends in a later batch. The search takes O(longest piece), not O(P): pieces of one length
    are taken in order, so only the next piece of each length needs to be compared.

    Returns:
        int64 [P], positions in `lengths_P`.
    """
    num_pieces, longest = len(lengths_P), int(lengths_P.max())
    by_length_P = np.argsort(lengths_P, kind="stable")
    is_last_P = np.diff(lengths_P[by_length_P], append=0) != 0
    following_P = np.empty_like(by_length_P)  # the next piece of the same length; num_pieces: none
    following_P[by_length_P] = np.where(is_last_P, num_pieces, np.roll(by_length_P, -1))
    of_length = [num_pieces] * (longest + 1)  # the first unplaced piece of each length
    for piece, length in zip(by_length_P[::-1].tolist(), lengths_P[by_length_P[::-1]].tolist(), strict=True):
        of_length[length] = piece
    lengths, following = lengths_P.tolist(), following_P.tolist()
    order, is_placed, first = [], [False] * num_pieces, 0
    for _ in range(num_pieces):
        while is_placed[first]:
            first += 1
        piece = first
        if lengths[first] > room:
            fitting = min(of_length[: room + 1])
            piece = fitting if fitting < num_pieces else first
        order.append(piece)
        is_placed[piece] = True
        of_length[lengths[piece]] = following[piece]
        room = (room - lengths[piece]) % batch_rows or batch_rows
    return np.array(order)
