"""A folder's `dataset.json`, completed from the files and checked against their columns."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from sidestack.infra.checks import require_distinct_columns, require_typed_columns
from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.footer import read_footer
from sidestack.infra.parquet import RowGroup
from sidestack.infra.snapshot import CONTENT
from sidestack.infra.tables import SPEC_FILE, DatasetSpec, content_schema, flat_schema, label_schema, read_json
from sidestack.pipelines.prepare.tables.config import TablesConfig
from sidestack.pipelines.prepare.tables.files import LogFiles
from sidestack.pipelines.prepare.tables.reading import read, schema_of_rows, with_fixed_sizes

REQUEST_ID = "request_id"


class TablesSpec(DatasetSpec):
    """A folder's `dataset.json`: a DatasetSpec in which the numbers of items and users are optional."""

    num_items: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # type: ignore[assignment]
    num_users: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # type: ignore[assignment]


def tables_spec(config: TablesConfig, files: LogFiles) -> DatasetSpec:
    """Return a folder's `dataset.json`, completed from the files: numbers of items and users, and splits.

    Raises:
        DataError: a column is missing or of another type, or the files have another number of items or users.
        ConfigError: it is not a valid DatasetSpec, or a setting names an unknown task.
    """
    where = config.path / SPEC_FILE
    given = parse(TablesSpec, read_json(where), str(where))
    if not given.tasks:
        raise ConfigError(f"{where}: tasks: must name at least one, as the label columns of events are named after it")
    _require_columns(config, files, given)
    values = given.model_dump()
    values["followup_days"] |= config.followup_days
    for entity, table in CONTENT.items():
        rows = _num_ids(files.content[entity], f"{entity}_id")
        if values[f"num_{table}"] not in (None, rows):
            raise DataError(
                f"{config.path}/{table}: holds {rows} rows, dataset.json says num_{table}={values[f'num_{table}']}"
            )
        values[f"num_{table}"] = rows
    for task in config.followup_days:
        if task not in given.tasks:
            raise ConfigError(f"prepare.source.followup_days.{task}: is no task; tasks are {', '.join(given.tasks)}")
    if config.test_days is not None:
        values |= _newest(sorted(files.events), config)
    return parse(DatasetSpec, values, str(where))


def _require_columns(config: TablesConfig, files: LogFiles, spec: DatasetSpec) -> None:
    """Check all tables' columns by their footers, so that all faults of a folder are one error.

    For events and labels, only the newest file with row groups is checked here: it is read anyway when a day was added.
    Every file is checked when it is read.

    Raises:
        DataError: naming every column of every table that is missing or of another type.
    """
    wanted: list[tuple[Path, pa.Schema, pa.Schema]] = []
    for entity, paths in files.content.items():
        contract = content_schema(spec, entity)
        wanted += [(path, found, contract) for path in paths if (found := schema_of_rows(path)) is not None]
    for day, path, found in itertools.islice(_with_rows(files.events), 1):
        contract = events_contract(config, spec, found.names, has_labels=day in files.labels)
        wanted.append((path, found, contract))
    wanted += [(path, found, label_schema(spec)) for _, path, found in itertools.islice(_with_rows(files.labels), 1)]
    faults = []
    for path, found, expected in wanted:
        try:
            require_distinct_columns(found, path)
            require_typed_columns(with_fixed_sizes(found, expected), expected, path)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))


def _with_rows(files: Mapping[date, Sequence[Path]]) -> Iterator[tuple[date, Path, pa.Schema]]:
    """Yield the files with row groups and their columns, newest date first."""
    for day, paths in sorted(files.items(), reverse=True):
        for path in paths:
            if (found := schema_of_rows(path)) is not None:
                yield day, path, found


def events_contract(config: TablesConfig, spec: DatasetSpec, names: Sequence[str], has_labels: bool) -> pa.Schema:
    """Return the contract's columns that the events of a date must have.

    Args:
        config: the source's. spec: the dataset's. names: the existing columns.
        has_labels: whether the date's labels are in separate files.
    """
    left_out = list(spec.tasks) if has_labels else []
    if config.requests != "request_id" and REQUEST_ID not in names:
        left_out.append(REQUEST_ID)
    return pa.schema([one for one in flat_schema(spec) if one.name not in left_out])


def _num_ids(files: Sequence[Path], column: str) -> int:
    """Return the number of ids, from the statistics in the files' footers: one more than the largest id."""
    largest = -1
    for path in files:
        metadata = read_footer(path)
        number = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column), None)
        if number is None:  # of a file without rows
            continue
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(number).statistics
            if statistics is not None and statistics.has_min_max:
                largest = max(largest, int(statistics.max))
            elif metadata.row_group(group).num_rows:
                where = RowGroup(path, group, 0, metadata.row_group(group).num_rows)
                found = pc.max(read(where, [column])[column]).as_py()
                if found is None:
                    raise DataError(f"{where}: column {column!r}: must not be null; is null in every row")
                largest = max(largest, found)
    return largest + 1


def _newest(days: Sequence[date], config: TablesConfig) -> dict[str, tuple[date, date]]:
    """Return the splits by `train_days` and `test_days`, counted from the newest date."""
    assert config.test_days is not None
    test = days[-config.test_days :]
    before = days[: -config.test_days]
    train = before[-config.train_days :] if config.train_days else before
    if not train:
        raise DataError(
            f"{config.path}/events: {len(days)} dates leave none to train on beside test_days={config.test_days}"
        )
    return {"train": (train[0], train[-1]), "test": (test[0], test[-1])}
