"""A user's own folder: what is right becomes partitions, and every kind of wrong input is refused by name and rule."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import SidestackError
from sidestack.infra.impressions import all_columns
from sidestack.infra.manifest import verify
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content, joined
from tests.distributed import run_distributed
from tests.pipelines.prepare.growing import (
    LOG,
    Change,
    add_items,
    day_at,
    day_file,
    day_rows,
    labels_apart,
    masked,
    read,
    rewrite,
    tables_config,
    with_column,
    with_value,
    without_counts,
    write_folder,
)
from tests.pipelines.prepare.running import leftovers, made_of, run_prepare

EVENTS = "events/date=2024-01-02/part-00000.parquet"
ITEMS = "items/part-00000.parquet"
USERS = "users/part-00000.parquet"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a valid folder, for tests that do not change it."""
    return write_folder(tmp_path_factory.mktemp("good") / "own", days=4)


@pytest.fixture(scope="module")
def prepared(good: Path) -> Path:
    """Prepare the snapshot of the valid folder."""
    run_prepare(ALONE, tables_config(good), good.parent / "out")
    return good.parent / "out"


@pytest.fixture
def own(good: Path, tmp_path: Path) -> Path:
    """Return a copy of the valid folder, for tests that change it."""
    return Path(shutil.copytree(good, tmp_path / "own"))


def rows_of(out: Path) -> pa.Table:
    return joined(out, all_columns(read_dataset(out)))


def refused(folder: Path, message: str, **settings: Any) -> str:
    """Check that a folder is refused and that nothing of the snapshot is left; return the error's message."""
    out = folder.parent / "out"
    with pytest.raises(SidestackError, match=message) as caught:
        run_prepare(ALONE, tables_config(folder, **settings), out)
    assert not out.exists() and leftovers(folder.parent) == []
    return str(caught.value)


def changed(folder: Path, name: str, change: Change) -> None:
    rewrite(folder / name, change(read(folder / name)))


def late_history(content: pa.Table) -> pa.Table:
    event = content["event_time"][30].as_py()
    return with_value("history_times", 30, [*content["history_times"][30].as_py()[:-1], event])(content)


def null_in_history(content: pa.Table) -> pa.Table:
    """Put in a null as the newest entry, which would hide an entry of the future from the check of times."""
    times = content["history_times"][30].as_py()
    late = np.datetime64("2030-01-01", "us").astype(object)
    return with_value("history_times", 30, [late, *times[1:-1], None])(content)


def reversed_history(content: pa.Table) -> pa.Table:
    return with_value("history_times", 30, content["history_times"][30].as_py()[::-1])(content)


def shorter_history(content: pa.Table) -> pa.Table:
    return with_value("history_item_ids", 30, content["history_item_ids"][30].as_py()[:-1])(content)


def conversions_without_click(content: pa.Table) -> pa.Table:
    return with_column("conversion", lambda values: [1 - click for click in content["click"].to_pylist()])(content)


def scaled(name: str, factor: float) -> Change:
    def change(values: list[Any]) -> list[Any]:
        return [value and (np.array(value, np.float32) * factor).tolist() for value in values]

    return with_column(name, change, pa.list_(pa.float32()))


BAD_ROWS: dict[str, tuple[str, Change, str]] = {
    "missing column": (EVENTS, lambda t: t.drop_columns(["slot"]), r"column 'slot' is missing"),
    "missing label": (EVENTS, lambda t: t.drop_columns(["click"]), r"column 'click' is missing"),
    "missing signal": (ITEMS, lambda t: t.drop_columns(["brand"]), r"column 'brand' is missing"),
    "missing id": (ITEMS, lambda t: t.drop_columns(["item_id"]), r"column 'item_id' is missing; expected type int64"),
    "wrong type": (
        EVENTS, with_column("click", list, pa.int64()), r"row group 0: column 'click' has type int64, must be int8"
    ),
    "wrong type of request": (
        EVENTS, with_column("request_id", lambda ids: [str(one) for one in ids], pa.string()),
        r"column 'request_id' has type string, must be int64",
    ),
    "label of 2": (EVENTS, with_value("click", 30, 2), r"row group 1: column 'click': label 2 is not 0 or 1"),
    "conversion of -1": (EVENTS, with_value("conversion", 30, -1), r"column 'conversion': label -1"),
    "conversion without a click": (
        EVENTS, conversions_without_click, r"column 'conversion': must not be 1 where 'click' is 0"
    ),
    "null time": (EVENTS, with_value("event_time", 45, None), r"row group 2: column 'event_time': must not be null"),
    "unknown item": (
        EVENTS, with_value("item_id", 30, 60),
        r"column 'item_id': id 60 is outside the table \[0, 60\)",
    ),
    "unknown user": (
        EVENTS, with_value("user_id", 30, -1),
        r"column 'user_id': id -1 is outside the table \[0, 20\)",
    ),
    "unknown slot": (EVENTS, with_value("slot", 30, [6]), r"column 'slot': id 6 is outside the table \[0, 6\)"),
    "null in a list": (EVENTS, with_value("slot", 30, [None]), r"column 'slot': must hold no null"),
    "dense NaN": (EVENTS, with_value("item_rank", 30, float("nan")), r"column 'item_rank': must be finite"),
    "unknown item in history": (EVENTS, with_value("history_item_ids", 30, [99] * 16), r"'history_item_ids': id 99"),
    "late history": (
        EVENTS, late_history,
        r"row group 1: column 'history_times': must lie strictly before event_time",
    ),
    "no id at all": (
        USERS, with_column("user_id", lambda ids: [None] * len(ids)), r"column 'user_id': must not be null; is null in"
    ),
    "null in history": (EVENTS, null_in_history, r"column 'history_times': must hold no null inside a list"),
    "newest first": (EVENTS, reversed_history, r"column 'history_times': must be oldest first"),
    "uneven history": (EVENTS, shorter_history, r"must have as many entries as history_item_ids"),
    "other day": (
        EVENTS, with_value("event_time", 49, np.datetime64("2024-01-03", "us")),
        r"'event_time': must lie on 2024-01-02",
    ),
    "NaN in an embedding": (
        ITEMS, with_value("text_embedding", 30, [float("nan")] * 32),
        r"'text_embedding': must be finite",
    ),
    "embedding beyond half precision": (
        ITEMS, scaled("text_embedding", 1e6), r"'text_embedding': .*largest number of an embedding is .*e\+05; .*scale"
    ),
    "embedding below half precision": (
        ITEMS, scaled("text_embedding", 1e-9), r"'text_embedding': .*largest number of an embedding is .*e-10; .*scale"
    ),
    "gap in the ids": (
        ITEMS, lambda t: pa.concat_tables([t.slice(0, 30), t.slice(31)]),
        r"column 'item_id': new ids must continue from 0 without a gap; 30 is expected, 31 is there",
    ),
    "ids out of order": (
        ITEMS, lambda t: pa.concat_tables([t.slice(30), t.slice(0, 30)]),
        r"column 'item_id': (ids must rise|new ids must continue)",
    ),
    "unknown category": (
        ITEMS, with_value("category", 30, 16),
        r"column 'category': id 16 is outside the table \[0, 16\)",
    ),
    "unknown segment": (USERS, with_value("segment", 3, 12), r"column 'segment': id 12"),
    "user twice": (
        USERS, lambda t: pa.concat_tables([t, t.slice(0, 1)]), r"column 'user_id': ids must rise; 0 follows 19"
    ),
    "short embedding": (
        ITEMS,
        with_column("text_embedding", lambda values: [value and value[:3] for value in values], pa.list_(pa.float32())),
        r"'text_embedding': embeddings must have 32 numbers; found lengths \[3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_refused(kind: str, own: Path) -> None:
    name, change, message = BAD_ROWS[kind]
    changed(own, name, change)
    assert str(own / name) in refused(own, message)


@pytest.mark.parametrize("zone", ["Asia/Kolkata", "America/Los_Angeles"])
def test_late_history_entry_is_reported_by_its_stored_time_in_any_time_zone(
    zone: str, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(own, EVENTS, late_history)
    at = read(own / EVENTS)["event_time"][30].as_py()
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        refused(own, f"row 10 has an entry at {at}")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_wrong_count_in_the_description_is_named(own: Path) -> None:
    changed(own, ITEMS, lambda t: t.slice(0, 59))
    assert str(own / "items") in refused(own, r"holds 59 rows, dataset.json says num_items=60")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_day(path: Path) -> None:
    path.parent.rename(path.parent.with_name("day=2024-01-02"))


def no_test_days(path: Path) -> None:
    for folder in path.parents[1].glob("date=2024-01-0[34]"):
        shutil.rmtree(folder)


def empty_test_days(path: Path) -> None:
    for file in path.parents[1].glob("date=2024-01-0[34]/*.parquet"):
        rewrite(file, read(file).slice(0, 0))


def described(path: Path, **changes: Any) -> None:
    file = path.parents[2] / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BAD_FILES = {
    "truncated": (truncate, r"date=2024-01-02/part-00000.parquet: is no Parquet file: it does not end in a footer"),
    "no bytes": (lambda path: path.write_bytes(b""), r"date=2024-01-02/part-00000.parquet: is no Parquet file"),
    "badly named day": (rename_day, r"day=2024-01-02: must lie in a folder named date=YYYY-MM-DD"),
    "split without files": (no_test_days, r"the test dates, 2024-01-03 to 2024-01-04, have no rows"),
    "split without rows": (empty_test_days, r"the test dates, 2024-01-03 to 2024-01-04, have no rows"),
    "no events": (
        lambda path: shutil.rmtree(path.parents[1]), r"events: holds no Parquet file in a folder date=YYYY-MM-DD"
    ),
    "unknown key": (lambda path: described(path, version=2), r"dataset.json.version: unknown key"),
    "no tasks": (lambda path: described(path, tasks={}), r"dataset.json: tasks: must name at least one"),
    "task without its parent": (
        lambda path: described(path, tasks={"conversion": {"given": "click"}}),
        r"dataset.json.*tasks.conversion.given: 'click' is no task",
    ),
    "tasks in a circle": (
        lambda path: described(path, tasks={"click": {"given": "conversion"}, "conversion": {"given": "click"}}),
        r"dataset.json.*tasks.click.given: the tasks are given each other in a circle",
    ),
    "no description": (lambda path: (path.parents[2] / "dataset.json").unlink(), r"dataset.json: cannot be read"),
    "no users": (lambda path: shutil.rmtree(path.parents[2] / "users"), r"users: holds no Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused(kind: str, own: Path) -> None:
    spoil, message = BAD_FILES[kind]
    spoil(own / EVENTS)
    refused(own, message)


def test_truncated_file_is_refused_when_only_its_bytes_are_hashed(own: Path) -> None:
    truncate(own / EVENTS)
    refused(own, r"date=2024-01-02/part-00000.parquet: cannot be read as Parquet", identify="sha256")


def test_corrupt_bytes_before_the_footer_are_named(own: Path) -> None:
    whole = (own / EVENTS).read_bytes()
    (own / EVENTS).write_bytes(whole[:4] + bytes(200) + whole[204:])
    refused(own, r"date=2024-01-02/part-00000.parquet, row group 0: cannot be decoded")


def second_file(folder: Path, change: Change) -> Path:
    """Add a changed copy of a date's file to the date, with new ids of its requests."""
    file = (folder / EVENTS).with_name("part-00001.parquet")
    renumbered = with_column("request_id", lambda ids: [one + 1000 for one in ids])
    rewrite(file, change(renumbered(read(folder / EVENTS))))
    return file


def test_duplicate_file_on_a_date_is_refused(own: Path) -> None:
    copy = shutil.copy(own / EVENTS, (own / EVENTS).with_name("part-00001.parquet"))
    for kind in ("none", "user_time", "request_id"):
        assert str(own / EVENTS) in refused(own, f"{copy}: is the same file as", requests=kind)


def test_a_file_under_another_date_is_refused(own: Path) -> None:
    shutil.copytree((own / EVENTS).parent, own / "events" / "date=2024-01-05")
    refused(own, r"date=2024-01-05/.*column 'event_time': must lie on 2024-01-05")


def test_request_with_rows_apart_in_a_date_is_refused(own: Path) -> None:
    rows = read(own / EVENTS)
    rewrite(own / EVENTS, pa.concat_tables([rows.slice(1), rows.slice(0, 1)]))  # its rows are apart
    first = rows["request_id"][0].as_py()
    refused(own, rf"events/date=2024-01-02: column 'request_id': request {first} comes twice")


def test_rows_of_one_request_that_differ_are_refused(own: Path) -> None:
    rows = read(own / EVENTS)
    assert rows["request_id"][0] == rows["request_id"][1]
    changed(own, EVENTS, with_value("user_id", 1, (rows["user_id"][1].as_py() + 1) % 20))
    refused(own, r"events/date=2024-01-02: column 'user_id': must be equal in all rows of a request; request")
    rewrite(
        own / EVENTS, with_column("request_id", lambda ids: [ids[0]] * len(ids))(rows)
    )  # all rows are of one request
    refused(own, r"events/date=2024-01-02: column '(user_id|event_time)': must be equal in all rows of a request")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.append_column("bid", pa.array([1.0] * 50)), "column 'bid' is double, in .* it is missing"),
        (lambda t: t.append_column("seen", pa.array(["x"] * 50)), "column 'seen' is string, in .* it is int64"),
        (lambda t: t.drop_columns(["seen"]), "column 'seen' is missing, in .* it is int64"),
    ],
)
def test_added_removed_or_retyped_column_is_named(change: Change, message: str, own: Path) -> None:
    """This holds for another file of a date, and for another date, even a later one."""

    def seen(rows: pa.Table) -> pa.Table:
        return rows.append_column("seen", pa.array(range(rows.num_rows)))

    def other(rows: pa.Table) -> pa.Table:
        return change(rows if "string" in message else seen(rows))

    for number in range(4):
        changed(own, str(day_file(own, day_at(number)).relative_to(own)), seen)
    run_prepare(ALONE, tables_config(own), own.parent / "first")
    added = second_file(own, lambda rows: other(rows.drop_columns(["seen"])))
    assert str(added) in refused(own, message)
    added.unlink()
    day = day_at(4)
    rewrite(day_file(own, day), other(day_rows(day)))
    assert "events/date=2024-01-05" in refused(own, message)


def test_a_new_column_of_a_part_is_named(own: Path) -> None:
    rows = read(own / ITEMS)
    rewrite(own / "items" / "part-00001.parquet", rows.slice(0, 3).append_column("price", pa.array([1.0] * 3)))
    refused(own, "items/part=00001: column 'price' is double, in items/part=00000 it is missing")


def test_further_columns_are_kept_in_any_order_and_nullability(own: Path) -> None:
    """The contract's columns may be in any order, too, and another writer may have left out `not null`."""

    def with_further(rows: pa.Table) -> pa.Table:
        return rows.append_column("zeal", pa.array(np.arange(50.0))).append_column("app", pa.array(["x"] * 50))

    changed(own, EVENTS, with_further)
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
    message = refused(own, "column 'user_id' has type int32, must be int64")
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
    message = refused(own, rf"{own / ITEMS}: column 'item_id' has type int32, must be int64")
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


def test_valid_tables_become_the_snapshot(good: Path, prepared: Path) -> None:
    """The row groups of the user's files do not matter."""
    verify(prepared)
    dataset = read_dataset(prepared)
    dataset.verify(ALONE, dataset.snapshot.partitions)
    assert dataset.spec.model_dump() == json.loads((good / "dataset.json").read_text()) | {
        "train": dataset.spec.train, "test": dataset.spec.test,
        **{name: tuple(getattr(dataset.spec, name)) for name in ("dense", "request_dense")},
    }  # fmt: skip
    assert dataset.dates() == [day_at(number) for number in range(4)]
    expected = pa.concat_tables([day_rows(day_at(number)) for number in range(4)])
    assert rows_of(prepared).select(expected.column_names).equals(expected.combine_chunks())
    requests = content(dataset, "requests")
    assert requests["request_id"].to_pylist() == expected["request_id"].unique().to_pylist()
    assert content(dataset, "items")["item_id"].to_pylist() == list(range(60))


def test_null_fixed_size_lists_of_another_writer_get_a_hint(own: Path) -> None:
    pq.write_table(read(own / ITEMS), own / ITEMS)
    refused(own, "row group 0.*write embeddings with nulls as plain lists")


def on_ranks(world: World, right: Path, wrong: Path, out: Path) -> str:
    run_prepare(world, tables_config(right), out / "right" / "out")
    try:
        run_prepare(world, tables_config(wrong), out / "wrong" / "out")
    except SidestackError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_make_the_same_bytes_and_fail_together(
    ranks: int, own: Path, good: Path, prepared: Path, tmp_path: Path
) -> None:
    changed(own, EVENTS, with_value("click", 30, 2))
    messages = run_distributed(on_ranks, good, own, tmp_path, world_size=ranks)
    assert all("label 2 is not 0 or 1" in message for message in messages)
    assert sum("failed" in message for message in messages) == ranks - 1
    assert not (tmp_path / "wrong" / "out").exists() and leftovers(tmp_path) == []
    assert made_of(tmp_path / "right" / "out") == made_of(prepared)


def test_requests_of_the_column_are_the_default(good: Path, prepared: Path, own: Path) -> None:
    run_prepare(ALONE, tables_config(own, requests="request_id"), own.parent / "out")
    assert rows_of(own.parent / "out").equals(rows_of(prepared))
    for number in range(4):
        changed(own, str(day_file(own, day_at(number)).relative_to(own)), lambda t: t.drop_columns(["request_id"]))
    refused_at = own.parent / "none"
    refused_at.mkdir()
    refused(Path(shutil.copytree(own, refused_at / "own")), "column 'request_id' is missing", requests="request_id")
    run_prepare(ALONE, tables_config(own), own.parent / "default")
    dataset = read_dataset(own.parent / "default")
    assert [file.rows for file in dataset.files("requests")] == [50] * 4


@pytest.mark.parametrize("has_ids", [True, False])
def test_every_impression_is_a_request_without_requests(has_ids: bool, own: Path, prepared: Path) -> None:
    if not has_ids:
        for number in range(4):
            changed(own, str(day_file(own, day_at(number)).relative_to(own)), lambda t: t.drop_columns(["request_id"]))
    run_prepare(ALONE, tables_config(own, requests="none"), own.parent / "out")
    rows = rows_of(own.parent / "out")
    assert len(rows["request_id"].unique()) == rows.num_rows == 200
    assert rows.drop_columns(["request_id"]).equals(rows_of(prepared).drop_columns(["request_id"]))


def test_rows_of_one_user_and_time_are_grouped_into_a_request(own: Path, prepared: Path) -> None:
    """Rows are grouped from anywhere in the date; requests are in order of time, and their rows keep their order."""
    order = np.random.default_rng(3).permutation(50)
    rows = read(own / EVENTS).take(pa.array(order))
    rewrite(own / EVENTS, with_column("request_id", lambda ids: range(len(ids)))(rows))
    run_prepare(ALONE, tables_config(own, requests="user_time"), own.parent / "out")
    found = joined(own.parent / "out", all_columns(read_dataset(own.parent / "out")), day_at(1), day_at(1))
    listed = sorted(
        range(50), key=lambda row: (rows["event_time"][row].as_py(), rows["user_id"][row].as_py(), row)
    )  # fmt: skip
    assert found["item_id"].to_pylist() == [rows["item_id"][row].as_py() for row in listed]
    keys = list(zip(found["user_id"].to_pylist(), found["event_time"].to_pylist(), strict=True))
    expected = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    ids = [one - (day_at(1).toordinal() << 32) for one in found["request_id"].to_pylist()]
    assert ids == [expected[key] for key in keys] and len(expected) == 17


@pytest.mark.parametrize("requests", ["request_id", "user_time", "none"])
def test_labels_may_be_in_files_of_their_own(requests: str, own: Path) -> None:
    run_prepare(ALONE, tables_config(own, requests=requests), own.parent / "within" / "out")
    labels_apart(own, day_at(1))
    run_prepare(ALONE, tables_config(own, requests=requests), own.parent / "apart" / "out")
    within, apart = (rows_of(own.parent / name / "out") for name in ("within", "apart"))
    assert apart.equals(within)


def test_labels_that_do_not_match_their_events_are_refused(own: Path) -> None:
    labels = day_file(own, day_at(1), "labels")
    both = read(own / EVENTS)
    labels_apart(own, day_at(1))
    whole = read(labels)
    rewrite(labels, whole.slice(0, 49))
    refused(own, rf"{EVENTS}, row group 2: has more rows than the labels of 2024-01-02: they must be row-aligned")
    rewrite(labels, pa.concat_tables([whole, whole.slice(0, 1)]))
    refused(own, "labels/date=2024-01-02: holds 51 rows for 50 events: they must be row-aligned")
    rewrite(labels, with_value("click", 3, 2)(whole))
    refused(own, rf"{labels}, row group 0: column 'click': label 2 is not 0 or 1")
    rewrite(labels, whole.drop_columns(["conversion"]))
    refused(own, rf"{labels}: column 'conversion' is missing")
    rewrite(labels, whole)
    rewrite(own / EVENTS, both)
    refused(own, rf"{EVENTS}, row group 0: column 'click': must not be here, as the labels of 2024-01-02 lie")
    labels.parent.rename(labels.parent.with_name("date=2024-02-01"))
    refused(own, "labels/date=2024-02-01: there are no events of this date")


def test_labels_of_another_writer_may_be_declared_not_null(own: Path, prepared: Path) -> None:
    labels_apart(own, day_at(1))
    file = day_file(own, day_at(1), "labels")
    rows = read(file)
    rewrite(file, pa.table(rows.columns, schema=pa.schema([one.with_nullable(False) for one in rows.schema])))
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    assert rows_of(own.parent / "out").equals(rows_of(prepared))


def test_labels_are_null_until_their_followup_is_over(good: Path, own: Path) -> None:
    """A plain loop gives the same: a label is known if its follow-up ended before the snapshot's end."""
    followup = {"click": 0.25, "conversion": 1.5}
    config = tables_config(own, followup_days=followup, test_days=1, as_of=day_at(4))
    run_prepare(ALONE, config, own.parent / "out")
    found = rows_of(own.parent / "out")
    whole = pa.concat_tables([day_rows(day_at(number)) for number in range(4)])
    end = np.datetime64(day_at(4), "us")
    for task, days in followup.items():
        span = np.timedelta64(int(days * 86_400_000_000), "us")
        is_known = [bool(np.datetime64(at, "us") + span < end) for at in whole["event_time"].to_pylist()]
        assert 0 < sum(is_known) < 200
        assert found[task].combine_chunks().equals(masked(whole[task], is_known))
    assert read_dataset(own.parent / "out").spec.followup_days == followup


def test_followup_is_set_by_the_folder_or_by_the_configuration(own: Path) -> None:
    described(own / EVENTS, followup_days={"click": 0.25, "conversion": 3})
    run_prepare(ALONE, tables_config(own, as_of=day_at(4), test_days=1), own.parent / "said")
    settings = {"followup_days": {"conversion": 1}, "as_of": day_at(4), "test_days": 1}
    run_prepare(ALONE, tables_config(own, **settings), own.parent / "out")
    of_folder, laid_over = (read_dataset(own.parent / name).spec.followup_days for name in ("said", "out"))
    assert (of_folder, laid_over) == ({"click": 0.25, "conversion": 3}, {"click": 0.25, "conversion": 1})
    known = [len(rows_of(own.parent / name)["conversion"].drop_null()) for name in ("said", "out")]
    assert known == [50, 150]


def test_followup_of_an_unknown_task_is_refused(own: Path) -> None:
    refused(own, "prepare.source.followup_days.buy: is no task; tasks are click, conversion", followup_days={"buy": 3})


def test_labels_are_made_again_when_the_followup_changes(own: Path) -> None:
    """Two follow-ups of different dates that end at the same moment are not confused."""
    outs = [own.parent / f"out{days}" for days in (1, 2)]
    for days, out in zip((1, 2), outs, strict=True):
        values = tables_config(own, followup_days={"conversion": days}, as_of=day_at(4), test_days=1)
        run_prepare(ALONE, values, out)
    known = [
        [joined(out, ["conversion"], day_at(n), day_at(n))["conversion"].null_count for n in range(4)] for out in outs
    ]
    assert known == [[0, 0, 0, 50], [0, 0, 50, 50]]


def test_only_labels_are_made_again_when_the_parent_of_a_task_changes(own: Path) -> None:
    """The counts of a task depend on its parent."""
    first, second = own.parent / "first", own.parent / "second"
    run_prepare(ALONE, tables_config(own), first)
    described(own / EVENTS, tasks={"click": {}, "conversion": {}})
    run_prepare(ALONE, tables_config(own), second)
    clicks = day_rows(day_at(1))["click"].to_pylist().count(1)
    (before,), (after,) = (
        [entry for entry in read_dataset(out).partitions("labels") if entry.slice == "date=2024-01-02"]
        for out in (first, second)
    )
    assert before.facts["judged_conversion"] == clicks and after.facts["judged_conversion"] == 50
    for table in ("requests", "events"):
        assert read_dataset(first).partitions(table) == read_dataset(second).partitions(table)


def test_splits_may_be_the_newest_dates(own: Path) -> None:
    splits: list[tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = [
        ({"test_days": 1}, (0, 2), (3, 3)),
        ({"test_days": 2, "train_days": 1}, (1, 1), (2, 3)),
        ({"test_days": 1, "as_of": day_at(3)}, (0, 1), (2, 2)),
    ]
    for number, (settings, train, test) in enumerate(splits):
        run_prepare(ALONE, tables_config(own, **settings), own.parent / f"out{number}")
        spec = read_dataset(own.parent / f"out{number}").spec
        assert (spec.train, spec.test) == ((day_at(train[0]), day_at(train[1])), (day_at(test[0]), day_at(test[1])))
    refused(own, "4 dates leave none to train on beside test_days=4", test_days=4)


def test_a_date_without_rows_is_an_empty_partition(own: Path) -> None:
    rewrite(own / EVENTS, read(own / EVENTS).slice(0, 0))
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    dataset = read_dataset(own.parent / "out")
    assert [file.rows for file in dataset.files("events")] == [50, 0, 50, 50]
    assert rows_of(own.parent / "out").num_rows == 150


def test_empty_files_are_not_taken_for_duplicates(own: Path, prepared: Path) -> None:
    """Some writers leave empty files, which all have the same footer."""
    empty = read(own / EVENTS).slice(0, 0)
    for name in ("empty-0.parquet", "empty-1.parquet"):
        rewrite((own / EVENTS).with_name(name), empty)
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    assert rows_of(own.parent / "out").equals(rows_of(prepared))


def test_later_part_revises_rows_and_continues_the_numbering(own: Path) -> None:
    items = read(own / ITEMS)
    without_counts(own)
    rewrite(own / ITEMS, items.slice(0, 48))
    revised = with_value("text", 0, "revised")(pa.concat_tables([items.slice(5, 1), items.slice(48, 12)]))
    rewrite(own / "items" / "part-00001.parquet", revised)
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    dataset = read_dataset(own.parent / "out")
    assert dataset.spec.num_items == 60
    assert [(entry.facts["first"], entry.facts["new"]) for entry in dataset.partitions("items")] == [(0, 48), (48, 12)]
    assert content(dataset, "items")["item_id"].to_pylist() == [*range(48), 5, *range(48, 60)]


def test_duplicate_part_adds_nothing_and_part_out_of_order_is_refused(own: Path) -> None:
    shutil.copy(own / ITEMS, own / "items" / "part-00001.parquet")
    run_prepare(ALONE, tables_config(own), own.parent / "twice")
    dataset = read_dataset(own.parent / "twice")
    assert dataset.spec.num_items == 60 and [one.facts["new"] for one in dataset.partitions("items")] == [60, 0]
    (own / "items" / "part-00001.parquet").unlink()
    add_items(own, 0, 48, "part-00001.parquet")
    add_items(own, 48, 60, "part-00000.parquet")
    refused(
        own, f"{own / ITEMS}: column 'item_id': new ids must continue from 0 without a gap; 0 is expected, 48 is there"
    )


def test_parts_are_known_from_their_date_on(own: Path) -> None:
    without_counts(own)
    add_items(own, 0, 48)
    add_items(own, 48, 60, "date=2024-01-03/part-00000.parquet")
    counts = {}
    for number in (2, 3, 4):
        run_prepare(ALONE, tables_config(own, as_of=day_at(number)), own.parent / f"out{number}")
        dataset = read_dataset(own.parent / f"out{number}")
        counts[number] = (len(dataset.partitions("items")), dataset.spec.num_items)
    assert counts == {2: (1, 48), 3: (2, 60), 4: (2, 60)}


def test_event_with_a_later_item_is_refused_even_if_its_partition_exists(own: Path) -> None:
    """The date's partition is valid for a later snapshot, but the earlier snapshot does not know the item."""
    without_counts(own)
    add_items(own, 0, 48)
    add_items(own, 48, 60, "date=2024-01-04/part-00000.parquet")
    run_prepare(ALONE, tables_config(own), own.parent / "later")
    refused(own, r"(events|requests)/date=2024-01-03: item_id \d+ is outside the table \[0, 48\)", as_of=day_at(3))


def test_end_before_the_log_is_refused(own: Path) -> None:
    refused(own, "events: holds no Parquet file in a folder date=YYYY-MM-DD before 2024-01-01", as_of=day_at(0))
