"""Any content of a folder's Parquet files is prepared, or refused with a SidestackError and no files left."""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import SidestackError
from sidestack.infra.impressions import all_columns, read_impressions
from sidestack.infra.snapshot import read_dataset
from tests.pipelines.prepare.growing import day_at, labels_apart, read, tables_config, write_folder
from tests.pipelines.prepare.running import leftovers, run_prepare

EVENTS = "events/date=2024-01-02/part-00000.parquet"
FILES = ["items/part-00000.parquet", "users/part-00000.parquet", EVENTS, "labels/date=2024-01-02/part-00000.parquet"]
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FOLDERS = settings(max_examples=settings().max_examples // 4, suppress_health_check=SLOW)

TYPES: dict[pa.DataType, Any] = {
    pa.null(): None, pa.bool_(): True, pa.int8(): 1, pa.int32(): 1, pa.int64(): 2**62, pa.uint64(): 2**63,
    pa.float16(): np.float16(1), pa.float32(): 1.0, pa.float64(): 1e300, pa.string(): "1", pa.large_string(): "é",
    pa.string_view(): "1", pa.binary(): b"\xff", pa.decimal128(38, 2): Decimal(1), pa.date32(): date(2024, 1, 2),
    pa.time64("us"): time(1), pa.timestamp("s"): datetime(2024, 1, 2), pa.timestamp("us"): datetime(9999, 1, 1),
    pa.timestamp("ns"): datetime(2024, 1, 2), pa.timestamp("us", "UTC"): datetime(2024, 1, 2), pa.duration("us"): 1,
    pa.list_(pa.int64()): [-1], pa.list_(pa.int32()): [1], pa.list_(pa.float32()): [1.0],
    pa.list_(pa.float64()): [None],
    pa.list_(pa.string()): ["1"], pa.list_(pa.float32(), 4): [1.0] * 4, pa.list_(pa.timestamp("us")): [None],
    pa.large_list(pa.int64()): [1], pa.list_(pa.list_(pa.int64())): [[1]], pa.struct([("a", pa.int64())]): {"a": 1},
    pa.map_(pa.string(), pa.int64()): [("a", 1)],
}  # fmt: skip
"""Types that a column may have by mistake, with a value of each type."""
NUMBERS = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0.0, -0.0, 0.5, 1e300, 1e-40, float("nan"), float("inf")]
TIMES = [datetime(1, 1, 1), datetime(2024, 1, 2), datetime(2024, 1, 2, 23, 59), datetime(9999, 12, 31)]
VALUES: list[Any] = [
    None,
    *NUMBERS,
    *TIMES,
    "",
    "text",
    b"\xff",
    True,
    [],
    [None],
    [1],
    [-1],
    [2**62],
    [[1]],
    [0.5] * 4,
    [TIMES[1]],
]


def cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | pa.Array:
    """Return a column cast to another type, or filled with one value of that type if Arrow has no cast."""
    try:
        return column.cast(kind)
    except pa.ArrowException:
        return pa.array([TYPES[kind]] * len(column), kind)


def with_value(column: pa.ChunkedArray, rng: random.Random) -> pa.Array:
    """Return a column with one of `VALUES` in one row, or the column itself if its type fits none of them."""
    values = column.to_pylist()
    for value in rng.sample(VALUES, len(VALUES)):
        changed = [*values]
        changed[rng.randrange(len(values))] = value
        with suppress(pa.ArrowException, OverflowError, TypeError, ValueError):
            return pa.array(changed, column.type)
    return column.combine_chunks()


def changed(rows: pa.Table, kind: str, rng: random.Random) -> pa.Table:
    """Return rows with one fault."""
    place = rng.randrange(rows.num_columns)
    name, column = rows.column_names[place], rows.column(place)
    match kind:
        case "type":
            return rows.set_column(place, name, cast(column, rng.choice(list(TYPES))))
        case "value" if rows.num_rows:
            return rows.set_column(place, rows.schema.field(place).with_nullable(True), with_value(column, rng))
        case "nulls":
            return rows.set_column(place, name, pa.nulls(rows.num_rows, column.type))
        case "drop" if rows.num_columns > 1:
            return rows.remove_column(place)  # by index, because a name may occur twice
        case "twice":
            return rows.append_column(name, column)
        case "rename":
            return rows.rename_columns(
                [*rows.column_names[:place], rng.choice(["", "x.y", "é", "label"]), *rows.column_names[place + 1 :]]
            )
        case "rows":
            chosen = (
                [rng.randrange(rows.num_rows) for _ in range(rng.randrange(3 * rows.num_rows))] if rows.num_rows else []
            )
            return rows.take(pa.array(chosen, pa.int64()))
        case "none":
            return rows.slice(0, 0)
    return rows


KINDS = ["type", "value", "value", "value", "nulls", "drop", "twice", "rename", "rows", "none"]


def write(path: Path, rows: pa.Table, rng: random.Random) -> None:
    """Write rows with a random row group size; sometimes write no rows, or omit Arrow's schema."""
    if rng.random() < 0.1:
        pq.ParquetWriter(path, rows.schema).close()
        return
    pq.write_table(rows, path, row_group_size=rng.choice([1, 7, 1000]), store_schema=rng.random() < 0.9)


@pytest.fixture(scope="module")
def valid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a valid folder; one date has its labels in a separate table."""
    folder = write_folder(tmp_path_factory.mktemp("good") / "own", days=4)
    labels_apart(folder, day_at(1))
    return folder


@pytest.fixture
def prepare_or_refuse(valid_folder: Path, tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Return a function that prepares a folder and checks that it is read or refused without leftovers."""

    def run(folder: Path) -> None:
        out = folder.parent / "out"
        try:
            run_prepare(ALONE, tables_config(folder), out)
        except SidestackError as error:
            assert str(error).strip()
            assert not out.exists() and leftovers(folder.parent) == []
        else:
            dataset = read_dataset(out)
            dataset.verify(ALONE, dataset.snapshot.partitions)
            for rows in read_impressions(dataset, all_columns(dataset)):
                assert rows.num_rows

    yield run


@FOLDERS
@given(seed=st.integers(0, 2**32 - 1), faults=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
@example(seed=0, faults=["twice", "drop", "rename"])
def test_folder_with_faults_is_prepared_or_refused(
    seed: int, faults: list[str], valid_folder: Path, prepare_or_refuse: Callable[[Path], None], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    shutil.rmtree(tmp_path / "made", ignore_errors=True)
    folder = Path(shutil.copytree(valid_folder, tmp_path / "made/own"))
    for kind in faults:
        path = folder / rng.choice(FILES)
        with suppress(SidestackError, pa.ArrowException):  # a file with an earlier fault may be unreadable
            rows = changed(read(path), kind, rng)
            with suppress(pa.ArrowException):
                write(path, rows, rng)
    prepare_or_refuse(folder)


@FOLDERS
@given(data=st.data())
def test_file_with_changed_bytes_is_prepared_or_refused(
    data: st.DataObject, valid_folder: Path, prepare_or_refuse: Callable[[Path], None], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "made", ignore_errors=True)
    folder = Path(shutil.copytree(valid_folder, tmp_path / "made/own"))
    path = folder / data.draw(st.sampled_from(FILES))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(max(len(content) - 200, 0), len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    path.write_bytes(content[: data.draw(st.integers(0, len(content))) or None])
    prepare_or_refuse(folder)


def test_valid_folder_is_prepared(valid_folder: Path, tmp_path: Path) -> None:
    """If it were invalid, its mutations would be refused for another reason."""
    run_prepare(ALONE, tables_config(valid_folder), tmp_path / "out")
    assert np.isin(["click", "item_id"], all_columns(read_dataset(tmp_path / "out"))).all()
