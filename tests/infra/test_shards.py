"""Shards on disk: any cut of a tensor is read back from any other cut of it."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import infra.shards
from infra.shards import Shard, read_shards, write_shards


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
def test_parts_are_filled_from_any_other_parts(
    written: list[int], read: list[int], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    table, state = torch.arange(90.0).view(30, 3), torch.arange(30, dtype=torch.int64)
    kept, infra.shards.BLOCK_NUMBERS = infra.shards.BLOCK_NUMBERS, block
    try:
        for rank, (part, own) in enumerate(zip(cut(table, written), cut(state, written), strict=True)):
            write_shards({"a.table": [part], "state": [own]}, folder, rank)
    finally:
        infra.shards.BLOCK_NUMBERS = kept
    out, counts = torch.full_like(table, -1), torch.full_like(state, -1)
    read_shards({"a.table": cut(out, read), "state": cut(counts, read), "elsewhere": []}, folder)
    assert torch.equal(out, table)
    assert torch.equal(counts, state)


def test_columns_are_cut_too(tmp_path: Path) -> None:
    table = torch.arange(24.0).view(4, 6)
    for rank in range(2):
        write_shards({"t": [Shard((0, 3 * rank), table[:, 3 * rank : 3 * rank + 3])]}, tmp_path, rank)
    out = torch.zeros(2, 4)
    read_shards({"t": [Shard((1, 1), out)]}, tmp_path)
    assert torch.equal(out, table[1:3, 1:5])


def test_what_was_never_written_is_refused(tmp_path: Path) -> None:
    write_shards({"t": [Shard((0,), torch.zeros(4))]}, tmp_path, 0)
    with pytest.raises(ValueError, match=r"t: 3 of the 5 numbers from \(1,\) are there"):
        read_shards({"t": [Shard((1,), torch.zeros(5))]}, tmp_path)
    with pytest.raises(ValueError, match="u: 0 of the 2 numbers"):
        read_shards({"u": [Shard((0,), torch.zeros(2))]}, tmp_path)
