"""Histories cut to their newest entries, by a bound on one history or on a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidestack.infra.lanes import LaneReader
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.config import HistoryConfig
from sidestack.ranker.newest import NewestEntries, fitting_lengths
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.reader import WHOLE, ranker_batches, to_ranker_batch
from tests.ranker.joined_rows import batch_of, features_of, first_rows
from tests.ranker.training import ONE, config_of


@pytest.mark.parametrize("arm", ["sid_ngram", "side"])
def test_a_history_longer_than_the_bound_keeps_its_newest_entries_in_every_column(dataset: Path, arm: str) -> None:
    table, features = first_rows(dataset), features_of(arm)
    newest = NewestEntries(HistoryConfig(max_length=2))
    found = newest.of(batch_of(table), features, 40, 1).rows.joined(table.column_names)
    for name in table.column_names:
        rows = table[name].to_pylist()
        expected = [row[-2:] for row in rows] if name.startswith("history_") and name in features.columns else rows
        assert found[name].to_pylist() == expected
        assert found.schema.field(name).equals(table.schema.field(name), check_metadata=True)
    lengths = [len(row) for row in table["history_item_ids"].to_pylist()][:-2]  # two rows are padding
    assert newest.counts == (sum(lengths), sum(max(0, length - 2) for length in lengths))
    assert newest.entries_cut > 0
    batch = to_ranker_batch(newest.of(batch_of(table), features, 40, 1), features)
    assert batch.history_lengths_R.max() == 2
    assert batch.history_recency_FT.shape[1] == len(batch.sequences["history_item_ids"].values())


@pytest.mark.parametrize("bounds", [{}, {"max_length": 6}, {"max_entries": 10_000}], ids=str)
def test_bound_that_no_history_reaches_is_a_no_op(dataset: Path, bounds: dict[str, Any]) -> None:
    batch, newest = batch_of(first_rows(dataset)), NewestEntries(HistoryConfig(**bounds))
    assert newest.of(batch, features_of("side"), 40, 1) is batch
    assert newest.entries_cut == 0


def cut_to_the_longest_length_that_fits(lengths: list[int], most: int) -> list[int]:
    """Return `fitting_lengths` of one share, found by trying every length."""
    return max(cut for length in range(51) if sum(cut := [min(each, length) for each in lengths]) <= most)


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_histories_of_a_share_are_cut_to_one_length_until_all_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    share_R = np.sort(rng.integers(0, 4, 30))
    lengths_R = rng.integers(0, rng.integers(2, 50), 30)
    most = int(rng.integers(1, 200))
    fitting_R = fitting_lengths(lengths_R, share_R, most)
    for share in range(4):
        own = share_R == share
        expected = cut_to_the_longest_length_that_fits(lengths_R[own].tolist(), most)
        assert fitting_R[own].tolist() == expected
        assert fitting_R[own].sum() <= most


@pytest.mark.parametrize("world_size", [2, 4])
def test_bound_of_entries_per_batch_cuts_the_same_for_any_number_of_ranks(dataset: Path, world_size: int) -> None:
    config = config_of("none", model={"history": {"max_entries": 96}})
    features, newest = features_of("none"), NewestEntries(config.model.history)
    split, _ = open_splits(read_dataset(dataset), config)

    def lengths(rank: int, world_size: int) -> list[list[int]]:
        reader = LaneReader(
            split.rows(), batch_size=64, lanes=8, rank=rank, world_size=world_size, seed=0, keep_rows=WHOLE
        )
        batches = ranker_batches(reader, range(1), 0, features, newest, ONE)
        return [batch.history_lengths_R[batch.request_B].tolist() for batch in batches]

    alone, parts = lengths(0, 1), [lengths(rank, world_size) for rank in range(world_size)]
    assert alone == [sum(batch, []) for batch in zip(*parts, strict=True)]
    assert max(map(sum, alone)) <= 96
    assert newest.entries_cut > 0
