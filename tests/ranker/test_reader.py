"""From Parquet to batches: right tensors, only the arm's columns, and clear errors for bad rows."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from datetime import date, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.sid.columns import with_sid_metadata
from sidestack.infra.errors import ConfigError, DataError, SpecError
from sidestack.infra.lanes import Batch, LaneReader
from sidestack.infra.rows import Rows
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.tables import TaskSpec, request_schema
from sidestack.ranker.config import HistoryConfig, ModelConfig, RankerConfig
from sidestack.ranker.constants import ModelConstants, read_constants
from sidestack.ranker.content import OwnContent
from sidestack.ranker.features import ArmFeatures, arm_features, dataset_sids
from sidestack.ranker.newest import NewestEntries, fitting_lengths
from sidestack.ranker.reader import WHOLE, ranker_batches, to_ranker_batch
from sidestack.ranker.train import open_splits
from tests.datasets import joined, spoil, write_snapshot_of
from tests.ranker.dataset import (
    CHAIN,
    CLUSTERS,
    ONE_TASK,
    SID,
    SIDS,
    SPEC,
    TWO_ROOTS,
    all_days,
    write_dataset,
)
from tests.ranker.training import ONE, config_of, config_with, open_training

Change = Callable[[pa.Table], pa.Table]
FIRST_DAY, SECOND_DAY, LAST_DAY = date(2024, 1, 1), date(2024, 1, 2), date(2024, 1, 6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("reader") / "dataset", rows_a_day=128)


def features_of(arm: str) -> ArmFeatures:
    return arm_features(SPEC, RankerConfig(arm=arm), SIDS)


def first_rows(dataset: Path, rows: int = 40) -> pa.Table:
    return joined(dataset, None, FIRST_DAY, FIRST_DAY).slice(3, rows)


def batch_of(table: pa.Table, rows_per_request: int = 1) -> Batch:
    """Return a batch of joined rows; each `rows_per_request` consecutive rows share the first one's request columns."""
    rows = table.num_rows
    shared = [
        name
        for name in table.column_names
        if name in request_schema(SPEC).names[1:] or name.startswith(("history_", "user_"))
    ]
    requests = table.select(shared).take(pa.array(np.arange(0, rows, rows_per_request))).combine_chunks()
    own = table.drop_columns(shared).combine_chunks()
    return Batch(Rows(own, requests, np.arange(rows) // rows_per_request), np.arange(rows), np.arange(rows) < rows - 2)


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


def test_a_prefix_with_more_ids_than_rows_is_hashed_by_modulo(dataset: Path) -> None:
    features = laid_out(item="sid_ngram", history="sid_ngram", max_rows=50)
    rows = {feature.column: (feature.num_ids, feature.rows) for feature in features.sequences if feature.is_sid}
    assert rows == {"history_sids_prefix_2": (9, 9), "history_sids_prefix_4": (81, 50), "history_sids": (729, 50)}
    table = first_rows(dataset)
    batch = to_ranker_batch(batch_of(table), features)
    expected = [(sid or 0) % 50 for row in table["history_sids"].to_pylist() for sid in row]
    assert batch.sequences["history_sids"].values().tolist() == expected


@pytest.mark.parametrize(
    ("arm", "content"),
    [
        ("none", set()),
        ("side", {"item_sid", "history_sids"}),
        (
            "sid_ngram",
            {f"{base}{end}" for base in ("item_sid", "history_sids") for end in ("", "_prefix_2", "_prefix_4")},
        ),
    ],
)
def test_arm_reads_only_its_own_columns(dataset: Path, arm: str, content: set[str]) -> None:
    batch = next(open_training(dataset, arm).epoch(0))
    names = [*batch.rows.own.column_names, *batch.rows.shared.column_names]
    assert {name for name in names if "sid" in name} == content
    assert set(features_of(arm).sid_columns) == content


def sid_table(path: Path, base: str) -> str:
    """Return the table of the SIDs `sid` beside events or requests."""
    return read_dataset(path).snapshot.sids["sid"].table("sid", base)


def replace(name: str, row: int, value: object) -> Change:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        at = table.schema.get_field_index(name)
        return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))

    return change


@pytest.mark.parametrize(
    ("arm", "table", "name", "value", "rule"),
    [
        ("none", "events", "item_id", 300, r"id 300 is outside the table \[0, 300\)"),
        ("none", "requests", "user_id", -1, r"id -1 is outside the table \[0, 60\)"),
        ("none", "events", "slot", [5], r"id 5 is outside the table \[0, 5\)"),
        ("none", "requests", "topics", [2, 11], r"id 11 is outside the table \[0, 11\)"),
        ("none", "labels", "click", 2, "label 2 is not 0 or 1"),
        ("none", "events", "rank", float("nan"), "must be finite"),
        ("none", "requests", "price", float("nan"), "must be finite"),
        ("side", "sids/events", "item_sid", 729, r"id 729 is outside \[0, 729\)"),
        ("sid_ngram", "sids/events", "item_sid_prefix_2", 9, r"id 9 is outside \[0, 9\)"),
        ("sid_ngram", "sids/requests", "history_sids_prefix_4", [81], r"id 81 is outside \[0, 81\)"),
        ("side", "sids/requests", "history_sids", [0] * 7, "must have as many entries as history_item_ids"),
        ("side", "sids/requests", "history_sids", None, "must have as many entries as history_item_ids"),
    ],
)
def test_a_bad_row_is_named_by_file_row_group_column_and_rule(
    tmp_path: Path, arm: str, table: str, name: str, value: object, rule: str
) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=512, impressions=2)
    table = sid_table(path, table.removeprefix("sids/")) if "/" in table else table
    file = spoil(path, table, SECOND_DAY, replace(name, 200, value))
    group = 3 if table.endswith("requests") else 1  # a group has 64 requests, 128 impressions
    assert table in str(file)
    with pytest.raises(DataError, match=rf"^{file}, row group {group}: column '{name}': {rule}"):
        list(open_training(path, arm).epoch(0))


@pytest.mark.parametrize(
    ("arm", "table", "column"), [("none", "events", "price"), ("none", "labels", "click"), ("side", "sid", "item_sid")]
)
def test_missing_column_is_named_in_the_error(tmp_path: Path, arm: str, table: str, column: str) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=64)
    table = sid_table(path, "events") if table == "sid" else table
    file = spoil(path, table, SECOND_DAY, lambda rows: rows.drop_columns([column]))
    with pytest.raises(DataError, match=rf"^{file}, row group 0: column '{column}' is missing"):
        list(open_training(path, arm, batch_size=32).epoch(0))


@pytest.mark.parametrize(("base", "column"), [("events", "item_sid"), ("requests", "history_sids")])
def test_sids_of_another_codebook_in_one_partition_are_refused_when_read(
    tmp_path: Path, base: str, column: str
) -> None:
    def change(table: pa.Table) -> pa.Table:
        other = SID.model_copy(update={"fingerprint": "cd" * 32})
        at = table.schema.get_field_index(column)
        return table.set_column(at, with_sid_metadata(table.schema.field(at), other), table[column])

    path = write_dataset(tmp_path / "dataset", rows_a_day=64)
    file = spoil(path, sid_table(path, base), LAST_DAY, change)
    message = rf"^{file}: column '{column}' has SIDs of fingerprint cdcd.*asked for is abab"
    _, held_out = open_splits(read_dataset(path), config_of("side"))
    with pytest.raises(SpecError, match=message):
        list(held_out.open(config_of("side").training, ONE, is_training=False).epoch(0))
    _, other = open_splits(read_dataset(path), config_of("none"))  # an arm that does not read them works
    assert len(list(other.open(config_of("none").training, ONE, is_training=False).epoch(0))) == 2
    list(open_training(path, "side").epoch(0))  # other dates are read


def test_requests_that_differ_from_those_of_the_events_are_refused(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=256, impressions=2)
    swapped = pa.array([*range(70), 71, 70, *range(72, 128)])
    file = spoil(path, "requests", SECOND_DAY, lambda rows: rows.take(swapped))
    rule = "column 'request_id': row 6 is request .* must hold the same requests"
    with pytest.raises(DataError, match=rf"^{file}, row group 1: {rule}"):
        list(open_training(path, "none").epoch(0))


def requests_of(dataset: Dataset, rows_N: np.ndarray) -> list[int]:
    """Return the request of each training row."""
    return joined(dataset.path, ["request_id"], *SPEC.train)["request_id"].take(pa.array(rows_N)).to_pylist()


def test_requests_stay_whole_with_rows_per_request(tmp_path: Path) -> None:
    dataset = read_dataset(write_dataset(tmp_path / "dataset", rows_a_day=240, impressions=5))
    config = config_of("side", training={"rows_per_request": 5, "batch_size": 320, "lanes": 4})
    fitting, _ = open_splits(dataset, config)
    is_whole = []
    for batch in fitting.open(config.training, ONE, is_training=True).epoch(0):
        requests = requests_of(dataset, batch.rows_N)
        runs = [len(list(rows)) for _, rows in groupby(requests)]
        is_whole += [run == 5 for run in runs]
        assert max(Counter(requests).values()) == 5
    assert np.mean(is_whole) > 0.95  # the last request of a lane's share may be cut
    by_default = next(fitting.open(config_of("side").training, ONE, is_training=True).epoch(0))
    assert max(Counter(requests_of(dataset, by_default.rows_N)).values()) == 5
    one_by_one = config_of("side", training={"rows_per_request": 1}).training
    first = next(fitting.open(one_by_one, ONE, is_training=True).epoch(0))
    assert max(len(list(rows)) for _, rows in groupby(requests_of(dataset, first.rows_N))) < 5


def test_windows_of_days_are_read_in_order_and_shuffled_inside(dataset: Path) -> None:
    config = config_of("none", training={"window_days": 2, "lanes": 4, "batch_size": 64})
    fitting, _ = open_splits(read_dataset(dataset), config)
    batches = list(fitting.open(config.training, ONE, is_training=True).epoch(0))
    days = [sorted({at.day for at in batch.rows.column("event_time").to_pylist()}) for batch in batches]
    assert days == [[1, 2]] * 4 + [[3, 4]] * 4
    assert all((np.diff(batch.rows_N) < 0).any() for batch in batches)
    assert sorted(np.concatenate([batch.rows_N for batch in batches])) == list(range(512))


@pytest.mark.parametrize(
    ("empty", "days", "starts"),
    [
        ([], None, (0,)),
        ([], 1, (0, 8, 16, 24)),
        ([], 3, (0, 24)),
        ([2], 1, (0, 8, 16)),  # the second day has no rows
        ([1, 2], 1, (0, 8)),
        ([4], 3, (0,)),
        ([1, 2, 3, 4], 1, (0,)),
    ],
)
def test_windows_begin_with_the_first_row_of_their_days(
    tmp_path: Path, empty: list[int], days: int | None, starts: tuple[int, ...]
) -> None:
    plain = write_dataset(tmp_path / "plain", rows_a_day=8)
    given = {day: joined(plain, None, day, day).slice(0, 0 if day.day in empty else 8) for day in all_days()}
    path = write_snapshot_of(tmp_path / "dataset", SPEC, [], [], given, SIDS.values())
    fitting, _ = open_splits(read_dataset(path), config_of("none"))
    assert fitting.windows(days) == starts


def test_arm_with_content_requires_a_materialized_dataset(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "dataset", sid=None, rows_a_day=64)
    assert dataset_sids(read_dataset(path)) == {}
    with pytest.raises(SpecError, match="'side': the dataset has no SIDs 'sid'; it has none"):
        open_splits(read_dataset(path), config_of("side"))
    with pytest.raises(SpecError, match="'sid_ngram': the dataset has no SIDs 'sid'; it has none"):
        open_splits(read_dataset(path), config_of("sid_ngram"))


def laid_out(**arm: object) -> ArmFeatures:
    return arm_features(SPEC, config_with(arm), SIDS)


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


def test_table_rows_of_an_unknown_column_are_refused_listing_the_known_ones() -> None:
    known = "user_id, item_id, slot, topics, history_item_ids"
    with pytest.raises(ConfigError, match=rf"ranker\.model\.table_rows: 'price' is no id column; .* has {known}"):
        arm_features(SPEC, config_with({}, model={"table_rows": {"price": 3}}), SIDS)
    with pytest.raises(DataError, match="'user_id' has no ids; its table must have a row"):
        arm_features(SPEC.model_copy(update={"num_users": 0}), config_with({}), SIDS)


def test_all_sets_of_sids_are_found(dataset: Path) -> None:
    assert dataset_sids(read_dataset(dataset)) == SIDS


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"item": "side", "sids": ["texts"]}, r"'side': the dataset has no SIDs 'texts'; it has sid, lines, clusters"),
        ({"item": "sid_ngram", "sids": ["clusters"]}, "SIDs 'clusters' have no prefix columns"),
        ({"item": "hde", "prefix_lengths": [3]}, "'hde': the SIDs 'sid' have no prefix of 3 digits; .* has 2, 4, 6"),
        ({"item": "side", "prefix_lengths": [2, 4]}, r"prefix_lengths=\[2, 4\]; it unpacks one id"),
        ({"item": "kmeans"}, r"'kmeans': the SIDs 'sid' \(test\) are no clusters' numbers"),
        ({"item": "kmeans", "sids": ["clusters"], "clusters": 7}, "clusters=7; the SIDs 'clusters' name 6"),
    ],
)
def test_arm_that_does_not_fit_the_sids_is_refused(arm: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        laid_out(**arm)


def test_unknown_embedding_is_refused() -> None:
    with pytest.raises(DataError, match="no embedding 'image'; the dataset has words, behaviour"):
        laid_out(item="dense", embeddings=["image"])


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


def test_evaluation_reads_every_row_once(dataset: Path) -> None:
    config = config_of("none")
    _, testing = open_splits(read_dataset(dataset), config)
    batches = list(testing.open(config.training, ONE, is_training=False).epoch(0))
    rows = np.concatenate([batch.rows_N[batch.valid_N] for batch in batches])
    assert sorted(rows) == list(range(256))


def test_all_tensors_of_a_batch_move_to_the_device(dataset: Path) -> None:
    batch = to_ranker_batch(batch_of(first_rows(dataset)), features_of("sid_ngram"))
    assert batch.to(torch.device("meta")).counts_2T is None
    batch.counts_2T, batch.source = torch.ones(2, 2), batch_of(first_rows(dataset))
    moved = batch.to(torch.device("meta"))
    assert moved.source is batch.source, "rows stay in host memory"
    names = [field.name for field in fields(moved) if field.name != "source"]
    parts = [part for name in names for part in tensors(getattr(moved, name))]
    assert {str(part.device if isinstance(part, torch.Tensor) else part.device()) for part in parts} == {"meta"}
