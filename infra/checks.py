"""Checks of rows against the tables' contract (`infra.tables`)."""

from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.errors import DataError
from sidestack.infra.parquet import RowGroup
from sidestack.infra.tables import TIME, ContentSpec, DatasetSpec


def check_items(table: pa.Table, spec: DatasetSpec, where: RowGroup) -> None:
    """Check rows of the items table; see `check_content`."""
    check_content(table, spec.content("item"), where)


def check_users(table: pa.Table, spec: DatasetSpec, where: RowGroup) -> None:
    """Check rows of the users table; see `check_content`."""
    check_content(table, spec.content("user"), where)


def check_content(table: pa.Table, content: ContentSpec, where: RowGroup) -> None:
    """Check rows of items or users: types, ids, finite embeddings, categorical ranges.

    Only the contract's columns that the table holds are checked, so that a reader of a few columns can use it.

    Raises:
        DataError: naming file, row group, column and rule.
    """
    check = _Checker(table, where)
    check.rising_ids(content.id_column, content.rows)
    for name, dim in content.embeddings.items():
        check.embedding(name, dim)
    for name, cardinality in content.categoricals.items():
        check.ids(name, pa.int32(), cardinality)


def check_events(table: pa.Table, spec: DatasetSpec, where: RowGroup) -> None:
    """Check rows of requests, events, labels, or of all of them joined.

    The rules cover types, nulls, labels, finite dense values, id ranges, and that a history precedes its request.

    Only the contract's columns that the table holds are checked, so that a reader of a few columns can use it.

    Raises:
        DataError: naming file, row group, column and rule.
    """
    check = _Checker(table, where)
    check.present("request_id", pa.int64())
    check.present("event_time", TIME)
    for name, number in (("user_id", spec.num_users), ("item_id", spec.num_items)):
        check.ids(name, pa.int64(), number, nullable=False)
    for name in spec.tasks:
        check.label(name)
    for name, task in spec.tasks.items():  # a second loop: a parent's type must be checked first
        if task.given is not None:
            check.given(name, task.given)
    for name in spec.all_dense:
        check.finite(name)
    for name, number in spec.all_sparse.items():
        check.id_lists(name, number)
    check.id_lists("history_item_ids", spec.num_items)
    check.history(spec.max_history)


def require_typed_columns(schema: pa.Schema, expected: pa.Schema, where: RowGroup | Path) -> None:
    """Check that every column of `expected` is there, with its type (embeddings of any precision).

    Raises:
        DataError: naming every missing column, and for each wrong type the found and the expected one.
    """
    faults = []
    for field in expected:
        if field.name not in schema.names:
            faults.append(f"{where}: column {field.name!r} is missing; expected type {type_name(field.type)}")
        elif fault := _type_fault(field.name, schema.field(field.name).type, field.type, where):
            faults.append(fault)
    if faults:
        raise DataError("\n".join(faults))


def require_distinct_columns(schema: pa.Schema, where: RowGroup | Path) -> None:
    """Check that no two columns have the same name: Parquet allows it, but Arrow then finds neither by name.

    Raises:
        DataError: naming every such column.
    """
    twice = [name for name, number in Counter(schema.names).items() if number > 1]
    if twice:
        raise DataError("\n".join(f"{where}: column {name!r} occurs twice in the file" for name in twice))


def require_same_columns(schema: pa.Schema, known: pa.Schema, where: object, known_where: object) -> None:
    """Check that a schema has the same columns and types as another, in any order.

    Raises:
        DataError: naming the first column that differs.
    """
    for name in dict.fromkeys([*known.names, *schema.names]):
        own, other = (str(one.field(name).type) if name in one.names else "missing" for one in (schema, known))
        if own != other:
            raise DataError(
                f"{where}: column {name!r} is {own}, in {known_where} it is {other}: all files of a table must have"
                " the same columns, each of one type"
            )


def _type_fault(name: str, found: pa.DataType, expected: pa.DataType, where: RowGroup | Path) -> str:
    """Return an error text if a column has another type than it must have; empty if its type is right."""
    if pa.types.is_fixed_size_list(expected) and pa.types.is_fixed_size_list(found):
        same = found.list_size == expected.list_size and pa.types.is_floating(found.value_type)
    else:
        same = found == expected
    return "" if same else f"{where}: column {name!r} has type {found}, must be {type_name(expected)}"


def type_name(expected: pa.DataType) -> str:
    """Return the name of a type that a column must have, for errors."""
    if pa.types.is_fixed_size_list(expected):
        return f"a list of {expected.list_size} numbers of type float32 (or float16, float64)"
    return str(expected)


class _Checker:
    """The individual rules, each over one column of one row group."""

    def __init__(self, table: pa.Table, where: RowGroup) -> None:
        self.table = table
        self.where = where

    def fail(self, column: str, rule: str) -> None:
        raise DataError(f"{self.where}: column {column!r}: {rule}")

    def present(self, name: str, expected: pa.DataType, nullable: bool = False) -> pa.ChunkedArray | None:
        """Return the column if the table holds it, after checking its type and nulls."""
        if name not in self.table.column_names:
            return None
        column = self.table[name]
        if fault := _type_fault(name, column.type, expected, self.where):
            raise DataError(fault)
        if not nullable and column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            self.fail(name, f"must not be null; is null in {column.null_count} rows, first in row {row}")
        return column

    def ids(self, name: str, expected: pa.DataType, number: int, nullable: bool = True) -> None:
        column = self.present(name, expected, nullable)
        if column is not None:
            self._in_range(name, column, number)

    def id_lists(self, name: str, number: int) -> None:
        column = self.present(name, pa.list_(pa.int64()))
        if column is None:
            return
        values = pc.list_flatten(column)
        if values.null_count:
            self.fail(name, "must hold no null inside a list")
        self._in_range(name, values, number)

    def _in_range(self, name: str, values: pa.ChunkedArray, number: int) -> None:
        bounds = pc.min_max(values)
        low, high = bounds["min"].as_py(), bounds["max"].as_py()
        if low is not None and (low < 0 or high >= number):
            self.fail(name, f"id {low if low < 0 else high} is outside the table [0, {number})")

    def rising_ids(self, name: str, number: int) -> None:
        column = self.present(name, pa.int64())
        if column is None:
            return
        self._in_range(name, column, number)
        ids_N = column.to_numpy()
        falling = np.flatnonzero(ids_N[1:] <= ids_N[:-1])
        if len(falling):
            row = int(falling[0]) + 1
            self.fail(name, f"ids must rise; row {row} has {ids_N[row]} after {ids_N[row - 1]}")

    def label(self, name: str) -> None:
        column = self.present(name, pa.int8(), nullable=True)
        if column is None:
            return
        bounds = pc.min_max(column)
        for value in (bounds["min"].as_py(), bounds["max"].as_py()):
            if value not in (0, 1, None):
                self.fail(name, f"label {value} is not 0 or 1")

    def given(self, name: str, parent: str) -> None:
        """Check that a label is not 1 where the label of the task's parent is 0."""
        if {name, parent} <= set(self.table.column_names):
            is_wrong = pc.and_(pc.equal(self.table[name], 1), pc.equal(self.table[parent], 0))
            wrong = np.flatnonzero(pc.fill_null(is_wrong, False).to_numpy())
            if len(wrong):
                rule = f"must not be 1 where {parent!r} is 0, which it is given"
                self.fail(name, f"{rule}; is in {len(wrong)} rows, first in row {wrong[0]}")

    def finite(self, name: str) -> None:
        column = self.present(name, pa.float32())
        if column is not None:
            self._all_finite(name, column.to_numpy())

    def embedding(self, name: str, dim: int) -> None:
        column = self.present(name, pa.list_(pa.float16(), dim), nullable=True)
        if column is not None:
            # flatten() skips the slots of nulls, whatever bytes they hold.
            for chunk in column.chunks:
                self._all_finite(name, chunk.flatten().to_numpy(zero_copy_only=False))

    def _all_finite(self, name: str, values: npt.NDArray[np.floating]) -> None:
        # numpy widens float16 values one by one; a test of their exponent bits is ten times faster.
        halves = values.dtype == np.float16
        finite = (values.view(np.uint16) & 0x7C00) != 0x7C00 if halves else np.isfinite(values)
        if not finite.all():
            self.fail(name, f"must be finite; holds {values[~finite][0]}")

    def history(self, longest: int) -> None:
        times = self.present("history_times", pa.list_(TIME))
        if times is None or "history_item_ids" not in self.table.column_names:
            return
        if pc.list_flatten(times).null_count:
            self.fail("history_times", "must hold no null inside a list")
        lengths = pc.list_value_length(times).to_numpy()
        if not np.array_equal(lengths, pc.list_value_length(self.table["history_item_ids"]).to_numpy()):
            self.fail("history_times", "must have as many entries as history_item_ids in every row")
        if len(lengths) and lengths.max() > longest:
            self.fail("history_times", f"has {lengths.max()} entries, more than max_history={longest}")
        flat = pc.list_flatten(times).cast(pa.int64()).to_numpy()
        ends = np.cumsum(lengths)
        is_older = flat[1:] < flat[:-1]  # than the entry before it
        is_older[ends[(ends > 0) & (ends < len(flat))] - 1] = False  # there the entry before is another row's
        if is_older.any():
            self.fail("history_times", "must be oldest first")
        if "event_time" in self.table.column_names:
            event = self.table["event_time"].cast(pa.int64()).to_numpy()
            held = np.flatnonzero(lengths)
            late = held[flat[ends[held] - 1] >= event[held]]  # a row's newest entry bounds all of its entries
            if len(late):
                row = int(late[0])
                entries = flat[ends[row] - lengths[row] : ends[row]]
                at = datetime(1970, 1, 1) + timedelta(microseconds=int(entries[entries >= event[row]][0]))
                self.fail("history_times", f"must lie strictly before event_time; row {row} has an entry at {at}")
