"""Ranks have equally many rows and about as many history entries, even with one very long history; no rank hangs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.infra.balance import SLACK
from sidestack.infra.distributed import World, gather
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.convert import history_lengths
from sidestack.ranker.preparation import open_splits
from tests.datasets import joined, write_snapshot_of
from tests.distributed import run_distributed
from tests.ranker.dataset import SPEC, all_days, items, write_dataset
from tests.ranker.training import config_of, run_steps

ENTRIES = 1000
CONFIG = config_of("none", training={"batch_size": 256})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows with up to 6 entries of history each, and one with 1,000."""
    folder = tmp_path_factory.mktemp("balance")
    short = write_dataset(folder / "short", sid=None)
    days = {day: joined(short, None, day, day).drop_columns(["request_id"]) for day in all_days()}
    days[SPEC.train[0]] = with_a_long_history(days[SPEC.train[0]])
    return write_snapshot_of(folder / "long", SPEC.model_copy(update={"max_history": ENTRIES}), [items()], [], days, [])


def with_a_long_history(table: pa.Table) -> pa.Table:
    """Repeat the entries of the first history until there are 1,000."""
    place = int(np.argmax(table["history_item_ids"].combine_chunks().value_lengths().to_numpy() > 0))
    for name in ("history_item_ids", "history_times"):
        lists = table[name].to_pylist()
        lists[place] = [lists[place][0]] * ENTRIES
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(lists, table.schema.field(at).type))
    return table


def entries_and_losses(world: World, dataset: Path) -> tuple[list[list[int]], list[list[float]]]:
    """Return the entries of every rank in each batch, and the losses of all steps."""
    split, _ = open_splits(read_dataset(dataset), CONFIG)
    parts = [part.rows for part in split.open(CONFIG.training, world, is_training=True).epoch(0)]
    assert {part.num_rows for part in parts} == {256 // world.size}
    shared = [part.shared for part in parts if part.shared is not None]
    by_rank = gather(world, [int(history_lengths(requests).sum()) for requests in shared])
    return [list(each) for each in zip(*by_rank, strict=True)], run_steps(world, dataset, CONFIG, len(parts)).losses


def test_very_long_history_hangs_no_rank_and_losses_equal_those_of_one_rank(dataset: Path) -> None:
    ((one, expected),) = run_distributed(entries_and_losses, dataset, world_size=1)
    (two, losses), _ = run_distributed(entries_and_losses, dataset, world_size=2)
    assert [sum(ranks) for ranks in two] == [entries for (entries,) in one]
    assert torch.tensor(losses).allclose(torch.tensor(expected), rtol=1e-4, atol=1e-5)
    apart = sorted(abs(first - second) for first, second in two)
    # A lane's part of a batch is 32 rows, about 80 entries; the part with the long history gets almost no others.
    assert ENTRIES - SLACK < apart[-1] <= ENTRIES + 64
    assert apart[-2] < SLACK
