import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest

from infra import parquet
from infra.errors import DataError
from infra.parquet import TableWriter, read_row_group, row_groups

SCHEMA = pa.schema([("x", pa.int64()), ("list", pa.list_(pa.int64()))])


def table(low: int, high: int) -> pa.Table:
    values = range(low, high)
    return pa.table([list(values), [[v] * (v % 3) for v in values]], schema=SCHEMA)


def write(folder: Path, sizes: list[int], row_group_rows: int = 7) -> list[Path]:
    files, start = [], 0
    for number, size in enumerate(sizes):
        files.append(folder / f"part-{number}.parquet")
        with TableWriter(files[-1], SCHEMA, row_group_rows) as writer:
            writer.write(table(start, start + size))
        start += size
    return files


def test_row_groups_are_numbered_over_all_files(tmp_path: Path) -> None:
    groups = row_groups(write(tmp_path, [10, 5]))
    assert [(group.index, group.start, group.rows) for group in groups] == [(0, 0, 7), (1, 7, 3), (0, 10, 5)]
    assert read_row_group(groups[1]).equals(table(7, 10))


def test_bytes_do_not_depend_on_how_the_rows_were_cut(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    with TableWriter(whole, SCHEMA, 7) as writer:
        writer.write(table(0, 40))
    with TableWriter(cut, SCHEMA, 7) as writer:
        for low, high in [(0, 1), (1, 20), (20, 39), (39, 40)]:
            writer.write(table(low, high))
    assert whole.read_bytes() == cut.read_bytes()


def test_null_vectors_and_field_metadata_survive(tmp_path: Path) -> None:
    field = pa.field("v", pa.list_(pa.float16(), 2), metadata={"who": "me"})
    rows = pa.table([pa.array([[0.5, 1.0], None, [2.0, 3.0]], field.type)], schema=pa.schema([field]))
    with TableWriter(tmp_path / "v.parquet", rows.schema) as writer:
        writer.write(rows)
    read = read_row_group(row_groups([tmp_path / "v.parquet"])[0])
    assert read.equals(rows)
    assert read.schema.field("v").metadata == {b"who": b"me"}


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    (file,) = write(tmp_path, [20])
    os.truncate(file, 100)
    with pytest.raises(DataError, match=r"part-0\.parquet: cannot be read as Parquet"):
        row_groups([file])


def test_a_missing_column_names_file_and_row_group(tmp_path: Path) -> None:
    (group,) = row_groups(write(tmp_path, [5]))
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 0: column 'y' is missing"):
        read_row_group(group, ["y"])


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = TableWriter(tmp_path / "a.parquet", SCHEMA)
    monkeypatch.setattr(parquet.pq.ParquetWriter, "write_table", full)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be written: no space left on the disk"), writer:
        writer.write(table(0, 3))
