"""Conversion of joined rows to a batch: ids, SIDs, labels, recency, hashing, splitting and moving to a device."""

import math
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestack.infra.snapshot import read_dataset
from sidestack.infra.tables import TaskSpec
from sidestack.ranker.config import ModelConfig
from sidestack.ranker.constants import ModelConstants, read_constants
from sidestack.ranker.content import OwnContent
from sidestack.ranker.features import arm_features
from sidestack.ranker.reader import to_ranker_batch
from tests.ranker.dataset import CHAIN, CLUSTERS, ONE_TASK, SID, SIDS, SPEC, TWO_ROOTS, write_dataset
from tests.ranker.joined_rows import batch_of, features_of, first_rows, laid_out
from tests.ranker.training import config_with


def test_bags_hold_each_rows_ids_and_none_for_a_null_sid(dataset: Path) -> None:
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features_of("sid_ngram"))
    bags = batch.bags.to_dict()
    assert tuple(bags) == ("item_id", "slot", "topics", "item_sid_prefix_2", "item_sid_prefix_4", "item_sid")
    assert batch.request_bags.keys() == ["user_id"]
    for name, bag in {**bags, **batch.request_bags.to_dict()}.items():
        expected = [row if isinstance(row, list) else [row] * (row is not None) for row in table[name].to_pylist()]
        assert [ids.tolist() for ids in bag.to_dense()] == expected
    assert table["item_sid"].null_count > 0


def test_sequences_stay_aligned_when_a_sid_is_null(dataset: Path) -> None:
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features_of("sid_ngram"))
    flat = [sid for row in table["history_sids_prefix_4"].to_pylist() for sid in row]
    assert batch.sequences["history_sids_prefix_4"].values().tolist() == [sid or 0 for sid in flat]
    assert batch.history_known_TS[:, 0].tolist() == [sid is not None for sid in flat]
    assert batch.history_lengths_R.tolist() == [len(row) for row in table["history_item_ids"].to_pylist()]


def test_side_takes_ids_and_no_tables(dataset: Path) -> None:
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features_of("side"))
    assert batch.item_content_BC[:, 0].tolist() == [sid or 0 for sid in table["item_sid"].to_pylist()]
    assert batch.item_known_BS[:, 0].tolist() == [sid is not None for sid in table["item_sid"].to_pylist()]
    assert batch.sequences.keys() == ["history_item_ids"]
    assert batch.history_content_TC.shape == (len(batch.sequences.values()), 1)


def test_weights_mask_unknown_labels_and_padding(dataset: Path) -> None:
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features_of("none"))
    click, conversion = table["click"].to_pylist(), table["conversion"].to_pylist()
    assert batch.labels_BT.tolist() == [[c, v or 0] for c, v in zip(click, conversion, strict=True)]
    valid = [True] * 38 + [False] * 2
    assert batch.weights_BT.tolist() == [
        [v, v and label is not None] for v, label in zip(valid, conversion, strict=True)
    ]


@pytest.mark.parametrize("tasks", [ONE_TASK, CHAIN, TWO_ROOTS], ids=lambda tasks: "-".join(tasks))
def test_labels_follow_the_tasks_of_the_dataset_in_its_order(tmp_path: Path, tasks: dict[str, TaskSpec]) -> None:
    table = first_rows(write_dataset(tmp_path / "dataset", rows_a_day=128, tasks=tasks))
    features = arm_features(SPEC.model_copy(update={"tasks": tasks}), config_with({}), SIDS)
    assert set(tasks) < set(features.columns) and not {"click", "conversion"} & set(features.columns)
    batch = to_ranker_batch(batch_of(table), features)
    columns = [table[task].to_pylist() for task in tasks]
    assert any(None in column for column in columns)
    for b, row in enumerate(zip(*columns, strict=True)):
        assert batch.labels_BT[b].tolist() == [label or 0 for label in row]
        assert batch.weights_BT[b].tolist() == [float(b < 38 and label is not None) for label in row]


def test_recency_is_the_time_to_the_event_the_time_between_entries_and_the_rank(dataset: Path) -> None:
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features_of("none"))
    expected = []
    for at, row in zip(table["event_time"].to_pylist(), table["history_times"].to_pylist(), strict=True):
        for i, entry in enumerate(row):
            since = entry - row[i - 1] if i else timedelta(0)
            days = [gap.total_seconds() / 86400 for gap in (at - entry, since)]
            expected.append([math.log1p(days[0]), math.log1p(days[1]), math.log(len(row) - i)])
    torch.testing.assert_close(batch.history_recency_FT.t(), torch.tensor(expected))


def test_a_prefix_with_more_ids_than_rows_is_hashed_by_modulo(dataset: Path) -> None:
    features = laid_out(item="sid_ngram", history="sid_ngram", max_rows=50)
    rows = {feature.column: (feature.num_ids, feature.rows) for feature in features.sequences if feature.is_sid}
    assert rows == {"history_sids_prefix_2": (9, 9), "history_sids_prefix_4": (81, 50), "history_sids": (729, 50)}
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features)
    expected = [(sid or 0) % 50 for row in table["history_sids"].to_pylist() for sid in row]
    assert batch.sequences["history_sids"].values().tolist() == expected


def test_ids_of_any_column_are_hashed_by_modulo_when_its_table_has_fewer_rows(dataset: Path) -> None:
    rows = {"user_id": 7, "item_id": 64, "topics": 3, "history_item_ids": 50, "slot": 9}  # `slot`: more than its 5 ids
    features = arm_features(SPEC, config_with({}, model={"table_rows": rows}), SIDS)
    assert {f.column: f.rows for f in (*features.bags, *features.sequences)} == rows
    assert [f.column for f in features.bags if not f.is_hashed] == ["slot"]
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features)
    for jagged in (batch.bags, batch.sequences):
        for name in jagged.keys():  # noqa: SIM118 - not a mapping
            lists = [row if isinstance(row, list) else [row] for row in table[name].to_pylist()]
            assert jagged[name].values().tolist() == [id % rows[name] for row in lists for id in row]


def test_raw_embeddings_are_looked_up_by_ids_that_are_not_hashed(dataset: Path) -> None:
    arm = {"item": "dense", "history": "dense"}
    config = config_with(arm, model={"table_rows": {"item_id": 8, "history_item_ids": 5}})
    features = arm_features(SPEC, config, SIDS)
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features)
    items = table["item_id"].to_pylist()
    entries = [id for row in table["history_item_ids"].to_pylist() for id in row]
    assert (batch.item_content_BC[:, 0].tolist(), batch.history_content_TC[:, 0].tolist()) == (items, entries)
    assert max(batch.bags["item_id"].values()) == 7
    constants = read_constants(read_dataset(dataset), features.constants)
    for content, ids_N1, ids in (
        (features.item, batch.item_content_BC, items),
        (features.history, batch.history_content_TC, entries),
    ):
        latent = content.latent(constants)
        assert latent is not None
        assert torch.equal(latent(ids_N1, batch.item_known_BS)[0], constants.embeddings["item"][ids].float())


def test_clusters_are_unpacked_and_only_the_columns_needed_are_read(dataset: Path) -> None:
    table = first_rows(dataset)
    few = laid_out(item="kmeans", history="kmeans", sids=["clusters"], clusters=2)
    assert {name for name in few.columns if "clusters" in name} == {"item_clusters", "history_clusterss"}
    batch = to_ranker_batch(batch_of(table), few)
    number = 2**15
    flat = [sid for row in table["history_clusterss"].to_pylist() for sid in row]
    wanted = [part for sid in flat for part in ((sid or 0) // number**3, (sid or 0) // number**2 % number)]
    assert batch.sequences["history_clusterss_clusters"].values().tolist() == wanted
    assert batch.sequences["history_clusterss_clusters"].lengths().tolist() == [
        2 * len(row) for row in table["history_item_ids"].to_pylist()
    ]
    assert batch.history_known_TS[:, 0].tolist() == [sid is not None for sid in flat]
    bag = batch.bags["item_clusters_clusters"].to_dense()
    assert [len(ids) for ids in bag] == [0 if sid is None else 2 for sid in table["item_clusters"].to_pylist()]


def test_all_clusters_take_both_columns(dataset: Path) -> None:
    table, every = first_rows(dataset), laid_out(item="kmeans", sids=["clusters"])
    assert {name for name in every.columns if "clusters" in name} == {"item_clusters", "item_clusters_1"}
    bag = to_ranker_batch(batch_of(table), every).bags["item_clusters_clusters"].to_dense()
    rows = zip(table["item_clusters"].to_pylist(), table["item_clusters_1"].to_pylist(), strict=True)
    for ids, (first, second) in zip(bag, rows, strict=True):
        unpacked = [] if first is None else CLUSTERS.unpack(torch.tensor([[first, second]]))[0].tolist()
        assert ids.tolist() == unpacked


def test_side_may_unpack_a_prefix(dataset: Path) -> None:
    table = first_rows(dataset)
    features = laid_out(item="side", prefix_lengths=[4])
    assert list(features.sid_columns) == ["item_sid_prefix_4"]
    batch = to_ranker_batch(batch_of(table), features)
    content = OwnContent(features.item, ModelConfig(), ModelConstants())
    latent_BF, known_B = content.latent(batch.item_content_BC, batch.item_known_BS)
    sids = table["item_sid_prefix_4"].to_pylist()
    assert known_B.tolist() == [sid is not None for sid in sids]
    steps = torch.tensor(SID.steps)
    for row_F, sid in zip(latent_BF, sids, strict=True):
        digits = [0.0] * 4 if sid is None else [float(sid // 3 ** (3 - i) % 3) - 1 for i in range(4)]
        torch.testing.assert_close(row_F, torch.tensor(digits) * (steps / steps.mean())[:4])


def test_several_sid_sets_are_separate_columns(dataset: Path) -> None:
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), laid_out(item="side", history="side", sids=["sid", "lines"]))
    assert batch.item_content_BC.tolist() == [
        [one or 0, other or 0]
        for one, other in zip(table["item_sid"].to_pylist(), table["item_lines"].to_pylist(), strict=True)
    ]
    assert batch.item_known_BS.shape == (40, 2)
    assert batch.history_known_TS.shape == (batch.history_recency_FT.shape[1], 2)


def tensors(value: Any) -> list[Any]:
    return [one for part in value for one in tensors(part)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("arm", ["none", "kmeans", "sid_ngram", "side"])
@pytest.mark.parametrize(("rows", "rows_per_request"), [(7, 1), (20, 1), (40, 1), (16, 3), (40, 8)])
def test_split_batch_equals_parts_that_are_converted_separately(
    dataset: Path, arm: str, rows: int, rows_per_request: int
) -> None:
    sids = ["clusters"] if arm == "kmeans" else ["sid"]
    features, whole = laid_out(item=arm, history=arm, sids=sids), batch_of(first_rows(dataset), rows_per_request)
    parts = list(to_ranker_batch(whole, features).split(rows))
    for part, alone in zip(parts, (to_ranker_batch(one, features) for one in whole.split(rows)), strict=True):
        for field in fields(alone):
            found, expected = getattr(part, field.name), getattr(alone, field.name)
            if isinstance(expected, torch.Tensor):
                assert torch.equal(found, expected), field.name
            elif field.name in ("counts_2T", "source"):
                assert found is expected is None
            elif field.name == "layout":
                assert all(torch.equal(*pair) for pair in zip(tensors(found), tensors(expected), strict=True))
            else:
                assert found.keys() == expected.keys()
                assert torch.equal(found.values(), expected.values())
                assert torch.equal(found.lengths(), expected.lengths())


def test_all_tensors_of_a_batch_move_to_the_device(dataset: Path) -> None:
    batch = to_ranker_batch(batch_of(first_rows(dataset)), features_of("sid_ngram"))
    assert batch.to(torch.device("meta")).counts_2T is None
    batch.counts_2T, batch.source = torch.ones(2, 2), batch_of(first_rows(dataset))
    moved = batch.to(torch.device("meta"))
    assert moved.source is batch.source, "rows stay in host memory"
    names = [field.name for field in fields(moved) if field.name != "source"]
    parts = [part for name in names for part in tensors(getattr(moved, name))]
    assert {str(part.device if isinstance(part, torch.Tensor) else part.device()) for part in parts} == {"meta"}
