"""Tables that grow with the dataset: old rows keep their saved values, new ones start as initialized."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidestack.infra.checkpoint import Checkpoint, Checkpoints
from sidestack.infra.distributed import World, sum_over_ranks
from sidestack.infra.errors import CommitError
from sidestack.infra.tables import DatasetSpec, write_spec
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures, arm_features
from sidestack.ranker.reader import to_ranker_batch
from sidestack.ranker.sharding import ShardedRanker, build_sharded
from tests.distributed import run_distributed
from tests.ranker.dataset import SID, SPEC, write_dataset
from tests.ranker.joined_rows import batch_of, first_rows
from tests.ranker.test_resume import stopping, train_ranker, weights
from tests.ranker.training import config_of, whole

LARGER = SPEC.model_copy(update={"num_items": 20_000, "num_users": 75, "sparse": {"slot": 6, "topics": 11}})
"""More users, items (in more blocks of `ranker.initial`) and slots."""
SIZES = {"t_user_id": (60, 75), "t_item_id": (300, 20_000), "t_history_item_ids": (300, 20_000), "t_slot": (5, 6)}
HASHED = {"model": {"table_rows": {"item_id": 50, "history_item_ids": 1000}}}


def built(world: World, spec: DatasetSpec, **sections: Any) -> tuple[ShardedRanker, ArmFeatures]:
    config = config_of("sid_ngram", **sections)
    features = arm_features(spec, config, {"sid": SID})
    return build_sharded(features, config, world, ModelConstants()), features


def checkpoints(world: World, path: Path) -> Checkpoints:
    return Checkpoints(path, world, "ranker", {}, config_of("none"))  # same identity for all table sizes


def state_of(world: World, sharded: ShardedRanker) -> dict[str, Tensor]:
    """Return weights and row states of all tables, assembled from their shards."""
    return whole(world, {name: x for name, x in sharded.state().items() if ".t_" in name})


def trained_and_saved(world: World, dataset: Path, path: Path, **sections: Any) -> dict[str, Tensor]:
    """Take three steps on a small dataset, save a checkpoint, and return the saved tables."""
    sharded, features = built(world, SPEC, **sections)
    batch = to_ranker_batch(batch_of(first_rows(dataset)), features)
    batch.counts_2T = sum_over_ranks(world, sharded.model.module.loss.counts(batch))
    for _ in range(3):
        loss, _ = sharded.model(batch)
        loss.backward()
    checkpoints(world, path).save(Checkpoint(3, {}, {}, {}, sharded.shards(features)))
    return state_of(world, sharded)


def grown(world: World, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tables of a larger dataset as initialized, and after the checkpoint is loaded."""
    sharded, features = built(world, LARGER)
    start = state_of(world, sharded)
    assert checkpoints(world, path).load(sharded.shards(features)) is not None
    return start, state_of(world, sharded)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2)])
def test_old_rows_keep_weights_and_state_and_new_rows_start_as_initialized(
    tmp_path: Path, ranks: tuple[int, int]
) -> None:
    dataset, path = write_dataset(tmp_path / "dataset", rows_a_day=64), tmp_path / "checkpoint"
    saved = run_distributed(trained_and_saved, dataset, path, world_size=ranks[0])[0]
    start, loaded = run_distributed(grown, path, world_size=ranks[1])[0]
    assert saved.keys() == loaded.keys()
    assert sum("momentum1" in name for name in saved) == len(saved) / 2
    for name, old in saved.items():
        assert torch.equal(loaded[name][: len(old)], old), name
        assert torch.equal(loaded[name][len(old) :], start[name][len(old) :]), name
        assert (len(old), len(loaded[name])) == SIZES.get(name.split(".")[3], (len(old), len(old)))
    changed = (
        saved["model.bags.embedding_bags.t_item_id.weight"] != start["model.bags.embedding_bags.t_item_id.weight"][:300]
    )
    assert changed.any() and not changed.all()  # initial values of a row do not depend on later rows


@pytest.mark.parametrize(
    ("before", "spec", "after", "message"),
    [
        ({}, {"num_users": 59}, {}, r"t_user_id\S*: was saved with shape \(60, 8\), now has \(59, 8\)"),
        ({}, {}, HASHED, r"t_item_id\S*: was saved with shape \(300, 8\), now has \(50, 8\)"),
        (HASHED, {}, {"model": {"table_rows": {"item_id": 60}}}, r"t_item_id\S*: .* \(50, 8\), now has \(60, 8\)"),
    ],
)
def test_table_that_shrank_or_is_hashed_differently_is_refused_with_both_sizes(
    world: World, tmp_path: Path, before: Any, spec: dict[str, Any], after: Any, message: str
) -> None:
    dataset = write_dataset(tmp_path / "dataset", rows_a_day=64)
    trained_and_saved(world, dataset, tmp_path / "checkpoint", **before)
    sharded, features = built(world, SPEC.model_copy(update=spec), **after)
    with pytest.raises(CommitError, match=message):
        checkpoints(world, tmp_path / "checkpoint").load(sharded.shards(features))


def test_a_hashed_table_keeps_its_size_as_the_dataset_grows(world: World, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", rows_a_day=64)
    saved = trained_and_saved(world, dataset, tmp_path / "checkpoint", **HASHED)
    sharded, features = built(world, LARGER, **HASHED)
    assert checkpoints(world, tmp_path / "checkpoint").load(sharded.shards(features)) is not None
    loaded = state_of(world, sharded)
    for name in saved:
        if "item" in name:
            assert torch.equal(loaded[name], saved[name]), name


def growing(world: World) -> dict[str, bool]:
    """Return which tensors of the users' table may grow when its columns are sharded over two ranks."""
    sharded, features = built(world, SPEC, model={"embedding_dim": 256}, sharding={"types": ["column_wise"]})
    return {name.split(".")[-1]: x.may_grow for name, x in sharded.shards(features).items() if ".t_user_id." in name}


def test_row_states_may_not_grow_under_column_wise_sharding() -> None:
    assert run_distributed(growing, world_size=2) == [{"weight": True, "momentum1": False}] * 2


def test_a_training_resumes_after_users_and_items_were_added(world: World, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset")
    train_ranker(world, dataset, tmp_path / "whole")
    with stopping():
        train_ranker(world, dataset, tmp_path / "resumed")
    write_spec(dataset, LARGER)
    train_ranker(world, dataset, tmp_path / "resumed")
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name][: len(value)] if value.dim() else ours[name], value), name
    assert {table: len(x) for name, x in ours.items() for table in SIZES if f"{table}.weight" in name} == {
        table: larger for table, (_, larger) in SIZES.items()
    }
