"""Pieces, which batches keep together: results equal those of slow, readable references."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestack.infra.pieces import piece_starts, pieces_in_batches

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=30)


def first_fit(starts: list[int], mix: list[int], batch_rows: int, room: int) -> list[int]:
    """Return the order that `pieces_in_batches` must return, computed piece by piece."""
    ends = [*starts[1:], len(mix)]
    pieces = {start: list(range(start, end)) for start, end in zip(starts, ends, strict=True)}
    waiting = [pieces[row] for row in mix if row in pieces]
    order = []
    while waiting:
        fitting = [piece for piece in waiting if len(piece) <= room]
        chosen = fitting[0] if fitting else waiting[0]
        waiting.remove(chosen)
        order += chosen
        room -= len(chosen)
        while room <= 0:
            room += batch_rows
    return order


@settings(max_examples=300)
@given(lengths, st.integers(1, 12), st.integers(0, 11), st.integers(0, 99))
def test_pieces_fill_batches_by_first_fit(sizes: list[int], batch_rows: int, begun: int, seed: int) -> None:
    starts_P = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    mix_N = np.random.default_rng(seed).permutation(sum(sizes))
    room = batch_rows - begun % batch_rows
    found_N = pieces_in_batches(starts_P, mix_N, batch_rows, room)
    assert found_N.tolist() == first_fit(starts_P.tolist(), mix_N.tolist(), batch_rows, room)


def test_piece_is_cut_only_when_none_fits() -> None:
    """Pieces of rows 0-2, 3-6 and 7-8: in batches of 4 no two fit together, in batches of 5 the first and third do."""
    mix_N = np.array([0, 3, 7, 1, 2, 4, 5, 6, 8])
    assert pieces_in_batches(np.array([0, 3, 7]), mix_N, 4, 4).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert pieces_in_batches(np.array([0, 3, 7]), mix_N, 5, 5).tolist() == [0, 1, 2, 7, 8, 3, 4, 5, 6]


def test_pieces_of_one_row_keep_the_order_of_the_shuffle() -> None:
    mix_N = np.random.default_rng(0).permutation(50)
    assert pieces_in_batches(np.arange(50), mix_N, 8, 3) is mix_N


@settings(max_examples=200)
@given(lengths, st.integers(1, 5), st.booleans())
def test_run_is_cut_after_every_keep_rows_rows(sizes: list[int], keep_rows: int, continues: bool) -> None:
    """Rows before the first start continue a run of an earlier row group and count as a run."""
    runs = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    expected = [row for run, size in zip(runs, sizes, strict=True) for row in range(run, run + size, keep_rows)]
    found = piece_starts(runs[1:] if continues else runs, sum(sizes), keep_rows)
    assert found.tolist() == expected


def test_every_row_is_a_piece_without_starts() -> None:
    assert piece_starts(None, 4, 3).tolist() == [0, 1, 2, 3]
