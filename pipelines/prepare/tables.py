"""A user's own tables: streamed through every check of the contract, row group by row group, and committed.

Embeddings may come as fixed-size lists or as plain lists of the right length. Where some are null they must be
plain lists: pyarrow up to 25 writes null fixed-size lists but cannot read them (apache/arrow#35692).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.commit import is_committed, verify
from infra.distributed import gather, together
from infra.errors import DataError
from infra.parquet import RowGroup, open_parquet, read_row_group, row_groups
from infra.stage import StageRun
from infra.tables import (
    Dataset,
    DatasetSpec,
    check_events,
    check_items,
    check_users,
    event_schema,
    item_schema,
    read_dataset,
    require_columns,
    user_schema,
    write_spec,
)
from pipelines.prepare.config import PrepareConfig, Tables
from pipelines.prepare.write import write_stream


@dataclass(frozen=True)
class Kind:
    """One of the three tables: its files, the columns it must have, and the check of its rows."""

    files: tuple[Path, ...]
    schema: pa.Schema
    check: Callable[[pa.Table, DatasetSpec, RowGroup], None]


def prepare_tables(run: StageRun[PrepareConfig], config: Tables) -> None:
    """Check and copy a dataset that is in the contract already; each rank takes its share of the files.

    Raises:
        DataError: a file, a column or a row breaks the contract; the message names it and the rule.
        CommitError: the directory is committed and was altered since.
    """
    with together(run.world, f"reading {config.path}"):
        if is_committed(config.path):
            verify(config.path)
        dataset = read_dataset(config.path)
        kinds = _kinds(dataset)
        if run.world.is_main:
            write_spec(run.out, dataset.spec)
    with together(run.world, f"checking {config.path}"):
        rows = [_copy(kind, dataset, run.out, run.world.rank, run.world.size) for kind in kinds]
    items, users, events = (sum(of_rank) for of_rank in zip(*gather(run.world, rows), strict=True))
    run.log.say(f"checked {items:,} items, {users:,} users and {events:,} events of {config.path}")
    run.log.summary({"items": items, "users": users, "events": events})


def _kinds(dataset: Dataset) -> tuple[Kind, Kind, Kind]:
    spec = dataset.spec
    for folder in sorted(dataset.path.glob("events/*")):
        _folder_date(folder)
    for split in (spec.train, spec.test):
        dataset.event_files(*split)  # raises where a split has no event at all
    kinds = (
        Kind(dataset.item_files, item_schema(spec), check_items),
        Kind(dataset.user_files, user_schema(spec), check_users),
        Kind(dataset.all_event_files(), event_schema(spec), check_events),
    )
    for kind, name, number in ((kinds[0], "num_items", spec.num_items), (kinds[1], "num_users", spec.num_users)):
        found = sum(group.rows for group in row_groups(kind.files))
        if found != number:
            raise DataError(f"{kind.files[0].parent}: holds {found} rows, dataset.json says {name}={number}")
    return kinds


def _copy(kind: Kind, dataset: Dataset, out: Path, rank: int, size: int) -> int:
    groups = row_groups(kind.files)
    rows = 0
    for path in kind.files[rank::size]:
        chunks = _checked(kind, dataset.spec, [group for group in groups if group.path == path])
        rows += write_stream(out / path.relative_to(dataset.path), _output_schema(path, kind.schema), chunks)
    return rows


def _output_schema(path: Path, expected: pa.Schema) -> pa.Schema:
    """Give the contract's columns, and after them the file's further ones."""
    with open_parquet(path) as file:
        found = file.schema_arrow
    for field in expected:
        if field.name not in found.names:
            raise DataError(f"{path}: column {field.name!r} is missing; expected type {field.type}")
    return pa.schema([*expected, *(field for field in found if field.name not in expected.names)], found.metadata)


def _checked(kind: Kind, spec: DatasetSpec, groups: Sequence[RowGroup]) -> Iterator[pa.Table]:
    for group in groups:
        content = _conformed(_read(group), kind.schema, group)
        require_columns(content.schema, kind.schema, group)
        kind.check(content, spec, group)
        if kind.check is check_events:
            _check_date(content, group)
        further = [name for name in content.column_names if name not in kind.schema.names]
        yield content.select([*kind.schema.names, *further])


def _read(group: RowGroup) -> pa.Table:
    try:
        return read_row_group(group)
    except DataError as error:
        if "Expected all lists to be of size" in str(error):
            raise DataError(
                f"{error}; write embeddings with nulls as plain lists (pyarrow cannot read null fixed-size lists)"
            ) from error
        raise


def _conformed(content: pa.Table, expected: pa.Schema, group: RowGroup) -> pa.Table:
    """Turn embeddings that came as plain lists into fixed-size lists."""
    for field in expected:
        place = content.schema.get_field_index(field.name)
        is_embedding = pa.types.is_fixed_size_list(field.type)
        if is_embedding and place >= 0 and pa.types.is_list(content.schema.field(place).type):
            column = content[field.name]
            lengths = pc.list_value_length(column).drop_null().unique().to_pylist()
            if any(length != field.type.list_size for length in lengths):
                raise DataError(
                    f"{group}: column {field.name!r}: embeddings must have {field.type.list_size} numbers; "
                    f"found lengths {sorted(lengths)}"
                )
            fixed = pa.list_(column.type.value_type, field.type.list_size)
            content = content.set_column(place, pa.field(field.name, fixed), column.cast(fixed))
    return content


def _check_date(content: pa.Table, group: RowGroup) -> None:
    day = _folder_date(group.path.parent)
    wrong = np.flatnonzero(content["event_time"].to_numpy().astype("datetime64[D]") != np.datetime64(day))
    if len(wrong):
        found = content["event_time"][int(wrong[0])]
        rule = f"must lie on {day}, its folder's date; row {wrong[0]} has {found}"
        raise DataError(f"{group}: column 'event_time': {rule}")


def _folder_date(folder: Path) -> date:
    name, _, text = folder.name.partition("=")
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day = None
    if name != "date" or day is None:
        raise DataError(f"{folder}: events must lie in folders named date=YYYY-MM-DD")
    return day
