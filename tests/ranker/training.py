"""Short trainings for the tests: a few steps of one arm on one or more ranks."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from sidestack.infra.config import parse
from sidestack.infra.distributed import World, gather
from sidestack.infra.lanes import LaneReader
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.blocks import DenseBlock
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.constants import read_constants
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.sharding import ShardedRanker, build_sharded
from sidestack.ranker.step_runner import StepRunner
from sidestack.ranker.trainer import learning_rates

ONE = World(0, 1, 0, torch.device("cpu"), "gloo")

SMALL: dict[str, Any] = {
    "model": {"embedding_dim": 8, "dense_hidden": 8, "content_hidden": 8, "cross_rank": 8, "over_arch": [16, 8]},
    "training": {
        "epochs": 1,
        "batch_size": 64,
        "eval_batch_size": 64,
        "validation_days": 0,
        "warmup_steps": 4,
        "log_every": 8,
    },
}


ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "dense": {"item": "dense", "history": "dense"},
    "kmeans": {"item": "kmeans", "history": "kmeans", "sids": ["clusters"], "clusters": 3, "max_rows": 500},
    "sid_ngram": {"item": "sid_ngram", "history": "sid_ngram"},
    "hde": {"item": "hde", "history": "hde", "prefix_lengths": [2, 6]},
    "side": {"item": "side", "history": "side"},
    "side_lines": {"item": "side", "history": "side", "sids": ["lines"]},
    "side_two": {"item": "side", "history": "side", "sids": ["sid", "lines"]},
    "ngram_two": {"history": "sid_ngram", "sids": ["sid", "lines"], "prefix_lengths": [2]},
}
"""Every kind of content, over the sets of SIDs of the tests' dataset."""


def config_of(arm: str, **sections: dict[str, Any]) -> DecidedConfig:
    """Return a small configuration of one arm, with settings laid over it by section."""
    values = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return parse(DecidedConfig, {"arms": ARMS, "arm": arm, **values}, "test").resolved()


def config_with(arm: dict[str, Any], **sections: dict[str, Any]) -> RankerConfig:
    """Return a configuration of one arm by its settings."""
    return parse(RankerConfig, {"arms": {"a": arm}, "arm": "a", **sections}, "test")


def open_training(dataset: Path, arm: str, **training: Any) -> LaneReader:
    """Open the training split on one rank."""
    config = config_of(arm, training=training)
    fitting, _ = open_splits(read_dataset(dataset), config)
    return fitting.open(config.training, ONE, is_training=True)


@dataclass(frozen=True)
class Outcome:
    """Result of some steps of training.

    Attributes:
        losses: mean loss by step and task. plan: table -> sharding type.
        start: every parameter whole, by name, before the first step. weights: after the last.
        states: every optimizer state whole, by name.
    """

    losses: list[list[float]]
    plan: dict[str, str]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]
    states: dict[str, Tensor]


def run_steps(world: World, dataset: Path, config: DecidedConfig, steps: int) -> Outcome:
    """Train `steps` steps on every rank, and return the outcome."""
    fitting, _ = open_splits(read_dataset(dataset), config)
    sharded = build_sharded(
        fitting.features, config, world, read_constants(read_dataset(dataset), fitting.features.constants)
    )
    start = whole_weights(world, sharded)
    reader = fitting.open(config.training, world, is_training=True)
    losses: list[list[float]] = []
    newest = NewestEntries(config.model.history)
    epoch = StepRunner(sharded, fitting.features, world, newest).run(reader, 0)
    for step in range(steps):
        sharded.set_learning_rates(*learning_rates(config.training, step, reader.num_batches))
        _, output = next(epoch)
        losses.append((output.totals_3T[0] / output.totals_3T[1].clamp(min=1)).tolist())
    assert isinstance(epoch, Generator)
    epoch.close()
    plan = {table.name: table.sharding for table in sharded.plan.tables}
    return Outcome(losses, plan, start, whole_weights(world, sharded), whole_states(world, sharded))


def not_a_number(block: DenseBlock, dense_BF: Tensor) -> Tensor:
    """Replace `DenseBlock.forward` by that of a training that diverged."""
    return torch.full((len(dense_BF), 2, 8), float("nan"))


def named(name: str) -> Callable[[str], str]:
    """Return a function that puts a name before a message of `torch.testing.assert_close`."""
    return lambda message: f"{name}: {message}"


def whole_weights(world: World, sharded: ShardedRanker) -> dict[str, Tensor]:
    """Return every parameter by name, assembled from its shards."""
    return whole(world, sharded.model.state_dict())


def whole_states(world: World, sharded: ShardedRanker) -> dict[str, Tensor]:
    """Return every optimizer state by parameter and name, assembled from its shards."""
    found = {}
    for parameter, states in sharded.optimizer.state_dict()["state"].items():
        for name, value in states.items():
            if isinstance(value, Tensor):
                found[f"{parameter}/{name.split('.')[-1]}"] = value
    return whole(world, found)


def whole(world: World, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Assemble sharded tensors on every rank; a rank may lack those that it holds no part of."""
    parts = {name: _parts(value) for name, value in values.items()}
    by_name: dict[str, list[tuple[list[int], Tensor]]] = {}
    for rank_parts in gather(world, parts):
        for name, pieces in rank_parts.items():
            by_name.setdefault(name, []).extend(pieces)
    return {name: _assembled(pieces) for name, pieces in by_name.items() if pieces}


def _parts(value: Tensor) -> list[tuple[list[int], Tensor]]:
    if not isinstance(value, ShardedTensor):
        return [([0] * value.dim(), value.detach().clone())]
    return [(shard.metadata.shard_offsets, shard.tensor.detach().clone()) for shard in value.local_shards()]


def _assembled(pieces: list[tuple[list[int], Tensor]]) -> Tensor:
    ends = [[at + size for at, size in zip(offsets, part.shape, strict=True)] for offsets, part in pieces]
    out = torch.zeros([max(axis) for axis in zip(*ends, strict=True)])
    for offsets, part in pieces:
        out[tuple(slice(at, at + size) for at, size in zip(offsets, part.shape, strict=True))] = part
    return out
