"""Joined impressions equal a slow join in plain Python, and tables that do not match each other are refused."""

import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.encoder.sid.columns import event_columns, with_sid_metadata
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.errors import DataError
from sidestack.infra.impressions import ImpressionRows, all_columns, columns_by_table, read_impressions
from sidestack.infra.parquet import RowGroup, read_row_group, row_groups
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.snapshot import Dataset, read_dataset
from tests.datasets import write_snapshot_of
from tests.infra.made_up import DAYS, SPEC, requests, table

SIZES = {DAYS[0]: [3, 1, 4, 1, 5, 2, 6, 5], DAYS[1]: [], DAYS[2]: [1, 1, 9, 2, 2, 3]}
"""Number of impressions of each request, by date; the second date has no requests."""
ROW_GROUP_ROWS = 5


def sid_spec(**values: Any) -> SidSpec:
    return SidSpec(
        quantizer="fsq", levels=4, digits=3, depth=3, groups=1, prefix_lengths=(1,), fingerprint="f" * 64, **values
    )


ITEM_SIDS, USER_SIDS = sid_spec(name="item_sid"), sid_spec(name="user_sid", entity="user")


def with_sids(rows: list[dict[str, Any]]) -> pa.Table:
    """Add SIDs that identify the row: an item's is its id plus 20 (null for item 3), a user's is its id plus 40."""
    made = table(rows)
    for spec in (ITEM_SIDS, USER_SIDS):
        for name, held in event_columns(spec).items():
            values: list[Any]
            if spec.entity == "user":
                kind, values = pa.int64(), [row["user_id"] + 40 for row in rows]
            elif name.startswith(spec.event_history_base):
                kind, values = pa.list_(pa.int64()), [[sid_of(one) for one in row["history_item_ids"]] for row in rows]
            else:
                kind, values = pa.int64(), [sid_of(row["item_id"]) for row in rows]
            made = made.append_column(with_sid_metadata(pa.field(name, kind), held), pa.array(values, kind))
    return made


def sid_of(item: int) -> int | None:
    return None if item == 3 else item + 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    days = {day: with_sids(requests(day, sizes)) for day, sizes in SIZES.items()}
    out = tmp_path_factory.mktemp("made") / "out"
    return write_snapshot_of(out, SPEC, (), (), days, [ITEM_SIDS, USER_SIDS], ROW_GROUP_ROWS)


@pytest.fixture(scope="module")
def dataset(made: Path) -> Dataset:
    return read_dataset(made)


def all_rows(dataset: Dataset, name: str, first: date, last: date) -> list[dict[str, Any]]:
    """Return a table's rows, read without the code under test."""
    files = dataset.files(name, first, last)
    return [row for file in files for row in pq.ParquetFile(file.path).read().to_pylist()]


def joined_slowly(dataset: Dataset, first: date, last: date) -> list[dict[str, Any]]:
    """Join whole tables row by row and by request id."""
    tables = {entry.table for entry in dataset.snapshot.partitions}
    events = all_rows(dataset, "events", first, last)
    for name in tables:
        if name == "labels" or name.endswith("/events"):
            events = [a | b for a, b in zip(events, all_rows(dataset, name, first, last), strict=True)]
    of_request = all_rows(dataset, "requests", first, last)
    for name in tables:
        if name.endswith("/requests"):
            of_request = [a | b for a, b in zip(of_request, all_rows(dataset, name, first, last), strict=True)]
    by_id = {row["request_id"]: row for row in of_request}
    assert len(by_id) == len(of_request)
    return [by_id[row["request_id"]] | row for row in events]


@pytest.mark.parametrize("days", [(0, 2), (0, 0), (2, 2), (0, 1), (1, 2)])
def test_joined_rows_equal_the_slow_join(days: tuple[int, int], dataset: Dataset) -> None:
    first, last = DAYS[days[0]], DAYS[days[1]]
    columns = all_columns(dataset)
    found = [row for part in read_impressions(dataset, columns, first, last) for row in part.to_pylist()]
    expected = joined_slowly(dataset, first, last)
    assert len(found) == sum(sum(SIZES[day]) for day in DAYS[days[0] : days[1] + 1]) > 0
    assert found == [{name: row[name] for name in columns} for row in expected]
    assert len([name for name in columns if "sid" in name]) == 6  # ad, history and user, whole and prefix


def test_rows_are_those_that_were_written(dataset: Dataset) -> None:
    rows = [row for day in DAYS for row in with_sids(requests(day, SIZES[day])).to_pylist()]
    columns = all_columns(dataset)
    assert set(columns) == set(rows[0])
    found = [row for part in read_impressions(dataset, columns) for row in part.to_pylist()]
    assert found == [{name: row[name] for name in columns} for row in rows]


def test_row_groups_are_those_of_the_events_with_whole_requests(dataset: Dataset) -> None:
    rows = ImpressionRows(dataset, DAYS[0], DAYS[2], ["item_id"])
    groups = rows.groups(0, rows.num_rows)
    assert len({group.path for group in groups}) == 2 and len(groups) > 4
    assert [group.start for group in groups] == np.cumsum([0, *(group.rows for group in groups)])[:-1].tolist()
    starts = [int(start) + group.start for group in groups for start in rows.starts(group)]
    sizes = [size for day in DAYS for size in SIZES[day]]
    assert starts == np.cumsum([0, *sizes])[:-1].tolist()


def test_columns_are_read_in_any_choice_and_order(dataset: Dataset) -> None:
    columns = all_columns(dataset)
    expected = joined_slowly(dataset, DAYS[0], DAYS[2])
    rng = np.random.default_rng(5)
    for number in [1, 1, 1, 2, 3, 5, 8]:
        chosen = rng.permutation(columns)[:number].tolist()
        found = pa.concat_tables(list(read_impressions(dataset, [*chosen, chosen[0]])))
        assert found.column_names == chosen
        assert found.to_pylist() == [{name: row[name] for name in chosen} for row in expected]


def test_column_is_read_from_the_table_that_has_it(dataset: Dataset) -> None:
    of_events, of_requests = columns_by_table(dataset, ["click", "user_id", "item_id", "further"])
    assert of_events == {"events": ["request_id", "item_id", "further"], "labels": ["click"]}
    assert of_requests == {"requests": ["request_id", "user_id"]}
    assert columns_by_table(dataset, ["item_id"]) == ({"events": ["request_id", "item_id"]}, {})
    item = next(iter(event_columns(ITEM_SIDS)))
    tables = [table for part in columns_by_table(dataset, [item]) for table in part if table.startswith("sids/")]
    assert len(tables) == 1 and tables[0].startswith("sids/item_sid/")


def test_only_files_of_the_requested_rows_and_columns_are_opened(dataset: Dataset) -> None:
    rows = ImpressionRows(dataset, DAYS[0], DAYS[2], ["item_id"])
    assert rows.num_rows == sum(map(sum, SIZES.values())) and rows.num_opened == 0
    rows.read(rows.groups(0, 1)[0])
    assert rows.num_opened == 1
    several = ImpressionRows(dataset, DAYS[0], DAYS[2], ["item_id", "click", "hour"])
    several.read(several.groups(0, 1)[0])
    assert several.num_opened == 3  # events, labels and requests of one date


def test_each_part_is_checked_before_it_is_joined(dataset: Dataset) -> None:
    seen: list[tuple[str, int, int]] = []

    def check(rows: pa.Table, where: RowGroup) -> None:
        seen.append((where.path.parts[-4], where.index, rows.num_rows))
        assert where.rows == rows.num_rows

    parts = list(read_impressions(dataset, ["item_id", "hour"], DAYS[0], DAYS[0], check))
    assert [name for name, _, _ in seen] == ["events", "requests"] * len(parts)
    assert sum(rows for name, _, rows in seen if name == "requests") == len(SIZES[DAYS[0]])


def test_dates_without_partitions_are_refused_and_empty_partitions_are_not(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="the snapshot has no events from 2021-01-01 to 2021-01-02"):
        ImpressionRows(dataset, date(2021, 1, 1), date(2021, 1, 2), ["item_id"])
    assert list(read_impressions(dataset, ["item_id"], DAYS[1], DAYS[1])) == []


def test_missing_column_is_named(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="events/date=2020-01-01/.*: column 'bid' is missing; the file has"):
        list(read_impressions(dataset, ["bid"]))


# Tables that do not match each other: a file is rewritten with changed row groups, the manifest stays.

Groups = list[pa.Table]


def damaged(made: Path, tmp_path: Path, name: str, change: Callable[[Groups], Groups]) -> Dataset:
    shutil.copytree(made, tmp_path / "out")
    dataset = read_dataset(tmp_path / "out")
    (file,) = dataset.files(name, DAYS[0], DAYS[0])
    groups = [read_row_group(group) for group in row_groups([file.path])]
    with TableWriter(file.path, groups[0].schema) as writer:
        for group in change(groups):
            writer.write_group(group)
    return dataset


def swapped(groups: Groups) -> Groups:
    return [groups[1], groups[0], *groups[2:]]


def shifted(groups: Groups) -> Groups:
    """Move a row from the first row group into the second."""
    last = groups[0].num_rows - 1
    return [groups[0].slice(0, last), pa.concat_tables([groups[0].slice(last), groups[1]]), *groups[2:]]


def merged(groups: Groups) -> Groups:
    return [pa.concat_tables(groups[:2]), *groups[2:]]


def one_less(groups: Groups) -> Groups:
    return [*groups[:-1], groups[-1].slice(1)]


def renumbered(groups: Groups) -> Groups:
    place = groups[0].schema.get_field_index("request_id")
    ids = pa.array([one + 1000 for one in groups[0]["request_id"].to_pylist()])
    return [groups[0].set_column(place, groups[0].schema.field(place), ids), *groups[1:]]


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("labels", shifted, r"labels/.*row group 0: has \d+ rows; .*events/.*row group 0 has \d+ impressions"),
        ("labels", merged, r"labels/.*: has \d+ row groups, .*events/.* has \d+: the files of a date's tables"),
        ("labels", one_less, r"labels/.*: holds 26 rows, its manifest says 27"),
        ("requests", shifted, r"requests/.*row group 0: has \d+ rows; .*events/.*row group 0 has \d+ impressions"),
        ("requests", merged, r"requests/.*: has \d+ row groups, .*events/.* has \d+: the files of a date's tables"),
        ("requests", one_less, r"requests/.*: holds 7 rows, its manifest says 8"),
        (
            "requests", renumbered,
            r"requests/.*row group 0: column 'request_id': row 0 is request 1100, in .*events/.*row group 0 it is 100",
        ),
        ("events", renumbered, r"requests/.*: column 'request_id': row 0 is request 100, in .*events/.* it is 1100"),
        ("requests", swapped, r"requests/.*row group 0: (column 'request_id': row 0 is request|has \d+ rows)"),
    ],
)  # fmt: skip
def test_tables_with_mismatched_row_groups_are_refused(
    name: str, change: Callable[[Groups], Groups], rule: str, made: Path, tmp_path: Path
) -> None:
    dataset = damaged(made, tmp_path, name, change)
    with pytest.raises(DataError, match=rule):
        list(read_impressions(dataset, ["item_id", "hour", "click"]))


def test_table_with_fewer_row_groups_is_refused(made: Path, tmp_path: Path) -> None:
    """The rows of the last two row groups are in one; the row groups before them are right."""

    def last_merged(groups: Groups) -> Groups:
        return [*groups[:-2], pa.concat_tables(groups[-2:])]

    dataset = damaged(made, tmp_path, "labels", last_merged)
    with pytest.raises(DataError, match="labels|equal row groups"):
        list(read_impressions(dataset, ["item_id", "click"]))
