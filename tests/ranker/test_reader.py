"""Reading of splits: only the arm's columns, whole requests, windows in order, and clear errors for bad rows."""

from collections import Counter
from collections.abc import Callable
from datetime import date
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.encoder.sid.columns import with_sid_metadata
from sidestack.infra.errors import ConfigError, DataError, SpecError
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.ranker.features import arm_features, dataset_sids
from sidestack.ranker.preparation import open_splits
from tests.datasets import joined, spoil, write_snapshot_of
from tests.ranker.dataset import SID, SIDS, SPEC, all_days, write_dataset
from tests.ranker.joined_rows import features_of, laid_out
from tests.ranker.training import ONE, config_of, config_with, open_training

Change = Callable[[pa.Table], pa.Table]
SECOND_DAY, LAST_DAY = date(2024, 1, 2), date(2024, 1, 6)


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


def test_evaluation_reads_every_row_once(dataset: Path) -> None:
    config = config_of("none")
    _, testing = open_splits(read_dataset(dataset), config)
    batches = list(testing.open(config.training, ONE, is_training=False).epoch(0))
    rows = np.concatenate([batch.rows_N[batch.valid_N] for batch in batches])
    assert sorted(rows) == list(range(256))
