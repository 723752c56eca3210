"""Initial weights depend only on seed and name, not on sharding or arm."""

import pytest
import torch
from torch import nn

from sidestack.ranker.initial import BLOCK_ROWS, TABLE_BOUND, fill_dense, fill_table

ROWS, DIM = BLOCK_ROWS + 100, 8


def whole(seed: int = 0, name: str = "t") -> torch.Tensor:
    table = torch.empty(ROWS, DIM)
    fill_table(table, name, seed, 0, 0, DIM)
    return table


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((0, 50), (0, 8)), ((50, ROWS), (0, 8)), ((BLOCK_ROWS - 3, BLOCK_ROWS + 3), (0, 8)), ((10, 90), (4, 8))],
)
def test_a_shard_holds_its_part_of_the_whole_table(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    shard = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
    fill_table(shard, "t", 0, rows[0], columns[0], DIM)
    assert torch.equal(shard, whole()[rows[0] : rows[1], columns[0] : columns[1]])


def test_tables_differ_by_name_and_seed_and_stay_in_bounds() -> None:
    table = whole()
    assert not torch.equal(table, whole(seed=1))
    assert not torch.equal(table, whole(name="u"))
    assert not torch.equal(table[:100], table[BLOCK_ROWS:])
    assert TABLE_BOUND * 0.9 < table.abs().max() <= TABLE_BOUND


def test_dense_weights_do_not_depend_on_other_modules() -> None:
    small = nn.ModuleDict({"b": nn.Linear(4, 3)})
    large = nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(4, 3)})
    fill_dense(small, 5)
    fill_dense(large, 5)
    weight, bias = small.get_parameter("b.weight"), small.get_parameter("b.bias")
    assert torch.equal(weight, large.get_parameter("b.weight"))
    assert bias.abs().max() == 0
    assert weight.std() > 0
