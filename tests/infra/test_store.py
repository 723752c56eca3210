"""The store: partitions are written atomically and once, divided between requests; invalid rows are refused."""

import threading
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestack.infra import store as store_module
from sidestack.infra.errors import CommitError, DataError
from sidestack.infra.manifest import Manifest, find_manifest, verify
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.requests import request_groups, request_starts, split_rows
from sidestack.infra.row_bytes import row_bytes
from sidestack.infra.store import (
    FILE,
    Store,
    columns_digest,
    count_labels,
    day_entries,
    in_order,
    missing_keys,
    require_same_columns_in_tables,
    write_day,
    write_part,
)
from sidestack.infra.tables import event_schema, item_schema, label_schema, request_schema
from tests.infra.made_up import DAYS, SPEC, requests, table

DAY = DAYS[0]
KEYS = {name: f"key of {name} in full" for name in ("requests", "events", "labels")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def leftovers(store: Store) -> list[Path]:
    return [path for path in store.path.rglob("*") if path.is_file()] if store.path.exists() else []


# Row groups of whole requests

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=12)


def groups_by_hand(rows: pa.Table, row_group_bytes: int) -> list[list[int]]:
    """Return the rows of each group, row by row: a group ends with the request that reaches `row_group_bytes`."""
    groups: list[list[int]] = [[]]
    reached = 0
    ids = rows["request_id"].to_pylist()
    for row, size in enumerate(row_bytes(rows).tolist()):
        begins = row > 0 and ids[row] != ids[row - 1]
        if begins and reached >= row_group_bytes:
            groups.append([])
            reached = 0
        groups[-1].append(row)
        reached += size
    return groups


@given(SIZES, st.integers(1, 2000), st.lists(st.integers(0, 72), max_size=6))
@settings(max_examples=60)
def test_groups_are_whole_requests_for_any_chunks(sizes: list[int], row_group_bytes: int, cuts: list[int]) -> None:
    rows = table(requests(DAY, sizes))
    numbered = rows.append_column("row", pa.array(range(rows.num_rows), pa.int64()))
    places = [0, *sorted(min(cut, rows.num_rows) for cut in cuts), rows.num_rows]
    chunks = [numbered.slice(low, high - low) for low, high in zip(places, places[1:], strict=False)]
    found = [group["row"].to_pylist() for group in request_groups(chunks, row_group_bytes)]
    assert found == groups_by_hand(numbered, row_group_bytes)
    assert all(group.num_columns == numbered.num_columns for group in request_groups(chunks, row_group_bytes))


@pytest.mark.parametrize(("more", "first"), [(0, 2), (1, 3)])
def test_group_ends_with_the_request_that_reaches_the_size(more: int, first: int) -> None:
    rows = table(requests(DAY, [1, 1, 1, 1]))
    size = int(row_bytes(rows)[:2].sum())
    assert next(request_groups([rows], size + more)).num_rows == first


def test_empty_chunk_gives_one_empty_group_and_no_chunks_give_none() -> None:
    assert [group.num_rows for group in request_groups([table([])], 10)] == [0]
    assert list(request_groups([], 10)) == []


@given(st.lists(st.integers(0, 3)))
def test_request_starts_are_where_the_id_changes(ids: list[int]) -> None:
    expected = [row for row, one in enumerate(ids) if row == 0 or ids[row - 1] != one]
    assert request_starts(pa.chunked_array([pa.array(ids, pa.int64())])).tolist() == expected


# Partitions


def test_partition_is_found_only_by_its_key(store: Store) -> None:
    schema = pa.schema({"x": pa.int64()})
    assert store.find("things", "part=00000", "key") is None
    with store.new_partition("things", "part=00000", "key") as made:
        made.schema = schema
        made.numbers["first"] = 7
        (made.path / "note.txt").write_text("x")
    found = store.find("things", "part=00000", "key")
    assert found is not None and (found.path, found.facts) == ("things/part=00000/key", {"first": 7})
    assert found.columns == columns_digest(schema) and found.files == ()
    assert verify(store.path / found.path).digest == found.digest
    assert store.find("things", "part=00000", "other") is None


def test_keys_with_the_same_prefix_are_distinguished(store: Store) -> None:
    with store.new_partition("things", "part=00000", "0123456789abcdef-one") as made:
        made.schema = pa.schema({"x": pa.int64()})
    with pytest.raises(CommitError, match="is of key '0123456789abcdef-one', not of '0123456789abcdef-two'"):
        store.find("things", "part=00000", "0123456789abcdef-two")


def test_failed_partition_leaves_no_files(store: Store) -> None:
    with pytest.raises(RuntimeError, match="torn"), store.new_partition("things", "part=00000", "key") as made:
        (made.path / FILE).write_text("half")
        raise RuntimeError("torn")
    assert store.find("things", "part=00000", "key") is None and leftovers(store) == []


def test_two_threads_may_write_the_same_partition(store: Store) -> None:
    both = threading.Barrier(2)
    failures: list[BaseException] = []

    def make(text: str) -> None:
        try:
            with store.new_partition("things", "part=00000", "key") as made:
                made.schema = pa.schema({"x": pa.int64()})
                (made.path / "note.txt").write_text(text)
                both.wait()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make, args=(text,)) for text in ("same", "same")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(leftovers(store)) == 2
    verify(store.path / store.entry("things", "part=00000", "key").path)


# Partitions of dates


def write(store: Store, day: date, rows: pa.Table, keys: dict[str, str] = KEYS, row_group_bytes: int = 600) -> None:
    write_day(store, day, keys, SPEC, [rows.slice(0, 5), rows.slice(5)], row_group_bytes)


def read(store: Store, name: str) -> list[pa.Table]:
    (entry,) = [one for one in day_entries(store, DAY, KEYS) if one.table == name]
    return [read_row_group(group) for group in row_groups([store.path / entry.path / FILE])]


def test_date_is_three_tables_with_the_same_row_groups(store: Store) -> None:
    rows = requests(DAY, [3, 1, 4, 1, 5, 2, 6])
    write(store, DAY, table(rows))
    found = {name: read(store, name) for name in KEYS}
    assert len(found["events"]) > 2
    assert [one.num_rows for one in found["labels"]] == [one.num_rows for one in found["events"]]
    for of_requests, events in zip(found["requests"], found["events"], strict=True):
        ids = events["request_id"].to_pylist()
        assert of_requests["request_id"].to_pylist() == list(dict.fromkeys(ids))
    for name, schema in {"requests": request_schema, "events": event_schema, "labels": label_schema}.items():
        expected = [{column: row[column] for column in schema(SPEC).names} for row in rows]
        if name == "requests":
            expected = list({row["request_id"]: row for row in expected}.values())
        assert pa.concat_tables(found[name]).to_pylist() == expected


def test_facts_of_a_date_have_the_largest_ids_and_label_counts(store: Store) -> None:
    rows = requests(DAY, [3, 1, 4, 1, 5])
    write(store, DAY, table(rows))
    facts = {entry.table: entry.facts for entry in day_entries(store, DAY, KEYS)}
    assert facts["events"] == {"max_item_id": max(row["item_id"] for row in rows)}
    shown = max((item for row in rows for item in row["history_item_ids"]), default=-1)
    assert facts["requests"] == {"max_item_id": shown, "max_user_id": max(row["user_id"] for row in rows)}
    judged = {
        "click": [row["click"] for row in rows],
        "cart": [row["cart"] for row in rows if row["click"]],
        "buy": [row["buy"] for row in rows if row["click"] and row["cart"] and row["buy"] is not None],
    }
    expected = {f"judged_{task}": len(labels) for task, labels in judged.items()}
    assert facts["labels"] == expected | {f"positive_{task}": sum(labels) for task, labels in judged.items()}
    assert 0 < expected["judged_buy"] < expected["judged_cart"]


def test_null_labels_are_not_counted() -> None:
    labels = pa.table({name: pa.nulls(3, pa.int8()) for name in SPEC.tasks})
    assert set(count_labels(labels, SPEC).values()) == {0}


def test_rewritten_labels_keep_the_row_groups_of_their_events(store: Store) -> None:
    rows = requests(DAY, [3, 1, 4, 1, 5, 2, 6])
    write(store, DAY, table([{**row, "cart": None, "buy": None} for row in rows]))
    before = {name: [one.num_rows for one in read(store, name)] for name in KEYS}
    later = {**KEYS, "labels": "another key of labels"}
    assert missing_keys(store, DAY, later) == {"labels": later["labels"]}
    write(store, DAY, table(rows), missing_keys(store, DAY, later))
    assert missing_keys(store, DAY, later) == {}
    labels = [one for one in day_entries(store, DAY, later) if one.table == "labels"][0]
    again = [group.rows for group in row_groups([store.path / labels.path / FILE])]
    assert again == before["labels"] == before["events"] and len(again) > 2


def test_further_columns_are_written_to_the_events(store: Store) -> None:
    rows = table(requests(DAY, [2, 3])).append_column("app", pa.array(list("abcde")))
    write(store, DAY, rows)
    assert pa.concat_tables(read(store, "events"))["app"].to_pylist() == list("abcde")
    assert "app" not in read(store, "requests")[0].column_names


@pytest.mark.parametrize("chunks", [[], [table([])], [table([]), table([])]])
def test_date_without_rows_has_all_columns(chunks: list[pa.Table], store: Store) -> None:
    write_day(store, DAY, KEYS, SPEC, chunks)
    other = Store(store.path.with_name("other"))
    write(other, DAY, table(requests(DAY, [2])))
    for empty, full in zip(day_entries(store, DAY, KEYS), day_entries(other, DAY, KEYS), strict=True):
        assert (empty.rows, empty.columns) == (0, full.columns)


BAD_DAYS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a request whose rows lie apart": (
        [requests(DAY, [2, 1])[row] for row in (0, 2, 1)], "column 'request_id': request 100 comes twice"
    ),
    "a request in two row groups": (
        [*requests(DAY, [9, 9, 9]), *requests(DAY, [1])], "column 'request_id': request 100 comes twice"
    ),
    "a user that differs": (
        [dict(row, user_id=number % 5) for number, row in enumerate(requests(DAY, [2]))],
        "column 'user_id': must be equal in all rows of a request; request 100 has 1 and 0",
    ),
    "a history that differs": (
        [
            dict(row, history_item_ids=[number], history_times=[datetime(2019, 1, 1)])
            for number, row in enumerate(requests(DAY, [3]))
        ],
        r"column 'history_item_ids': must be equal in all rows of a request; request 100 has \[1\] and \[0\]",
    ),
    "a feature that differs": (
        [dict(row, hour=float(number)) for number, row in enumerate(requests(DAY, [3]))],
        "column 'hour': must be equal in all rows of a request; request 100 has 1.0 and 0.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_DAYS)
def test_invalid_requests_are_refused_and_no_files_are_left(kind: str, store: Store) -> None:
    rows, message = BAD_DAYS[kind]
    with pytest.raises(DataError, match=f"events/date=2020-01-01: {message}"):
        write(store, DAY, table(rows))
    assert missing_keys(store, DAY, KEYS) == KEYS and leftovers(store) == []


def test_failing_source_leaves_no_files(store: Store) -> None:
    def chunks() -> Iterator[pa.Table]:
        yield table(requests(DAY, [4, 4, 4, 4]))
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_day(store, DAY, KEYS, SPEC, chunks(), 300)
    assert leftovers(store) == []


def test_request_columns_are_those_of_the_first_row() -> None:
    rows = requests(DAY, [1, 3, 2])
    parts = split_rows(table(rows), SPEC, "here")
    assert parts["requests"].num_rows == 3 and parts["events"].num_rows == parts["labels"].num_rows == 6
    firsts = [rows[0], rows[1], rows[4]]
    assert parts["requests"]["history_item_ids"].to_pylist() == [row["history_item_ids"] for row in firsts]


# Partitions of parts

SCHEMA = item_schema(SPEC)


def items(ids: list[int]) -> pa.Table:
    vectors = [np.array([one, 1], np.float16) if one % 3 else None for one in ids]
    columns = {
        "item_id": ids,
        "text": [f"item {one}" for one in ids],
        "vector": vectors,
        "brand": [one % 3 for one in ids],
    }
    return pa.table(columns, schema=SCHEMA)


@pytest.mark.parametrize("sizes", [[0], [7], [3, 4], [1, 1, 1, 1, 3], [0, 5, 2], [7, 0]])
def test_part_has_files_of_equal_size_for_any_chunks(
    sizes: list[int], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "FILE_ROWS", 3)
    whole, places = items(list(range(sum(sizes)))), np.cumsum([0, *sizes])
    chunks = [whole.slice(low, high - low) for low, high in zip(places, places[1:], strict=False)]
    entry = write_part(store, "item", 2, "key", 0, SCHEMA, chunks)
    assert (entry.table, entry.slice, entry.facts) == ("items", "part=00002", {"first": 0, "new": sum(sizes)})
    assert [file.rows for file in entry.files] == ([3, 3, 1] if sum(sizes) else [0])
    read = [read_row_group(group) for group in row_groups([store.path / entry.path / one.name for one in entry.files])]
    assert pa.concat_tables([SCHEMA.empty_table(), *read]).equals(whole)


def test_part_may_revise_rows_and_add_consecutive_ids(store: Store) -> None:
    entry = write_part(store, "item", 1, "key", 5, SCHEMA, [items([0, 3]), items([4, 5]), items([6])])
    assert entry.facts == {"first": 5, "new": 2} and entry.rows == 5


@pytest.mark.parametrize(
    ("first", "chunks", "rule"),
    [
        (0, [[0, 1, 1]], "ids must rise; 1 follows 1"),
        (0, [[0, 1], [1, 2]], "ids must rise; 1 follows 1"),
        (0, [[0, 2]], "new ids must continue from 0 without a gap; 1 is expected, 2 is there"),
        (0, [[0, 1], [3]], "new ids must continue from 0 without a gap; 2 is expected, 3 is there"),
        (5, [[2, 6]], "new ids must continue from 5 without a gap; 5 is expected, 6 is there"),
        (0, [[1, 2]], "new ids must continue from 0 without a gap; 0 is expected, 1 is there"),
    ],
)
def test_ids_that_are_not_consecutive_are_refused(first: int, chunks: list[list[int]], rule: str, store: Store) -> None:
    for origin, where in (("", "items/part=00001"), ("own/items/b.parquet", "own/items/b.parquet")):
        with pytest.raises(DataError, match=f"{where}: column 'item_id': {rule}"):
            write_part(store, "item", 1, "key", first, SCHEMA, [items(ids) for ids in chunks], origin)
    assert leftovers(store) == []


# Lists of partitions


def test_columns_digest_depends_on_names_and_types() -> None:
    first = pa.schema({"a": pa.int64(), "b": pa.int8()})
    others = [{"a": pa.int64()}, {"a": pa.int64(), "c": pa.int8()}, {"a": pa.int32(), "b": pa.int8()}]
    assert len({columns_digest(pa.schema(one)) for one in others} | {columns_digest(first)}) == 4
    assert columns_digest(first) == columns_digest(pa.schema([one.with_nullable(False) for one in first]))


def test_partitions_are_listed_by_table_and_slice(store: Store) -> None:
    for day in (DAYS[1], DAYS[0]):
        write(store, day, table(requests(day, [2])))
    listed = in_order([one for day in (DAYS[1], DAYS[0]) for one in day_entries(store, day, KEYS)])
    assert [f"{one.table} {one.slice[-2:]}" for one in listed] == [
        f"{table} {day}" for table in ("events", "labels", "requests") for day in ("01", "02")
    ]


def test_partitions_with_different_columns_are_refused(store: Store) -> None:
    write(store, DAYS[0], table(requests(DAYS[0], [2])))
    rows = table(requests(DAYS[1], [2]))
    write(store, DAYS[1], rows.append_column("app", pa.array([1, 2])))
    entries = [one for day in DAYS[:2] for one in day_entries(store, day, KEYS)]
    rule = "events/date=2020-01-02: column 'app' is int64, in events/date=2020-01-01 it is missing"
    with pytest.raises(DataError, match=rule):
        require_same_columns_in_tables(store, entries)
    require_same_columns_in_tables(store, [one for one in entries if one.table != "events"])


def test_manifest_of_a_partition_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, DAY, table(requests(DAY, [1, 2])))
    paths: list[Path | str] = []

    def counted(path: Path | str, **expected: str) -> Manifest | None:
        paths.append(path)
        return find_manifest(path, **expected)

    monkeypatch.setattr(store_module, "find_manifest", counted)
    again = Store(store.path)
    assert missing_keys(again, DAY, KEYS) == {}
    assert [entry.table for entry in day_entries(again, DAY, KEYS)] == list(KEYS)
    assert len(paths) == len(set(paths)) == len(KEYS)
