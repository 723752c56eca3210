"""Rows of files: which footers are read, which files are refused, and runs of rows with shared columns."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sidestack.infra.rows
from sidestack.infra.errors import DataError
from sidestack.infra.footer import read_footer
from sidestack.infra.parquet import RowGroup
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.rows import CountedFile, FileRows, Rows, RowSource, concatenated
from tests.infra.test_parquet import table, write
from tests.noted import noted


def counted(files: list[Path], sizes: list[int]) -> list[CountedFile]:
    return [CountedFile(file, size) for file, size in zip(files, sizes, strict=True)]


def test_groups_are_the_row_groups_that_hold_the_rows(tmp_path: Path) -> None:
    files = write(tmp_path, [10, 0, 5])
    rows = FileRows(files, ["x"])
    assert rows.num_rows == 15
    everything = [RowGroup(files[0], 0, 0, 7), RowGroup(files[0], 1, 7, 3), RowGroup(files[2], 0, 10, 5)]
    for low in range(15):
        for high in range(low + 1, 16):
            assert rows.groups(low, high) == [g for g in everything if max(low, g.start) < min(high, g.start + g.rows)]
    assert rows.table(everything[1]).equals(table(7, 10).select(["x"]))
    source: RowSource = rows
    assert source.starts(everything[1]) is None


def test_empty_row_group_is_left_out(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "x.parquet", table(0, 1).schema) as writer:
        for start, end in ((0, 0), (0, 4), (4, 4), (4, 6)):
            writer.write_group(table(start, end))
    rows = FileRows([CountedFile(tmp_path / "x.parquet", 6)], ["x"])
    assert [(group.start, group.rows) for group in rows.groups(0, 6)] == [(0, 4), (4, 2)]
    assert [rows.table(group)["x"].to_pylist() for group in rows.groups(2, 5)] == [[0, 1, 2, 3], [4, 5]]


def test_selected_columns_are_read_and_checked(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    rows = FileRows(write(tmp_path, [10]), ["x", "list"], lambda table, where: seen.append(table.column_names))
    (first, _) = rows.groups(0, 10)
    assert rows.table(first, ["list"]).equals(table(0, 7).select(["list"]))
    assert rows.table(first).column_names == ["x", "list"]
    assert seen == [["list"], ["x", "list"]]


def test_only_the_needed_counted_files_are_opened_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [10, 5, 8, 9]
    files = write(tmp_path, sizes)
    opened: list[Path] = []
    monkeypatch.setattr(sidestack.infra.rows, "read_footer", noted(opened.append, read_footer))
    rows = FileRows(counted(files, sizes), ["x"])
    assert (rows.num_rows, opened) == (32, [])
    group = rows.groups(10, 16)[-1]
    assert rows.groups(12, 16)[-1] == group == RowGroup(files[2], 0, 15, 7)
    assert opened == [files[1], files[2]]
    assert rows.num_opened == 2


def test_reading_a_row_group_does_not_read_the_footer_again(tmp_path: Path) -> None:
    (file,) = write(tmp_path, [20])
    rows = FileRows([file], ["x", "list"])
    bytes_ = bytearray(file.read_bytes())
    bytes_[-8:-4] = b"\xff\xff\xff\x7f"  # a footer of two gigabytes
    file.write_bytes(bytes_)
    assert rows.table(rows.groups(8, 9)[0]).equals(table(7, 14))


def test_file_with_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, [10, 5])
    rows = FileRows(counted(files, [10, 6]), ["x"])
    assert len(rows.groups(0, 10)) == 2
    with pytest.raises(DataError, match=r"part-1\.parquet: holds 5 rows, its manifest says 6"):
        rows.groups(0, 11)


def test_files_with_different_types_of_a_column_are_refused(tmp_path: Path) -> None:
    files = []
    for number, element in enumerate((pa.float16(), pa.float32())):
        rows = pa.table(
            {"x": [1, 2], "v": pa.array([[0.5, 1.0]] * 2, pa.list_(element, 2)), "own": pa.nulls(2, element)}
        )
        files.append(tmp_path / f"part-{number}.parquet")
        with TableWriter(files[-1], rows.schema) as writer:
            writer.write(rows)
    with pytest.raises(DataError, match=r"part-1.*'v' is .*<.*float.*part-0.*halffloat.*one type"):
        FileRows(files, ["x", "v"])
    assert FileRows(files, ["x"]).num_rows == 4
    late = FileRows(counted(files, [2, 2]), ["x", "v"])
    assert len(late.groups(2, 4)) == 1  # no other file has been opened to compare types with
    with pytest.raises(DataError, match=r"part-0.*'v' is .*halffloat.*part-1"):
        late.groups(0, 4)


RunLengths = list[tuple[str, int]]
"""For each run of rows, the shared value and the number of rows."""


def rows_in_runs(runs: RunLengths) -> Rows:
    lengths = [length for _, length in runs]
    own = pa.table({"number": np.arange(sum(lengths))})
    shared = pa.table({"name": [name for name, _ in runs], "letters": [list(name) for name, _ in runs]})
    return Rows(own, shared, np.repeat(np.arange(len(runs)), lengths))


def checked_rows(rows: Rows) -> list[tuple[int, str, list[str]]]:
    """Return number, name and letters of each row without using `joined`, and check the rules of `run_N`."""
    assert rows.shared is not None
    assert rows.num_runs == len(set(rows.run_N.tolist()))
    if rows.num_rows:
        assert rows.run_N[0] == 0 and set(np.diff(rows.run_N)) <= {0, 1}
    names, letters = (rows.shared[name].to_pylist() for name in ("name", "letters"))
    runs = rows.run_N.tolist()
    return [(n, names[run], letters[run]) for n, run in zip(rows.own["number"].to_pylist(), runs, strict=True)]


some_runs = st.lists(st.tuples(st.text("abc", max_size=3), st.integers(1, 4)), min_size=1, max_size=6)


@given(some_runs, st.data())
def test_sliced_taken_and_concatenated_rows_keep_their_shared_columns(runs: RunLengths, data: st.DataObject) -> None:
    rows = rows_in_runs(runs)
    expected = [(number, name, list(name)) for number, name in enumerate(name for name, n in runs for _ in range(n))]
    assert checked_rows(rows) == expected
    start = data.draw(st.integers(0, len(expected)))
    number = data.draw(st.integers(0, len(expected) - start))
    part = rows.slice(start, number)
    assert checked_rows(part) == expected[start : start + number]
    order = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=8))
    taken = rows.take(np.array(order, np.int64))
    assert checked_rows(taken) == [expected[at] for at in order]
    both = concatenated([part, taken]).in_one_chunk()
    assert checked_rows(both) == expected[start : start + number] + [expected[at] for at in order]
    assert both.column("letters").to_pylist() == [letters for _, _, letters in checked_rows(both)]
    assert both.column("number").to_pylist() == [at for at, _, _ in checked_rows(both)]
    joined = both.joined(["name", "number"])
    assert joined.to_pylist() == [{"name": name, "number": at} for at, name, _ in checked_rows(both)]


def test_run_that_stays_together_is_not_repeated() -> None:
    taken = rows_in_runs([("a", 3), ("b", 2), ("c", 1)]).take(np.array([3, 4, 0, 1, 2, 5]))
    assert taken.num_runs == 3
    split = rows_in_runs([("a", 3), ("b", 2)]).take(np.array([0, 3, 1, 4, 2]))
    assert split.num_runs == 5
