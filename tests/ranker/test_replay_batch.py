"""A batch whose loss is not finite is saved, and replaying it names the layer."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sidestack.ranker.reader
from sidestack.infra.distributed import World
from sidestack.infra.errors import DataError
from sidestack.infra.lane import Batch
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.loss_check import NonFiniteLossError
from sidestack.ranker.replay_batch import replay
from sidestack.ranker.saved_batch import read_batch, saved_ranks
from tests.distributed import run_distributed
from tests.ranker.dataset import write_dataset
from tests.ranker.test_resume import kept_checkpoints, train_ranker
from tests.ranker.training import not_a_number

ROW = 2000
"""One of the 2,048 training rows, which rank 1 of two reads."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("replay") / "dataset")


def train_on_a_bad_row(world: World, dataset: Path, out: Path, checkpoint_every: int) -> str:
    """Train with a non-finite dense feature in one row, and return the error."""
    original = sidestack.ranker.reader._block

    def block(batch: Batch, features: ArmFeatures) -> RankerBatch:
        found = original(batch, features)
        found.dense_BF[torch.from_numpy(batch.rows_N == ROW), 1] = torch.nan
        return found

    patch = pytest.MonkeyPatch()
    patch.setattr(sidestack.ranker.reader, "_block", block)
    try:
        with pytest.raises(NonFiniteLossError) as error:
            train_ranker(world, dataset, out, checkpoint_every=checkpoint_every)
    finally:
        patch.undo()
    return str(error.value)


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_bad_batch_is_saved_by_its_rank_and_replay_names_the_layer(
    world: World, dataset: Path, tmp_path: Path, checkpoint_every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "out.nonfinite"
    messages = run_distributed(train_on_a_bad_row, dataset, out, checkpoint_every, world_size=2)
    assert all(
        "click nan" in message and f"python -m sidestack.ranker.replay_batch {folder}" in message
        for message in messages
    )
    assert saved_ranks(folder) == [1]
    found = replay(folder, 1, world)
    assert found.inputs == ["dense_BF"]
    assert found.layer == "body.dense.layers.0"
    last = kept_checkpoints(out)[-1] if checkpoint_every else None
    assert (found.checkpoint and found.checkpoint.name) == last
    with pytest.raises(DataError, match="out.nonfinite: holds no batch of rank 0"):
        replay(folder, 0, world)


def test_saved_batch_round_trips(world: World, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[RankerBatch] = []

    def bad(batch: Batch, features: ArmFeatures) -> RankerBatch:
        made.append(original(batch, features))
        return made[-1]

    original = sidestack.ranker.reader.to_ranker_batch
    monkeypatch.setattr("sidestack.ranker.step_runner.to_ranker_batch", bad)
    monkeypatch.setattr("sidestack.ranker.blocks.DenseBlock.forward", not_a_number)
    with pytest.raises(NonFiniteLossError):
        train_ranker(world, dataset, tmp_path / "out", "side")
    _, found = read_batch(tmp_path / "out.nonfinite", 0)
    for one in fields(found):
        require_equal(getattr(found, one.name), getattr(made[0], one.name))


def require_equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif theirs is None:  # the counts of the global batch, which a replay of one rank does not need
        assert ours is None
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for own, other in zip(ours, theirs, strict=True):
            require_equal(own, other)
    else:
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours.values(), theirs.values())
        assert torch.equal(ours.lengths(), theirs.lengths())
