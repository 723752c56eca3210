"""A log of one's own: joined impressions, items and users as Parquet, checked row by row as they become partitions.

Embeddings may come as fixed-size lists or as plain lists of the right length. Where some are null they must be
plain lists: pyarrow up to 25 writes null fixed-size lists but cannot read them (apache/arrow#35692). Columns may be in
any of Arrow's layouts of their type (`pipelines.prepare.layouts`).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.checks import (
    check_content,
    check_events,
    require_distinct_columns,
    require_same_columns,
    require_typed_columns,
)
from infra.config import digest, parse
from infra.distributed import broadcast, raise_on_all_ranks
from infra.errors import ConfigError, DataError
from infra.footer import read_footer
from infra.identity import Ledger
from infra.parquet import RowGroup, open_parquet, read_row_group, restored_schema, row_groups
from infra.partitions import slice_date
from infra.snapshot import CONTENT
from infra.stage import StageRun
from infra.tables import (
    SPEC_FILE,
    ContentSpec,
    DatasetSpec,
    Entity,
    content_schema,
    flat_schema,
    label_schema,
    read_json,
)
from pipelines.prepare.config import LEDGER, PrepareConfig, Tables
from pipelines.prepare.dataset import Part, as_time, label_keys
from pipelines.prepare.layouts import contract_schema, in_contract_layout

REQUEST_ID = "request_id"
_ROWS_A_DAY = 32
"""Bits for the number of a request within its date, where requests are numbered here."""


@dataclass(frozen=True)
class LogFiles:
    """The Parquet files of a folder, and what tells each from another.

    Attributes:
        content: by entity, the files of the items or users, in the order of their ids.
        events: by date. labels: by date, where labels lie apart. identity: of each file, its name aside.
    """

    content: Mapping[Entity, Sequence[Path]]
    events: Mapping[date, Sequence[Path]]
    labels: Mapping[date, Sequence[Path]]
    identity: Mapping[Path, str] = field(default_factory=dict)

    def all(self) -> list[Path]:
        """Return every file."""
        dated = itertools.chain(self.events.values(), self.labels.values())
        return [path for files in (*self.content.values(), *dated) for path in files]

    def digest(self, files: Iterable[Path]) -> list[list[str]]:
        """Return names and identities of files."""
        return [[path.name, self.identity[path]] for path in files]


def log_files(config: Tables, as_of: date | None, ledger: Path) -> LogFiles:
    """Find the files of a folder, those known before `as_of`, and identify them.

    Raises:
        DataError: a folder has no file, a name is no date, or a file cannot be identified.
    """
    content: dict[Entity, Sequence[Path]] = {
        entity: _content_files(config.path / folder, as_of) for entity, folder in CONTENT.items()
    }
    events = _dated(config.path / "events", as_of)
    if not events:
        before = f" before {as_of}" if as_of else ""
        raise DataError(f"{config.path}/events: holds no Parquet file in a folder date=YYYY-MM-DD{before}")
    labels = _dated(config.path / "labels", as_of)
    for day in sorted(labels.keys() - events.keys()):
        raise DataError(f"{config.path}/labels/date={day}: there are no events of this date")
    found = LogFiles(content, events, labels)
    identity = Ledger(ledger).identities(found.all(), config.identify)
    return LogFiles(content, events, labels, identity)


def _content_files(folder: Path, as_of: date | None) -> list[Path]:
    """Return the files of the items or users: those known from the start, then those of each date."""
    dated = _dated(folder, as_of)
    files = [*sorted(folder.glob("*.parquet")), *(path for day in sorted(dated) for path in dated[day])]
    if not files:
        raise DataError(f"{folder}: holds no Parquet file")
    return files


def _dated(folder: Path, as_of: date | None) -> dict[date, list[Path]]:
    """Return the files of each date's folder, of dates before `as_of`."""
    found = {slice_date(path.name, path): sorted(path.glob("*.parquet")) for path in sorted(folder.glob("*/"))}
    return {day: files for day, files in found.items() if as_of is None or day < as_of}


class TablesSpec(DatasetSpec):
    """A folder's `dataset.json`: a DatasetSpec whose numbers of items and users may be left to be counted."""

    num_items: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # type: ignore[assignment]
    num_users: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # type: ignore[assignment]


def open_tables(run: StageRun[PrepareConfig], config: Tables) -> "TablesLog":
    """Open a folder as a source.

    Raises:
        DataError: a file is missing or cannot be identified, or `dataset.json` says another number of items or users.
        ConfigError: `dataset.json` breaks the DatasetSpec, or a setting names no task of it.
    """
    world = run.world.committing  # one rank may read many footers
    with raise_on_all_ranks(world, f"reading {config.path}"):
        files = log_files(config, run.config.as_of, run.config.cache_dir / LEDGER) if world.is_main else None
    found = broadcast(world, files)
    assert found is not None
    with raise_on_all_ranks(world, f"opening {config.path}"):
        spec = _spec(config, found)
        return TablesLog(config, found, spec, as_time(run.config.as_of))


def _spec(config: Tables, files: LogFiles) -> DatasetSpec:
    where = config.path / SPEC_FILE
    said = parse(TablesSpec, read_json(where), str(where))
    if not said.tasks:
        raise ConfigError(f"{where}: tasks: must name at least one, as the label columns of events are named after it")
    _require_columns(config, files, said)
    values = said.model_dump()
    values["followup_days"] |= config.followup_days
    for entity, table in CONTENT.items():
        rows = _num_ids(files.content[entity], f"{entity}_id")
        if values[f"num_{table}"] not in (None, rows):
            raise DataError(
                f"{config.path}/{table}: holds {rows} rows, dataset.json says num_{table}={values[f'num_{table}']}"
            )
        values[f"num_{table}"] = rows
    for task in config.followup_days:
        if task not in said.tasks:
            raise ConfigError(f"prepare.source.followup_days.{task}: is no task; tasks are {', '.join(said.tasks)}")
    if config.test_days is not None:
        values |= _newest(sorted(files.events), config)
    return parse(DatasetSpec, values, str(where))


def _require_columns(config: Tables, files: LogFiles, spec: DatasetSpec) -> None:
    """Check the columns of all tables by footers, so that a folder of another writer is one error and not ten.

    Of events and labels, the newest file that has row groups stands for all, as it is the one that is read in any case
    when a day was added: each is checked when it is read.

    Raises:
        DataError: naming every column of every table that is missing or of another type.
    """
    wanted: list[tuple[Path, pa.Schema, pa.Schema]] = []
    for entity, paths in files.content.items():
        contract = content_schema(spec, entity)
        wanted += [(path, found, contract) for path in paths if (found := _schema_of_rows(path)) is not None]
    for day, path, found in itertools.islice(_with_rows(files.events), 1):
        contract = events_contract(config, spec, found.names, has_labels=day in files.labels)
        wanted.append((path, found, contract))
    wanted += [(path, found, label_schema(spec)) for _, path, found in itertools.islice(_with_rows(files.labels), 1)]
    faults = []
    for path, found, expected in wanted:
        try:
            require_distinct_columns(found, path)
            require_typed_columns(_with_fixed_sizes(found, expected), expected, path)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))


def _with_rows(files: Mapping[date, Sequence[Path]]) -> Iterator[tuple[date, Path, pa.Schema]]:
    """Yield the files that have row groups, with their columns, the newest date's first."""
    for day, paths in sorted(files.items(), reverse=True):
        for path in paths:
            if (found := _schema_of_rows(path)) is not None:
                yield day, path, found


def events_contract(config: Tables, spec: DatasetSpec, names: Sequence[str], has_labels: bool) -> pa.Schema:
    """Return the contract's columns that the events of a date must have.

    Args:
        config: the source's. spec: the dataset's. names: the columns that there are.
        has_labels: whether the date's labels lie apart.
    """
    left_out = list(spec.tasks) if has_labels else []
    if config.requests != "request_id" and REQUEST_ID not in names:
        left_out.append(REQUEST_ID)
    return pa.schema([one for one in flat_schema(spec) if one.name not in left_out])


def _schema_of_rows(path: Path) -> pa.Schema | None:
    """Return the columns of a file as they are read; None where it has no row group."""
    with open_parquet(path) as file:
        if not file.metadata.num_row_groups:
            return None
        return contract_schema(restored_schema(file.schema_arrow))


def _schema(path: Path) -> pa.Schema:
    """Return the columns of a file as they are read, of which no two have one name."""
    with open_parquet(path) as file:
        require_distinct_columns(file.schema_arrow, path)
        return contract_schema(restored_schema(file.schema_arrow))


def _with_fixed_sizes(found: pa.Schema, expected: pa.Schema) -> pa.Schema:
    """Return a schema in which embeddings that came as plain lists of numbers are of the size that they must have."""
    for one in expected:
        place = found.get_field_index(one.name)
        if place >= 0 and pa.types.is_fixed_size_list(one.type) and _is_list_of_numbers(found.field(place).type):
            kind = pa.list_(found.field(place).type.value_type, one.type.list_size)
            found = found.set(place, found.field(place).with_type(kind))
    return found


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_floating(kind.value_type))


def _num_ids(files: Sequence[Path], column: str) -> int:
    """Return how many ids the files number, from their footers' statistics: one more than the largest."""
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
                found = pc.max(_read(where, [column])[column]).as_py()
                if found is None:
                    raise DataError(f"{where}: column {column!r}: must not be null; is null in every row")
                largest = max(largest, found)
    return largest + 1


def _newest(days: Sequence[date], config: Tables) -> dict[str, tuple[date, date]]:
    """Return the splits of the newest dates, by `train_days` and `test_days`."""
    assert config.test_days is not None
    test = days[-config.test_days :]
    before = days[: -config.test_days]
    train = before[-config.train_days :] if config.train_days else before
    if not train:
        raise DataError(
            f"{config.path}/events: {len(days)} dates leave none to train on beside test_days={config.test_days}"
        )
    return {"train": (train[0], train[-1]), "test": (test[0], test[-1])}


class TablesLog:
    """A folder of joined impressions as a `pipelines.prepare.dataset.Source`.

    Args:
        config: the source's. files: what the folder holds. spec: the dataset's. end: when the snapshot's knowledge
            ends.
    """

    def __init__(self, config: Tables, files: LogFiles, spec: DatasetSpec, end: datetime | None) -> None:
        self.spec = spec
        self._config = config
        self._files = files
        self._end = end

    def parts(self, entity: Entity) -> list[Part]:
        """Return a part for every file of the items or users."""
        content, contract = self.spec.content(entity), content_schema(self.spec, entity)
        signals = [dict(content.embeddings), list(content.categoricals)]
        found = []
        for path in self._files.content[entity]:
            key = digest({"file": self._files.digest([path]), "signals": signals})
            schema = _output_schema(path, contract)
            found.append(Part(str(path), key, schema, partial(self._content, path, content, schema)))
        return found

    def days(self) -> list[date]:
        """Return the dates that have events."""
        return sorted(self._files.events)

    def day_keys(self, day: date) -> dict[str, str]:
        """Return what decides a date's requests, events and labels; see `pipelines.prepare.dataset.Source`."""
        spec = self.spec
        events: dict[str, Any] = {
            "files": self._files.digest(self._files.events[day]),
            "columns": [flat_schema(spec).names, spec.request_dense, list(spec.request_sparse), spec.max_history],
            "requests": self._config.requests,
        }
        keys = label_keys(events, spec.followup_days, day, self._end)
        labels = {
            "labels": keys["labels"],
            "files": self._files.digest(self._files.labels.get(day, ())),
            "given": {name: task.given for name, task in spec.tasks.items()},
        }
        return {**keys, "labels": digest(labels)}

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, Iterator[pa.Table]]]:
        """Yield some of the dates, each with its joined impressions in chunks."""
        return ((day, self._day(day)) for day in days)

    def _content(self, path: Path, content: ContentSpec, schema: pa.Schema) -> Iterator[pa.Table]:
        for group in row_groups([path]):
            rows = _conformed(_read(group), schema, group)
            require_typed_columns(rows.schema, schema, group)
            check_content(rows, content, group)
            _require_half_precision(rows, content, group)
            yield rows.select(schema.names).cast(schema)

    def _day(self, day: date) -> Iterator[pa.Table]:
        chunks = self._with_labels(day, self._checked(day))
        kind = self._config.requests
        if kind == "user_time":
            chunks = _by_user_and_time(chunks)
        number = 0
        for chunk in chunks:
            if REQUEST_ID in chunk.column_names:
                yield chunk
                continue
            ids_N, number = _numbered(chunk, day, number, kind)
            yield chunk.append_column(REQUEST_ID, pa.array(ids_N))

    def _checked(self, day: date) -> Iterator[tuple[pa.Table, RowGroup]]:
        """Yield a date's row groups, checked: the contract's columns and after them the further ones, by name."""
        first: tuple[pa.Schema, RowGroup] | None = None
        files: dict[str, Path] = {}
        for group in row_groups(self._files.events[day]):
            other = files.setdefault(self._files.identity[group.path], group.path)
            if other != group.path:
                raise DataError(f"{group.path}: is the same file as {other}, rows twice; remove one of them")
            rows = _read(group)
            if self._config.requests in ("user_time", "none") and REQUEST_ID in rows.column_names:
                rows = rows.drop_columns([REQUEST_ID])
            schema = self._contract(day, rows.column_names, group)
            require_typed_columns(rows.schema, schema, group)
            check_events(rows, self.spec, group)
            _check_date(rows, day, group)
            rows = _ordered(rows, schema)
            known, place = first = first or (rows.schema, group)
            require_same_columns(rows.schema, known, group, place)
            yield rows, group

    def _contract(self, day: date, names: Sequence[str], group: RowGroup) -> pa.Schema:
        """Return the contract's columns that a date's events must have."""
        if day in self._files.labels:
            for task in self.spec.tasks:
                if task in names:
                    raise DataError(
                        f"{group}: column {task!r}: must not be here, as the labels of {day} lie in the folder labels"
                    )
        return events_contract(self._config, self.spec, names, has_labels=day in self._files.labels)

    def _with_labels(self, day: date, chunks: Iterator[tuple[pa.Table, RowGroup]]) -> Iterator[pa.Table]:
        """Put in the labels that lie apart, and take out those whose follow-up is not over."""
        files = self._files.labels.get(day)
        labels = None if files is None else self._labels(files)
        start = 0
        for rows, group in chunks:
            if labels is not None:
                own = labels.slice(start, rows.num_rows)
                start += rows.num_rows
                if own.num_rows < rows.num_rows:
                    raise DataError(f"{group}: has more rows than the labels of {day}: they must be row-aligned")
                for name in self.spec.tasks:
                    rows = rows.append_column(name, own[name].combine_chunks())
            yield self._matured(rows)
        if labels is not None and labels.num_rows > start:
            raise DataError(
                f"{self._config.path}/labels/date={day}: holds {labels.num_rows} rows for {start} events: they must be"
                " row-aligned"
            )

    def _labels(self, files: Sequence[Path]) -> pa.Table:
        schema, parts = label_schema(self.spec), []
        for group in row_groups(files):
            rows = _read(group, schema.names)
            require_typed_columns(rows.schema, schema, group)
            check_events(rows, self.spec, group)
            parts.append(rows.cast(schema))
        return pa.concat_tables([schema.empty_table(), *parts]).combine_chunks()

    def _matured(self, rows: pa.Table) -> pa.Table:
        """Return the rows, labels null where their follow-up is not over before the snapshot's knowledge ends."""
        if self._end is None:
            return rows
        for task, days in self.spec.followup_days.items():
            end = pa.scalar(self._end - timedelta(days=days), pa.timestamp("us"))
            is_known = pc.less(rows["event_time"], end)
            labels = pc.if_else(is_known, rows[task], pa.scalar(None, pa.int8()))
            rows = rows.set_column(rows.schema.get_field_index(task), task, labels)
        return rows


def _by_user_and_time(chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Bring a date's rows of one user and time together, in order of time; their own order among them stays."""
    parts = list(chunks)
    if parts:
        rows = pa.concat_tables(parts).combine_chunks()
        times_N, users_N = rows["event_time"].cast(pa.int64()).to_numpy(), rows["user_id"].to_numpy()
        yield rows.take(pa.array(np.lexsort((users_N, times_N))))


def _numbered(chunk: pa.Table, day: date, number: int, kind: str | None) -> tuple[npt.NDArray[np.int64], int]:
    """Number the requests of a chunk from `number` on, and return the ids and the next number."""
    starts_R = np.arange(chunk.num_rows)
    if kind == "user_time":
        times_N, users_N = chunk["event_time"].cast(pa.int64()).to_numpy(), chunk["user_id"].to_numpy()
        changes_N = (times_N[1:] != times_N[:-1]) | (users_N[1:] != users_N[:-1])
        starts_R = np.flatnonzero(np.concatenate([[True], changes_N]))
    lengths_R = np.diff(np.append(starts_R, chunk.num_rows))
    numbers_N = np.repeat(np.arange(number, number + len(starts_R)), lengths_R)
    return (day.toordinal() << _ROWS_A_DAY) + numbers_N, number + len(starts_R)


def _output_schema(path: Path, expected: pa.Schema) -> pa.Schema:
    """Return the columns of a file of items or users as they are stored."""
    return _with_further(_schema(path), expected)


def _with_further(found: pa.Schema, expected: pa.Schema) -> pa.Schema:
    """Return the contract's columns, and after them those of a file beyond it, by name."""
    further = sorted(set(found.names) - set(expected.names))
    return pa.schema([*expected, *(pa.field(name, found.field(name).type) for name in further)])


def _ordered(rows: pa.Table, expected: pa.Schema) -> pa.Table:
    schema = _with_further(rows.schema, expected)
    return rows.select(schema.names).cast(schema)


def _read(group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        rows = read_row_group(group, columns)
        require_distinct_columns(rows.schema, group)
        return in_contract_layout(rows, group)
    except DataError as error:
        if "Expected all lists to be of size" in str(error):
            raise DataError(
                f"{error}; write embeddings with nulls as plain lists (pyarrow cannot read null fixed-size lists)"
            ) from error
        raise


def _conformed(content: pa.Table, expected: pa.Schema, group: RowGroup) -> pa.Table:
    """Turn embeddings that came as plain lists into fixed-size lists."""
    for one in expected:
        place = content.schema.get_field_index(one.name)
        is_embedding = pa.types.is_fixed_size_list(one.type)
        if is_embedding and place >= 0 and pa.types.is_list(content.schema.field(place).type):
            column = content[one.name]
            lengths = pc.list_value_length(column).drop_null().unique().to_pylist()
            if any(length != one.type.list_size for length in lengths):
                raise DataError(
                    f"{group}: column {one.name!r}: embeddings must have {one.type.list_size} numbers; "
                    f"found lengths {sorted(lengths)}"
                )
            fixed = pa.list_(column.type.value_type, one.type.list_size)
            content = content.set_column(place, pa.field(one.name, fixed), column.cast(fixed))
    return content


HALF = (float(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max))
"""The smallest and largest number that half precision holds to its full number of digits."""


def _require_half_precision(rows: pa.Table, content: ContentSpec, group: RowGroup) -> None:
    """Check that embeddings can be stored in half precision: that none gets infinite, zero, or far less precise."""
    low, high = HALF
    for name in content.embeddings:
        for chunk in rows[name].chunks:
            values_ND = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, chunk.type.list_size)
            if values_ND.dtype == np.float16:
                continue
            largest_N = np.abs(values_ND).max(axis=1, initial=0.0)
            wrong_M = largest_N[(largest_N > high) | ((largest_N < low) & (largest_N > 0))]
            if len(wrong_M):
                raise DataError(
                    f"{group}: column {name!r}: the largest number of an embedding is {wrong_M[0]:.3g}; embeddings are"
                    f" stored in half precision, so it must lie in [{low:.3g}, {high:.0f}], or all numbers be 0:"
                    " scale them"
                )


def _check_date(content: pa.Table, day: date, group: RowGroup) -> None:
    wrong = np.flatnonzero(content["event_time"].to_numpy().astype("datetime64[D]") != np.datetime64(day))
    if len(wrong):
        found = content["event_time"][int(wrong[0])]
        rule = f"must lie on {day}, its folder's date; row {wrong[0]} has {found}"
        raise DataError(f"{group}: column 'event_time': {rule}")
