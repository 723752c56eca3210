"""Tensor shards on disk: a tensor that was saved in some shards is loaded into any other shards."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sidestack.infra.shards
from sidestack.infra.shards import Shard, Spread, read_shards, write_shards


def cut(tensor: Tensor, places: list[int]) -> list[Shard]:
    """Cut a tensor's rows at some places."""
    edges = [0, *sorted(places), len(tensor)]
    rest = (0,) * (tensor.dim() - 1)
    return [Shard((low, *rest), tensor[low:high]) for low, high in zip(edges[:-1], edges[1:], strict=True)]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    written=st.lists(st.integers(0, 30), max_size=3),
    read=st.lists(st.integers(0, 30), max_size=3),
    block=st.sampled_from([1, 12, 1 << 26]),
)
def test_shards_are_restored_from_any_other_sharding(
    written: list[int], read: list[int], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    table, state = torch.arange(90.0).view(30, 3), torch.arange(30, dtype=torch.int64)
    kept, sidestack.infra.shards.BLOCK_NUMBERS = sidestack.infra.shards.BLOCK_NUMBERS, block
    try:
        for rank, (part, own) in enumerate(zip(cut(table, written), cut(state, written), strict=True)):
            write_shards({"a.table": Spread((30, 3), [part]), "state": Spread((30,), [own])}, folder, rank)
    finally:
        sidestack.infra.shards.BLOCK_NUMBERS = kept
    out, counts = torch.full_like(table, -1), torch.full_like(state, -1)
    parts, counted = cut(out, read), cut(counts, read)
    read_shards({"a.table": Spread((30, 3), parts), "state": Spread((30,), counted)}, folder)
    assert torch.equal(out, table)
    assert torch.equal(counts, state)


def test_column_shards_are_restored(tmp_path: Path) -> None:
    table = torch.arange(24.0).view(4, 6)
    for rank in range(2):
        half = Shard((0, 3 * rank), table[:, 3 * rank : 3 * rank + 3])
        write_shards({"t": Spread((4, 6), [half])}, tmp_path, rank)
    out = torch.zeros(2, 4)
    read_shards({"t": Spread((4, 6), [Shard((1, 1), out)])}, tmp_path)
    assert torch.equal(out, table[1:3, 1:5])


def test_missing_numbers_are_refused(tmp_path: Path) -> None:
    for rank, first in enumerate((0, 6)):  # rows 4 and 5 are on no rank
        write_shards({"t": Spread((8,), [Shard((first,), torch.zeros(4 - 2 * rank))])}, tmp_path, rank)
    with pytest.raises(ValueError, match=r"t: 5 of the 7 numbers from \(1,\) are there"):
        read_shards({"t": Spread((8,), [Shard((1,), torch.zeros(7))])}, tmp_path)
    with pytest.raises(ValueError, match="u: was not saved"):
        read_shards({"u": Spread((2,), [Shard((0,), torch.zeros(2))], may_grow=True)}, tmp_path)


@given(saved=st.integers(1, 12), new=st.integers(0, 8), places=st.lists(st.integers(0, 20), max_size=3))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_growing_tensor_keeps_its_new_rows(
    saved: int, new: int, places: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("grown")
    old = torch.arange(2.0 * saved).view(saved, 2)
    write_shards({"t": Spread((saved, 2), [Shard((0, 0), old)])}, folder, 0)
    out = torch.full((saved + new, 2), -1.0)
    parts = cut(out, [min(place, saved + new) for place in places])
    read_shards({"t": Spread((saved + new, 2), parts, may_grow=True)}, folder)
    assert torch.equal(out, torch.cat([old, torch.full((new, 2), -1.0)]))


@pytest.mark.parametrize("may_grow", [True, False])
@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (4, 3)])
def test_other_shape_is_refused_and_both_are_named(tmp_path: Path, shape: tuple[int, int], may_grow: bool) -> None:
    write_shards({"t": Spread((4, 2), [Shard((0, 0), torch.zeros(4, 2))])}, tmp_path, 0)
    now = {"t": Spread(shape, [Shard((0, 0), torch.zeros(shape))], may_grow)}
    if may_grow and shape == (5, 2):
        read_shards(now, tmp_path)
        return
    with pytest.raises(ValueError, match=rf"t: was saved with shape \(4, 2\), now has \({shape[0]}, {shape[1]}\)"):
        read_shards(now, tmp_path)
