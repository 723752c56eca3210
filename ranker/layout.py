"""Which rows attend to which history: requests in groups of similar size, padded, for kernels over dense batches.

Rows of a request attend to one history. In a group, the histories' lengths and the numbers of rows are within a factor
of each other. Padding a group to its largest stays cheap, and a long history costs only its own length. Groups are laid
out on the host, where the lengths are known, without a GPU synchronization.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding

Integers = npt.NDArray[np.int64]

SHORT = 16
"""Histories of up to this many entries form one group; longer ones are grouped with those up to twice as long."""
ROWS_FACTOR = 4
"""Requests are grouped with those of up to this many times their rows."""


class HistoryGroup(NamedTuple):
    """G requests with a history, of up to L entries, and up to M rows each.

    Attributes:
        entries_GL: int64, the entries of each history, padded with 0. is_entry_GL: False on padding.
        rows_GM: int64, the rows of each request, padded with 0.
    """

    entries_GL: Tensor
    is_entry_GL: Tensor
    rows_GM: Tensor


class HistoryLayout(NamedTuple):
    """The histories of a batch of R requests, with B rows and T entries in total.

    Attributes:
        groups: every request with a history is in exactly one.
        place_B: int64, the place of each row among the concatenated rows of all groups; for a row without history, the
            number of these rows.
        place_T: int64, the place of each entry among the concatenated entries of all groups.
    """

    groups: tuple[HistoryGroup, ...]
    place_B: Tensor
    place_T: Tensor


def history_layout(lengths_R: Integers, rows_R: Integers) -> HistoryLayout:
    """Lay out a batch.

    Args:
        lengths_R: entries of each request's history; entries are stored request by request.
        rows_R: rows of each request, likewise; at least 1.

    Example: four requests, a to d, with lengths 2, 0, 3, 1 and 1, 2, 1, 8 rows. a and c are of similar size; b has no
    history; d has many rows, and so a group of its own (. is padding):

        entries of a batch     a a c c c d          rows of a batch    a b b c d d d d d d d d
                               0 1 2 3 4 5                             0 1 2 3 4 5 6 7 8 9 ...
        group 1: entries_GL    0 1 .                rows_GM            0
                               2 3 4                                   3
        group 2: entries_GL    5                    rows_GM            4 5 6 7 8 9 10 11
        place_T                0 1 3 4 5 6          place_B            0 10 10 1 2 3 4 5 6 7 8 9
    """
    entry_R, row_R = np.cumsum(lengths_R) - lengths_R, np.cumsum(rows_R) - rows_R
    size_R = _power(np.maximum(lengths_R, SHORT), 2) * 64 + _power(rows_R, ROWS_FACTOR)
    size_R[lengths_R == 0] = -1
    place_B, place_T = np.full(rows_R.sum(), -1), np.empty(lengths_R.sum(), np.int64)
    groups, num_rows, num_entries = [], 0, 0
    for size in np.unique(size_R[size_R >= 0]):
        chosen = np.flatnonzero(size_R == size)
        entries_GL, is_entry_GL = _padded(entry_R[chosen], lengths_R[chosen])
        rows_GM, is_row_GM = _padded(row_R[chosen], rows_R[chosen])
        place_B[rows_GM[is_row_GM]] = num_rows + np.flatnonzero(is_row_GM)
        place_T[entries_GL[is_entry_GL]] = num_entries + np.flatnonzero(is_entry_GL)
        num_rows, num_entries = num_rows + rows_GM.size, num_entries + entries_GL.size
        groups.append(HistoryGroup(*map(torch.from_numpy, (entries_GL, is_entry_GL, rows_GM))))
    place_B[place_B < 0] = num_rows
    return HistoryLayout(tuple(groups), torch.from_numpy(place_B), torch.from_numpy(place_T))


def _power(numbers_N: Integers, base: int) -> Integers:
    """Return, for each number, the exponent of the smallest power of `base` that reaches it; base is a power of 2."""
    exponents_N: Integers = np.ceil(np.log2(numbers_N) / np.log2(base)).astype(np.int64)
    return exponents_N


def _padded(starts_G: Integers, lengths_G: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Return the consecutive numbers from each start, padded with 0 to the longest, and a mask of the numbers."""
    place_X = np.arange(lengths_G.max())
    is_in_GX = place_X < lengths_G[:, None]
    return np.where(is_in_GX, starts_G[:, None] + place_X, 0), is_in_GX


class _Padded(Function):
    """The rows of a matrix gathered into groups; every row that is in a group is at exactly one place."""

    @staticmethod
    def forward(ctx: Any, values_ND: Tensor, place_N: Tensor, *groups: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(place_N)
        return tuple(embedding(places_GX, values_ND) for places_GX in groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # d values[n] = d flat[place_N[n]], as row n is at one place (or at none: the zeros behind the last place).
        # This gathers; the gradient of an embedding would scatter into new zeros for each group.
        (place_N,) = ctx.saved_tensors
        flat_PD = torch.cat([part_GXD.flatten(0, 1) for part_GXD in gradients])
        flat_PD = torch.cat([flat_PD, flat_PD.new_zeros(1, flat_PD.shape[1])])
        return flat_PD.index_select(0, place_N), None, *[None for _ in gradients]


def padded_entries(values_TD: Tensor, layout: HistoryLayout) -> tuple[Tensor, ...]:
    """Return the entries' values, [G, L, D] for each group; padding repeats some entry, and gets no gradient."""
    padded: tuple[Tensor, ...] = _Padded.apply(  # type: ignore[no-untyped-call]
        values_TD, layout.place_T, *[group.entries_GL for group in layout.groups]
    )
    return padded


def padded_rows(values_BD: Tensor, layout: HistoryLayout) -> tuple[Tensor, ...]:
    """Return the rows' values, [G, M, D] for each group, likewise."""
    padded: tuple[Tensor, ...] = _Padded.apply(  # type: ignore[no-untyped-call]
        values_BD, layout.place_B, *[group.rows_GM for group in layout.groups]
    )
    return padded


def rows_of(values_ND: Tensor, places: Tensor) -> Tensor:
    """Return the rows of a matrix at some places, in shape [*places.shape, width].

    Implemented as an embedding: the gradients of equal places are summed in one pass, in a fixed order. `index_select`
    sums them row by row on a CPU, and in any order on a GPU.
    """
    return embedding(places, values_ND)
