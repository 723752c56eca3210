"""Writing and reading Parquet files: row groups, encodings, metadata, checksums and damaged files."""

import contextlib
import hashlib
import os
import random
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestack.infra.errors import DataError
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.parquet_writer import TableWriter

SCHEMA = pa.schema([("x", pa.int64()), ("list", pa.list_(pa.int64()))])


def table(low: int, high: int) -> pa.Table:
    values = range(low, high)
    return pa.table([list(values), [[v] * (v % 3) for v in values]], schema=SCHEMA)


def write(folder: Path, sizes: list[int], row_group_rows: int = 7) -> list[Path]:
    files, start = [], 0
    for number, size in enumerate(sizes):
        files.append(folder / f"part-{number}.parquet")
        with TableWriter(files[-1], SCHEMA, row_group_rows=row_group_rows) as writer:
            writer.write(table(start, start + size))
        start += size
    return files


def test_row_groups_are_numbered_over_all_files(tmp_path: Path) -> None:
    groups = row_groups(write(tmp_path, [10, 5]))
    assert [(group.index, group.start, group.rows) for group in groups] == [(0, 0, 7), (1, 7, 3), (0, 10, 5)]
    assert read_row_group(groups[1]).equals(table(7, 10))


@pytest.mark.parametrize("bound", [{"row_group_rows": 7}, {"row_group_bytes": 100}])
@pytest.mark.parametrize("cuts", [[0, 1, 20, 20, 39, 40], [0, 7, 14, 40], [*range(41)]])
def test_bytes_do_not_depend_on_the_chunks_that_are_written(
    tmp_path: Path, bound: dict[str, int], cuts: list[int]
) -> None:
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    with TableWriter(whole, SCHEMA, **bound) as writer:
        writer.write(table(0, 40))
    with TableWriter(cut, SCHEMA, **bound) as writer:
        for low, high in pairwise(cuts):
            writer.write(table(low, high))
    assert whole.read_bytes() == cut.read_bytes()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 300))
def test_row_group_ends_with_the_row_that_reaches_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], row_group_bytes: int
) -> None:
    file = tmp_path_factory.mktemp("data") / "a.parquet"
    expected, rows, size = [], 0, 0
    for length in lengths:
        rows, size = rows + 1, size + 8 + 4 + 8 * length
        if size >= row_group_bytes:
            expected.append(rows)
            rows, size = 0, 0
    expected += [rows] * (rows > 0)
    with TableWriter(file, SCHEMA, row_group_bytes=row_group_bytes) as writer:
        writer.write(pa.table([lengths, [[1] * length for length in lengths]], schema=SCHEMA))
    assert [group.rows for group in row_groups([file])] == expected


def test_write_group_ends_the_row_group_before(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    with TableWriter(file, SCHEMA, row_group_rows=5) as writer:
        writer.write(table(0, 7))
        writer.write_group(table(7, 19))
        writer.write_group(table(19, 20))
        writer.write_group(table(20, 20))
        writer.write(table(20, 29))
    groups = row_groups([file])
    assert [group.rows for group in groups] == [5, 2, 12, 1, 0, 5, 4]
    assert pa.concat_tables(read_row_group(group) for group in groups).equals(table(0, 29))


def test_writer_hashes_and_counts_the_file(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "a.parquet", SCHEMA, row_group_rows=7) as writer:
        writer.write(table(0, 20))
        writer.write_group(table(20, 23))
    written = (tmp_path / "a.parquet").read_bytes()
    assert (writer.rows, writer.bytes) == (23, len(written))
    assert writer.digest == hashlib.sha256(written).hexdigest()


def test_null_vectors_and_field_metadata_are_restored(tmp_path: Path) -> None:
    field = pa.field("v", pa.list_(pa.float16(), 2), metadata={"who": "me"})
    rows = pa.table([pa.array([[0.5, 1.0], None, [2.0, 3.0]], field.type)], schema=pa.schema([field]))
    with TableWriter(tmp_path / "v.parquet", rows.schema) as writer:
        writer.write(rows)
    read = read_row_group(row_groups([tmp_path / "v.parquet"])[0])
    assert read.equals(rows)
    assert read.schema.field("v").metadata == {b"who": b"me"}


HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
"""All half-precision numbers, including infinities and NaN."""


@pytest.mark.parametrize(
    "column",
    [
        pa.array(HALVES),
        pa.array([None if n % 5 == 0 else list(HALVES[n : n + n % 4]) for n in range(40)], pa.list_(pa.float16())),
        pa.array([None if n % 5 == 0 else list(HALVES[n : n + 2]) for n in range(40)], pa.list_(pa.float16(), 2)),
        pa.array([[x] for x in HALVES[:40]], pa.large_list(pa.float16())),
    ],
    ids=lambda column: str(column.type),
)
def test_half_precision_is_stored_as_float32_and_restored_bit_for_bit(column: pa.Array, tmp_path: Path) -> None:
    rows = pa.table([column], names=["v"])
    with TableWriter(tmp_path / "v.parquet", rows.schema) as writer:
        writer.write(rows)
    chunk = pq.read_metadata(tmp_path / "v.parquet").row_group(0).column(0)
    assert chunk.physical_type == "FLOAT" and "RLE_DICTIONARY" in chunk.encodings
    read = read_row_group(row_groups([tmp_path / "v.parquet"])[0])
    assert read.schema.equals(rows.schema, check_metadata=True)
    assert read["v"].is_valid().equals(rows["v"].is_valid())
    values = [table["v"].combine_chunks() for table in (read, rows)]
    flat = [values_N if pa.types.is_float16(values_N.type) else values_N.flatten() for values_N in values]
    assert flat[0].view(pa.uint16()).equals(flat[1].view(pa.uint16()))


def test_half_precision_takes_about_two_bytes_per_value(tmp_path: Path) -> None:
    vectors_ND = np.random.default_rng(0).standard_normal((4096, 64))
    for name, kind in (("half", np.float16), ("single", np.float32)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.astype(kind).ravel()), 64)
        with TableWriter(tmp_path / name, pa.schema([("v", column.type)])) as writer:
            writer.write(pa.table([column], names=["v"]))
    assert (tmp_path / "half").stat().st_size < 1.15 * 2 * vectors_ND.size
    assert (tmp_path / "single").stat().st_size > 3.5 * vectors_ND.size


def encoded(path: Path, rows: pa.Table) -> dict[str, str]:
    """Write rows, read them back, and return the encoding of each column's values."""
    with TableWriter(path, rows.schema) as writer:
        writer.write(rows)
    assert writer.rows == rows.num_rows
    assert pq.read_table(path).equals(rows)
    group = pq.read_metadata(path).row_group(0)
    found = {}
    for place in range(group.num_columns):
        column = group.column(place)
        names = {"RLE_DICTIONARY", "DELTA_BINARY_PACKED"} & {*column.encodings}
        found[column.path_in_schema.split(".")[0]] = names.pop() if names else "PLAIN"
    return found


def test_repeated_values_have_a_dictionary_and_other_integers_and_times_are_delta_encoded(tmp_path: Path) -> None:
    number_N = np.arange(4000)
    lists_N = np.arange(0, 4001, 4).astype(np.int32)
    rows = pa.table(
        {
            "id": pa.array(number_N * 7919 % 100_003),
            "few": pa.array(number_N % 1000),
            "many": pa.array(number_N % 1001),
            "time": pa.array(number_N * 1_000_003, pa.timestamp("us")),
            "label": pa.array((number_N % 2).astype(np.int8), mask=number_N % 3 == 0),
            "none": pa.nulls(4000, pa.int64()),
            "score": pa.array(number_N.astype(np.float32)),
            "place": pa.array((number_N % 7).astype(np.float32)),
            "name": pa.array([str(number) for number in number_N]),
        }
    )
    lists = pa.table(
        {
            "history": pa.ListArray.from_arrays(lists_N, pa.array(number_N)),
            "slots": pa.ListArray.from_arrays(lists_N, pa.array(number_N % 5)),
            "nested": pa.array([[[number]] for number in range(1000)]),
        }
    )
    found = encoded(tmp_path / "rows.parquet", rows)
    for names, encoding in (
        ("id many time", "DELTA_BINARY_PACKED"),
        ("few label none place", "RLE_DICTIONARY"),
        ("score name", "PLAIN"),
    ):
        assert {found.pop(name) for name in names.split()} == {encoding}
    assert not found
    found = encoded(tmp_path / "lists.parquet", lists)
    assert (found["history"], found["slots"]) == ("DELTA_BINARY_PACKED", "RLE_DICTIONARY")


def test_file_without_rows_can_be_read(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "none.parquet", SCHEMA):
        pass
    assert pq.read_table(tmp_path / "none.parquet").equals(SCHEMA.empty_table())


def test_field_metadata_are_stored_in_the_file_metadata(tmp_path: Path) -> None:
    metadata_of_a = {"sidestack.sid": "{}", "who": "me"}
    fields = [pa.field("a", pa.int64(), metadata=metadata_of_a), pa.field("b", pa.list_(pa.float32(), 2))]
    schema = pa.schema(fields, metadata={"of": "all"})
    with TableWriter(tmp_path / "a.parquet", schema) as writer:
        writer.write(pa.table([[1], [[0.5, 1.0]]], schema=schema))
    found = pq.read_metadata(tmp_path / "a.parquet").metadata
    expected = {b"sidestack.sid.a": b"{}", b"sidestack.list_size.b": b"2", b"of": b"all"}
    assert {key: value for key, value in found.items() if key != b"ARROW:schema"} == expected
    (group,) = row_groups([tmp_path / "a.parquet"])
    for columns in (["a"], ["a", "b"]):
        read = read_row_group(group, columns)
        assert read.schema.equals(pa.schema(fields[: len(columns)], metadata={"of": "all"}), check_metadata=True)


MIXED = pa.table(
    {
        "id": pa.array(range(300)),
        "few": pa.array([n % 7 for n in range(300)], pa.int32()),
        "list": pa.array([[n] * (n % 4) for n in range(300)]),
        "vector": pa.array([None if n % 9 == 0 else [n / 7, -n] for n in range(300)], pa.list_(pa.float32(), 2)),
        "half": pa.array(np.arange(300, dtype=np.float16) / 3),
        "text": pa.array([None if n % 5 == 0 else f"t{n % 13}" for n in range(300)]),
        "time": pa.array(range(300), pa.timestamp("us")),
    }
)


def whole(file: Path) -> pa.Table:
    return pa.concat_tables(read_row_group(group) for group in row_groups([file]))


def test_bit_flip_raises_data_error_or_changes_no_value(tmp_path: Path) -> None:
    """Before pages had checksums, 407 of 600 flipped bits changed values without an error."""
    file, draw = tmp_path / "a.parquet", random.Random(0)
    with TableWriter(file, MIXED.schema, row_group_rows=100) as writer:
        writer.write(MIXED)
    written, rows, num_found = file.read_bytes(), whole(file), 0
    for at in [*range(0, len(written), 17), *range(len(written) - 200, len(written))]:
        file.write_bytes(written[:at] + bytes([written[at] ^ 1 << draw.randrange(8)]) + written[at + 1 :])
        try:
            assert whole(file).equals(rows, check_metadata=True), f"byte {at} of {len(written)}"
        except DataError as error:
            assert "a.parquet" in str(error)
            num_found += 1
    assert num_found > 0.9 * len(written) / 17


def test_file_without_checksums_is_read_and_its_damaged_footer_raises_data_error(tmp_path: Path) -> None:
    file, draw = tmp_path / "a.parquet", random.Random(0)
    pq.write_table(MIXED.drop_columns("vector"), file)  # pyarrow cannot read null vectors that it wrote
    written = file.read_bytes()
    assert whole(file).equals(MIXED.drop_columns("vector"))
    length = int.from_bytes(written[-8:-4], "little")
    for at in range(len(written) - length - 8, len(written), 5):
        file.write_bytes(written[:at] + bytes([written[at] ^ 1 << draw.randrange(8)]) + written[at + 1 :])
        with contextlib.suppress(DataError):
            whole(file)


@pytest.mark.parametrize("reader", ["pyarrow", "duckdb"])
def test_other_readers_read_files_with_checksums(tmp_path: Path, reader: str) -> None:
    (file,) = write(tmp_path, [20])
    if reader == "pyarrow":
        assert pq.read_table(file, page_checksum_verification=True).equals(table(0, 20))
    else:
        assert duckdb.sql(f"SELECT * FROM read_parquet('{file}')").to_arrow_table().equals(table(0, 20))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"PAR1\0\0\0\0PAR1"])
def test_file_that_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        row_groups([tmp_path / "a.parquet"])


def test_truncated_file_is_named(tmp_path: Path) -> None:
    (file,) = write(tmp_path, [20])
    os.truncate(file, 100)
    with pytest.raises(DataError, match=r"part-0\.parquet: cannot be read as Parquet"):
        row_groups([file])


def test_error_for_a_missing_column_names_file_and_row_group(tmp_path: Path) -> None:
    (group,) = row_groups(write(tmp_path, [5]))
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 0: column 'y' is missing"):
        read_row_group(group, ["y"])


def test_full_disk_is_named() -> None:
    """Writing to Linux's /dev/full always fails."""
    with pytest.raises(DataError, match=r"/dev/full: cannot be written: no space left on the disk"):
        with TableWriter(Path("/dev/full"), SCHEMA) as writer:
            writer.write(table(0, 100_000))
