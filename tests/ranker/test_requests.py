"""Columns of a request are computed once, with the results of the row-by-row form."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from sidestack.infra.distributed import World
from sidestack.infra.lane import Batch
from sidestack.infra.rows import concatenated
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.constants import read_constants
from sidestack.ranker.features import ArmFeatures, arm_features
from sidestack.ranker.reader import to_ranker_batch
from sidestack.ranker.sharding import ShardedRanker, build_sharded
from tests.ranker.dataset import REQUEST_SPEC, SIDS, SPEC, write_dataset
from tests.ranker.training import config_of, named, open_training, whole_weights

OPTIONS: dict[str, Any] = {"heads": 2, "encoder_layers": 1, "pooling": "target"}
ARMS = ("none", "dense", "sid_ngram", "hde", "side")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("requests") / "dataset", rows_a_day=192, impressions=6)


def whole_requests(dataset: Path, features_of: str) -> Batch:
    """Read one batch whose requests are whole where they fit."""
    return next(open_training(dataset, features_of, rows_per_request=6, batch_size=64).epoch(0))


def row_by_row(batch: Batch) -> Batch:
    """Return the batch with each row as a request of its own: the slow form."""
    return replace_rows(batch, [batch.rows.slice(at, 1) for at in range(batch.rows.num_rows)])


def replace_rows(batch: Batch, parts: list[Any]) -> Batch:
    return batch._replace(rows=concatenated(parts).in_one_chunk())


def gradients(sharded: ShardedRanker, batch: Batch, features: ArmFeatures) -> tuple[Tensor, dict[str, Tensor]]:
    """Train one step; return the probabilities, and the loss with the gradients of the network."""
    sharded.dense_optimizer.zero_grad()
    loss, output = sharded.model(to_ranker_batch(batch, features))
    loss.backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in sharded.model.module.body.named_parameters()
        if parameter.grad is not None
    }
    return output.probabilities_BT, {"loss": loss.detach(), **found}


def model_of(world: World, dataset: Path, config: DecidedConfig) -> tuple[ShardedRanker, ArmFeatures]:
    features = arm_features(REQUEST_SPEC, config, SIDS)
    return build_sharded(features, config, world, read_constants(read_dataset(dataset), features.constants)), features


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("history", [{}, OPTIONS], ids=["pma", "options"])
def test_probabilities_losses_and_gradients_equal_those_of_the_row_by_row_form(
    world: World, dataset: Path, arm: str, history: dict[str, Any]
) -> None:
    config = config_of(arm, model={"history": history})
    batch = whole_requests(dataset, arm)
    assert batch.rows.num_runs < batch.rows.num_rows / 3
    slow = row_by_row(batch)
    assert slow.rows.num_runs == batch.rows.num_rows
    (once, features), (each, _) = model_of(world, dataset, config), model_of(world, dataset, config)
    (p_BT, found), (expected_BT, expected) = gradients(once, batch, features), gradients(each, slow, features)
    torch.testing.assert_close(p_BT, expected_BT)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=named(name))
    # The tables' own optimizer ran inside the backward pass.
    weights, wanted = whole_weights(world, once), whole_weights(world, each)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-6, msg=named(name))


def test_batch_holds_each_history_once_per_request(dataset: Path) -> None:
    features = arm_features(REQUEST_SPEC, config_of("sid_ngram"), SIDS)
    batch = whole_requests(dataset, "sid_ngram")
    lengths = [len(history) for history in batch.rows.shared["history_item_ids"].to_pylist()]
    converted = to_ranker_batch(batch, features)
    assert converted.sequences["history_item_ids"].lengths().tolist() == lengths
    assert converted.sequences.stride() == converted.request_bags.stride() == batch.rows.num_runs
    assert converted.bags.stride() == 64
    assert converted.history_recency_FT.shape == (3, sum(lengths))


def with_long_history(requests: pa.Table, columns: tuple[str, ...], entries: int) -> pa.Table:
    """Repeat the entries of the longest history in place, in every history column."""
    lengths = [len(history) for history in requests["history_item_ids"].to_pylist()]
    longest, times = int(np.argmax(lengths)), -(-entries // max(lengths))
    for name in columns:
        lists, field = requests[name].to_pylist(), requests.schema.field(name)
        lists[longest] = [entry for entry in lists[longest] for _ in range(times)][:entries]
        at = requests.schema.get_field_index(name)
        requests = requests.set_column(at, field, pa.array(lists, field.type))
    return requests


def test_very_long_history_has_bounded_padding_and_finite_gradients(world: World, dataset: Path) -> None:
    sharded, features = model_of(world, dataset, config_of("side"))
    batch = whole_requests(dataset, "side")
    shared = with_long_history(batch.rows.shared, features.sequence_columns, 10_000)
    long = batch._replace(rows=replace(batch.rows, shared=shared))
    groups = to_ranker_batch(long, features).layout.groups
    assert sum(group.entries_GL.numel() for group in groups) <= 10_000 + SPEC.max_history * batch.rows.num_runs
    _, found = gradients(sharded, long, features)
    assert all(value.isfinite().all() for value in found.values())
