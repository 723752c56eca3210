"""Lists of partitions, which snapshots share: one for each table and month, or for each hundred parts."""

import hashlib
from datetime import date, timedelta
from pathlib import Path

import pytest

from sidestack.infra.errors import CommitError, ConfigError, DataError
from sidestack.infra.partitions import (
    LISTS,
    PartitionEntry,
    PartitionFile,
    date_slice,
    list_file,
    part_slice,
    read_lists,
    write_lists,
)


def entry(table: str, slice_name: str) -> PartitionEntry:
    file = PartitionFile(name="part-00000.parquet", rows=5)
    return PartitionEntry(
        table=table, slice=slice_name, path=f"{table}/{slice_name}/key", digest="d", columns="c", files=(file,)
    )


def dates(table: str, days: int) -> list[PartitionEntry]:
    return [entry(table, date_slice(date(2024, 1, 30) + timedelta(days=number))) for number in range(days)]


def parts(number: int) -> list[PartitionEntry]:
    return [entry("items", part_slice(one)) for one in range(number)]


def files(store: Path) -> set[str]:
    return {path.stem for path in (store / LISTS).iterdir()}


def test_lists_are_read_as_written(tmp_path: Path) -> None:
    given = [*dates("events", 40), *dates("sids/sid/abc/events", 3), *parts(201)]
    lists = write_lists(tmp_path, given)
    assert read_lists(tmp_path, lists) == tuple(given)
    months = {"events": 3, "sids/sid/abc/events": 2}  # January, February, March
    assert {table: len(digests) for table, digests in lists.items()} == {**months, "items": 3}
    assert write_lists(tmp_path, []) == {} and read_lists(tmp_path, {}) == ()


def test_added_date_changes_only_the_list_of_its_month(tmp_path: Path) -> None:
    before = write_lists(tmp_path, [*dates("events", 10), *parts(150)])
    known = files(tmp_path)
    after = write_lists(tmp_path, [*dates("events", 11), *parts(150)])
    assert after["events"][0] == before["events"][0] and after["items"] == before["items"]
    assert files(tmp_path) - known == {after["events"][1]}
    assert read_lists(tmp_path, before) == (*dates("events", 10), *parts(150))


@pytest.mark.parametrize(
    "path", ["../../outside", "/outside", "events/../../outside", "events/date=2024-01-30/../../.."]
)
def test_path_outside_the_store_is_refused(tmp_path: Path, path: str) -> None:
    """The altered list has the right digest in its name."""
    (lists,) = write_lists(tmp_path, dates("events", 1)).values()
    text = list_file(tmp_path, lists[0]).read_text()
    for old, new in {"events/date=2024-01-30/key": path, "part-00000.parquet": f"{path}/x.parquet"}.items():
        content = text.replace(old, new).encode()
        digest = hashlib.sha256(content).hexdigest()
        list_file(tmp_path, digest).write_bytes(content)
        with pytest.raises(ConfigError, match=r"(path|name): must be a relative path without \.\."):
            read_lists(tmp_path, {"events": [digest]})


def test_list_that_is_not_json_is_named(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"{").hexdigest()
    (tmp_path / LISTS).mkdir()
    list_file(tmp_path, digest).write_bytes(b"{")
    with pytest.raises(DataError, match=rf"{digest}\.json: cannot be read as JSON"):
        read_lists(tmp_path, {"events": [digest]})


def test_writing_lists_again_replaces_only_altered_ones(tmp_path: Path) -> None:
    lists = write_lists(tmp_path, dates("events", 3))
    january, february = (tmp_path / LISTS / f"{digest}.json" for digest in lists["events"])
    february.write_text("half")
    seen = january.stat().st_mtime_ns
    with pytest.raises(CommitError, match=rf"{february}: a list of partitions is not of the digest in its name"):
        read_lists(tmp_path, lists)
    assert write_lists(tmp_path, dates("events", 3)) == lists
    assert january.stat().st_mtime_ns == seen and files(tmp_path) == {january.stem, february.stem}
    assert read_lists(tmp_path, lists) == tuple(dates("events", 3))
