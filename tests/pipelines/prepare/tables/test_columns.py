"""Columns of a user's own tables: further columns, other layouts, and wrong types."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.infra.distributed import ALONE
from sidestack.infra.manifest import verify
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content, joined
from tests.pipelines.prepare.growing import (
    LOG,
    Change,
    day_at,
    day_file,
    day_rows,
    read,
    rewrite,
    tables_config,
    with_column,
)
from tests.pipelines.prepare.running import run_prepare
from tests.pipelines.prepare.tables.folder import (
    EVENTS,
    ITEMS,
    USERS,
    assert_refused,
    change_rows,
    rows_of,
    second_file,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.append_column("bid", pa.array([1.0] * 50)), "column 'bid' is double, in .* it is missing"),
        (lambda t: t.append_column("seen", pa.array(["x"] * 50)), "column 'seen' is string, in .* it is int64"),
        (lambda t: t.drop_columns(["seen"]), "column 'seen' is missing, in .* it is int64"),
    ],
)
def test_added_removed_or_retyped_column_is_named(change: Change, message: str, own: Path) -> None:
    """The change is in a second file of a date, and then in the file of a later date."""

    def seen(rows: pa.Table) -> pa.Table:
        return rows.append_column("seen", pa.array(range(rows.num_rows)))

    def other(rows: pa.Table) -> pa.Table:
        return change(rows if "string" in message else seen(rows))

    for number in range(4):
        change_rows(own, str(day_file(own, day_at(number)).relative_to(own)), seen)
    run_prepare(ALONE, tables_config(own), own.parent / "first")
    added = second_file(own, lambda rows: other(rows.drop_columns(["seen"])))
    assert str(added) in assert_refused(own, message)
    added.unlink()
    day = day_at(4)
    rewrite(day_file(own, day), other(day_rows(day)))
    assert "events/date=2024-01-05" in assert_refused(own, message)


def test_a_new_column_of_a_part_is_named(own: Path) -> None:
    rows = read(own / ITEMS)
    rewrite(own / "items" / "part-00001.parquet", rows.slice(0, 3).append_column("price", pa.array([1.0] * 3)))
    assert_refused(own, "items/part=00001: column 'price' is double, in items/part=00000 it is missing")


def test_further_columns_are_kept_in_any_order_and_nullability(own: Path) -> None:
    """The contract's columns may be in any order, too, and another writer may have left out `not null`."""

    def with_further(rows: pa.Table) -> pa.Table:
        return rows.append_column("zeal", pa.array(np.arange(50.0))).append_column("app", pa.array(["x"] * 50))

    change_rows(own, EVENTS, with_further)
    for number in (0, 2, 3):
        file = day_file(own, day_at(number))
        rewrite(file, with_further(read(file)))
    second_file(own, lambda rows: pa.table({name: rows[name] for name in rows.column_names[::-1]}))
    extra = read(own / ITEMS).append_column("price", pa.array(np.arange(60.0)))
    plain = with_column("text_embedding", list, pa.list_(pa.float32()))(extra)
    plain = with_column("behaviour_embedding", list, pa.list_(pa.float16()))(plain)
    pq.write_table(plain.select(plain.column_names[::-1]), own / ITEMS, row_group_size=7)
    out = own.parent / "out"
    run_prepare(ALONE, tables_config(own), out)
    verify(out)
    dataset = read_dataset(out)
    rows = joined(out, ["item_id", "zeal", "app"], day_at(1), day_at(1))
    assert rows["zeal"].to_pylist() == 2 * list(range(50)) and set(rows["app"].to_pylist()) == {"x"}
    items = content(dataset, "items")
    assert items["price"].to_pylist() == list(range(60))
    assert items["text_embedding"].to_pylist() == extra["text_embedding"].to_pylist()


LARGE = {pa.string(): pa.large_string()}


def in_large_layouts(content: pa.Table) -> pa.Table:
    """Return the rows as polars writes them."""

    def large(kind: pa.DataType) -> pa.DataType:
        is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
        return pa.large_list(kind.value_type) if is_list else LARGE.get(kind, kind)

    return pa.table(
        {
            name: content[name].combine_chunks().cast(large(content.schema.field(name).type))
            for name in content.schema.names
        }
    )


def test_tables_in_large_layouts_become_the_same_snapshot(own: Path, prepared: Path) -> None:
    for path in own.rglob("*.parquet"):
        pq.write_table(in_large_layouts(read(path)), path, row_group_size=20)
    assert pq.read_schema(own / EVENTS).field("history_times").type == pa.large_list(pa.timestamp("us"))
    assert pq.read_schema(own / ITEMS).field("text").type == pa.large_string()
    out = own.parent / "out"
    run_prepare(ALONE, tables_config(own), out)
    assert rows_of(out).equals(rows_of(prepared))
    for table in ("items", "users"):
        assert content(read_dataset(out), table).equals(content(read_dataset(prepared), table))


def test_files_of_a_table_may_have_further_columns_in_different_layouts(own: Path) -> None:
    for number, kind in enumerate(
        (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
    ):
        path = day_file(own, day_at(number))
        rows = read(path)
        pq.write_table(rows.append_column("page", pa.array(["home"] * rows.num_rows, kind)), path)
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    assert joined(own.parent / "out", ["page"])["page"].unique().to_pylist() == ["home"]


def test_all_columns_of_a_wrong_type_are_reported_together(own: Path) -> None:
    narrow = with_column("user_id", list, pa.int32())(with_column("click", list, pa.int64())(read(own / EVENTS)))
    rewrite(own / EVENTS, narrow.drop_columns(["slot"]))
    message = assert_refused(own, "column 'user_id' has type int32, must be int64")
    assert "column 'click' has type int64, must be int8" in message and "column 'slot' is missing" in message


def test_wrong_types_of_all_tables_are_reported_together(own: Path) -> None:
    """Spark and polars write such types: zoned times, doubles, ids and labels of other widths."""
    items, users, events = (read(own / name) for name in (ITEMS, USERS, EVENTS))
    rewrite(own / ITEMS, with_column("item_id", list, pa.int32())(with_column("brand", list, pa.int64())(items)))
    rewrite(own / USERS, with_column("user_id", lambda ids: map(str, ids), pa.string())(users))
    wide = with_column("event_time", list, pa.timestamp("us", "UTC"))(events)
    for name in LOG.spec.tasks:
        wide = with_column(name, list, pa.int32())(wide)
    for name in LOG.spec.all_dense:
        wide = with_column(name, list, pa.float64())(wide)
    for day in range(4):
        rewrite(day_file(own, day_at(day)), wide)
    message = assert_refused(own, rf"{own / ITEMS}: column 'item_id' has type int32, must be int64")
    newest = str(day_file(Path(), day_at(3)))
    wrong = [
        (ITEMS, "brand", "int64, must be int32"),
        (USERS, "user_id", "string, must be int64"),
        *((newest, name, "int32, must be int8") for name in LOG.spec.tasks),
        *((newest, name, "double, must be float") for name in LOG.spec.all_dense),
        (newest, "event_time", r"timestamp[us, tz=UTC], must be timestamp[us]"),
    ]
    assert set(message.splitlines()[1:]) == {
        f"{own / file}: column {name!r} has type {rule}" for file, name, rule in wrong
    }


def test_null_fixed_size_lists_of_another_writer_get_a_hint(own: Path) -> None:
    pq.write_table(read(own / ITEMS), own / ITEMS)
    assert_refused(own, "row group 0.*write embeddings with nulls as plain lists")
