"""Balancing batches by weight: a slow, readable reference gives the same order, and no batch exceeds its bound."""

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestack.infra.balance import SHARE, SLACK, balance_pieces

Integers = npt.NDArray[np.int64]
weights = st.lists(st.one_of(st.integers(0, 60), st.integers(0, 2000)), min_size=1, max_size=60)


class Batches:
    """The pieces in every batch, their weight and the bound on it, counted row by row."""

    def __init__(self, rows: list[int], weights: list[int], batch_rows: int, room: int) -> None:
        self.rows, self.weights, self.order = rows, weights, list(range(len(rows)))
        self.pieces: dict[int, list[int]] = {}  # positions in each batch; a piece that is cut is in several batches
        taken: dict[int, int] = {}
        at = batch_rows - room
        for position, size in enumerate(rows):
            for row in range(at, at + size):
                batch = row // batch_rows
                taken[batch] = taken.get(batch, 0) + 1
                if position not in self.pieces.setdefault(batch, []):
                    self.pieces[batch].append(position)
            at += size
        every = [position for positions in self.pieces.values() for position in positions]
        self.whole = {position for position in every if every.count(position) == 1}
        total = sum(self.weight(batch) for batch in self.pieces)
        self.mean = {batch: taken[batch] * total // sum(rows) for batch in self.pieces}
        self.bound = {batch: mean + max(mean // SHARE, SLACK) for batch, mean in self.mean.items()}

    def weight(self, batch: int) -> int:
        return sum(self.weights[self.order[position]] for position in self.pieces[batch])

    def above(self, batch: int) -> int:
        return self.weight(batch) - self.bound[batch]


def reference(rows: list[int], weights: list[int], batch_rows: int, room: int) -> list[int]:
    """Return the order that `levelled` must return, by slow and plain steps."""
    found, skipped = Batches(rows, weights, batch_rows, room), set()
    while True:
        remaining = [batch for batch in found.pieces if batch not in skipped]
        if not remaining or found.above(heavy := max(remaining, key=found.above)) <= 0:
            return found.order
        light = min(found.pieces, key=lambda batch: found.weight(batch) - found.mean[batch])
        best = None
        for ours in (position for position in found.pieces[heavy] if position in found.whole):
            alike = [other for other in found.pieces[light] if other in found.whole and rows[other] == rows[ours]]
            theirs = min(alike, key=lambda position: weights[found.order[position]], default=None)
            gain = 0 if theirs is None else weights[found.order[ours]] - weights[found.order[theirs]]
            apart = abs(gain - (found.weight(heavy) - found.mean[heavy]))
            if 0 < gain <= -found.above(light) and (best is None or apart < best[0]):
                best = apart, ours, theirs
        if best is None:
            skipped.add(heavy)
        else:
            _, ours, theirs = best
            found.order[ours], found.order[theirs] = found.order[theirs], found.order[ours]


@settings(max_examples=300, deadline=None)
@given(weights, st.integers(1, 12), st.integers(0, 11), st.integers(0, 99), st.sampled_from([1, 3]))
def test_levelled_equals_the_reference(found: list[int], batch_rows: int, begun: int, seed: int, longest: int) -> None:
    rows_P, weights_P = np.random.default_rng(seed).integers(1, longest + 1, len(found)), np.array(found)
    room = batch_rows - begun % batch_rows
    order_P = balance_pieces(rows_P, weights_P, batch_rows, room)
    assert order_P.tolist() == reference(rows_P.tolist(), found, batch_rows, room)
    assert sorted(order_P.tolist()) == list(range(len(found)))
    assert rows_P[order_P].tolist() == rows_P.tolist()


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, SLACK), min_size=1, max_size=400), st.integers(1, 40), st.integers(0, 39), st.integers(1, 5)
)
def test_batches_of_light_equal_pieces_stay_within_the_bound(
    found: list[int], batch_pieces: int, begun: int, rows: int
) -> None:
    batch_rows, room = batch_pieces * rows, (batch_pieces - begun % batch_pieces) * rows
    order_P = balance_pieces(np.full(len(found), rows), np.array(found), batch_rows, room)
    after = Batches([rows] * len(found), np.array(found)[order_P].tolist(), batch_rows, room)
    assert all(after.above(batch) <= 0 for batch in after.pieces)


@settings(max_examples=200)
@given(weights, st.integers(1, 12), st.integers(0, 11))
def test_no_batch_rises_above_its_bound_or_exceeds_it_further(found: list[int], batch_rows: int, begun: int) -> None:
    room, rows = batch_rows - begun % batch_rows, [1] * len(found)
    order_P = balance_pieces(np.array(rows), np.array(found), batch_rows, room)
    before = Batches(rows, found, batch_rows, room)
    after = Batches(rows, np.array(found)[order_P].tolist(), batch_rows, room)
    assert all(after.above(batch) <= max(before.above(batch), 0) for batch in before.pieces)
    if all(before.above(batch) <= 0 for batch in before.pieces):
        assert order_P.tolist() == list(range(len(found)))


def test_very_heavy_piece_shares_its_batch_with_light_ones() -> None:
    weights_P = np.array([1000, *[40] * 7, *[10] * 8, *[25] * 16])
    order_P = balance_pieces(np.ones(32, np.int64), weights_P, 8, 8)
    weight_GP = weights_P[order_P].reshape(4, 8)
    assert sorted({*weight_GP[0].tolist()}) == [10, 25, 1000]
    assert weight_GP[1:].sum(1).max() <= 320
