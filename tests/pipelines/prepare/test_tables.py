"""A user's own tables: what is right is copied, and every kind of wrong row is refused by name and rule."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.commit import verify
from infra.distributed import World
from infra.errors import CommitError, DataError, SidestackError
from infra.parquet import TableWriter, read_row_group, row_groups
from infra.tables import read_dataset
from tests.distributed import run_distributed
from tests.pipelines.prepare.running import ALONE, files_of, run_prepare

EVENTS = "events/date=2024-01-02/part-00000.parquet"
ITEMS = "items/part-00000.parquet"
USERS = "users/part-00000.parquet"
SOURCE = {
    "kind": "synthetic", "num_items": 60, "num_users": 20, "events_per_day": 50, "train_days": 2, "test_days": 2,
    "followup_days": 1, "user_embeddings": {"activity": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "dataset"
    run_prepare(ALONE, {"source": SOURCE}, out)
    return out


@pytest.fixture
def own(good: Path, tmp_path: Path) -> Path:
    """A directory of the user's own: right, and without a manifest."""
    shutil.copytree(good, tmp_path / "own", ignore=shutil.ignore_patterns("manifest.json"))
    return tmp_path / "own"


def tables_config(path: Path) -> dict[str, Any]:
    return {"source": {"kind": "tables", "path": str(path)}}


def read(path: Path) -> pa.Table:
    return pa.concat_tables([read_row_group(group) for group in row_groups([path])]).combine_chunks()


def rewrite(path: Path, content: pa.Table) -> None:
    with TableWriter(path, content.schema, row_group_rows=20) as writer:
        writer.write(content)


def with_column(
    name: str, change: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None
) -> Callable[[pa.Table], pa.Table]:
    def changed(content: pa.Table) -> pa.Table:
        place = content.schema.get_field_index(name)
        values = pa.array(change(content[name].to_pylist()), kind or content.schema.field(place).type)
        return content.set_column(place, pa.field(name, values.type), values)

    return changed


def with_value(name: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    return with_column(name, lambda values: [*values[:row], value, *values[row + 1 :]])


def late_history(content: pa.Table) -> pa.Table:
    event = content["event_time"][30].as_py()
    return with_value("history_times", 30, [*content["history_times"][30].as_py()[:-1], event])(content)


def reversed_history(content: pa.Table) -> pa.Table:
    return with_value("history_times", 30, content["history_times"][30].as_py()[::-1])(content)


def shorter_history(content: pa.Table) -> pa.Table:
    return with_value("history_item_ids", 30, content["history_item_ids"][30].as_py()[:-1])(content)


BAD_ROWS = {
    "missing column": (EVENTS, lambda t: t.drop_columns(["slot"]), r"column 'slot' is missing"),
    "missing signal": (ITEMS, lambda t: t.drop_columns(["brand"]), r"column 'brand' is missing"),
    "wrong type": (
        EVENTS, with_column("click", list, pa.int64()), r"row group 0: column 'click' has type int64, must be int8"
    ),
    "label of 2": (EVENTS, with_value("click", 30, 2), r"row group 1: column 'click': label 2 is not 0 or 1"),
    "conversion of -1": (EVENTS, with_value("conversion", 30, -1), r"column 'conversion': label -1"),
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
    "gap in the ids": (ITEMS, with_value("item_id", 30, 31), r"column 'item_id': must equal the row number; row 30"),
    "unknown category": (
        ITEMS, with_value("category", 30, 16),
        r"column 'category': id 16 is outside the table \[0, 16\)",
    ),
    "missing item": (ITEMS, lambda t: t.slice(0, 59), r"holds 59 rows, dataset.json says num_items=60"),
    "unknown segment": (USERS, with_value("segment", 3, 12), r"column 'segment': id 12"),
    "further user": (
        USERS, lambda t: pa.concat_tables([t, t.slice(0, 1)]),
        r"21 rows, dataset.json says num_users=20",
    ),
    "short embedding": (
        ITEMS,
        with_column("text_embedding", lambda values: [value and value[:3] for value in values], pa.list_(pa.float32())),
        r"'text_embedding': embeddings must have 32 numbers; found lengths \[3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_refused(kind: str, own: Path, tmp_path: Path) -> None:
    name, change, message = BAD_ROWS[kind]
    rewrite(own / name, change(read(own / name)))
    with pytest.raises(SidestackError, match=message) as caught:
        run_prepare(ALONE, tables_config(own), tmp_path / "out")
    assert name.split("/")[0] in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_day(path: Path) -> None:
    path.parent.rename(path.parent.with_name("day=2024-01-02"))


def no_test_days(path: Path) -> None:
    for folder in path.parents[1].glob("date=2024-01-0[34]"):
        shutil.rmtree(folder)


def unknown_key(path: Path) -> None:
    file = path.parents[2] / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))


BAD_FILES = {
    "truncated": (truncate, r"date=2024-01-02.*cannot be read as Parquet"),
    "badly named day": (rename_day, r"day=2024-01-02: events must lie in folders named date=YYYY-MM-DD"),
    "empty split": (no_test_days, r"no files from 2024-01-03 to 2024-01-04"),
    "unknown key": (unknown_key, r"dataset.json.version: unknown key"),
    "no description": (lambda path: (path.parents[2] / "dataset.json").unlink(), r"dataset.json: cannot be read"),
    "no users": (lambda path: shutil.rmtree(path.parents[2] / "users"), r"users: holds no Parquet file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused(kind: str, own: Path, tmp_path: Path) -> None:
    spoil, message = BAD_FILES[kind]
    spoil(own / EVENTS)
    with pytest.raises(SidestackError, match=message):
        run_prepare(ALONE, tables_config(own), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_altered_committed_directory_is_refused(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "own")
    content = read(tmp_path / "own" / EVENTS)
    rewrite(tmp_path / "own" / EVENTS, with_value("click", 3, 1 - content["click"][3].as_py())(content))
    with pytest.raises(CommitError, match="altered"):
        run_prepare(ALONE, tables_config(tmp_path / "own"), tmp_path / "out")


def test_null_fixed_size_lists_of_another_writer_get_a_hint(own: Path, tmp_path: Path) -> None:
    pq.write_table(read(own / ITEMS), own / ITEMS)
    with pytest.raises(DataError, match="row group 0.*write embeddings with nulls as plain lists"):
        run_prepare(ALONE, tables_config(own), tmp_path / "out")


def on_ranks(world: World, right: Path, wrong: Path, out: Path) -> str:
    run_prepare(world, tables_config(right), out / "right")
    try:
        run_prepare(world, tables_config(wrong), out / "wrong")
    except SidestackError as error:
        return str(error)
    return "no error"


def test_ranks_copy_the_same_bytes_and_fail_together(own: Path, good: Path, tmp_path: Path) -> None:
    rewrite(own / EVENTS, with_value("click", 30, 2)(read(own / EVENTS)))
    run_prepare(ALONE, tables_config(good), tmp_path / "out" / "one")
    messages = run_distributed(on_ranks, good, own, tmp_path / "out", world_size=2)
    assert all("label 2 is not 0 or 1" in message for message in messages)
    assert any("rank 0 failed" in message or "rank 1 failed" in message for message in messages)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "right"]
    assert tables_of(tmp_path / "out" / "one") == tables_of(tmp_path / "out" / "right") == tables_of(good)


def tables_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name != "summary.json"}


def test_right_tables_are_copied_whatever_their_row_groups(own: Path, tmp_path: Path) -> None:
    rewrite(own / EVENTS, read(own / EVENTS))
    extra = read(own / ITEMS).append_column("price", pa.array(np.arange(60.0)))
    plain = with_column("text_embedding", list, pa.list_(pa.float32()))(extra)
    plain = with_column("behaviour_embedding", list, pa.list_(pa.float16()))(plain)
    pq.write_table(plain.select(plain.column_names[::-1]), own / ITEMS, row_group_size=7)
    run_prepare(ALONE, tables_config(own), tmp_path / "one")
    verify(tmp_path / "one")
    assert read_dataset(tmp_path / "one").spec == read_dataset(own).spec
    copied = read(tmp_path / "one" / ITEMS)
    assert copied["price"].to_pylist() == list(range(60))
    assert copied["text_embedding"].to_pylist() == extra["text_embedding"].to_pylist()
    assert read(tmp_path / "one" / EVENTS).equals(read(own / EVENTS))
