"""A folder in the tables' contract as a source; every row is checked while its partition is written."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.checks import check_content, check_events, require_same_columns, require_typed_columns
from sidestack.infra.config import digest
from sidestack.infra.distributed import broadcast, raise_on_all_ranks
from sidestack.infra.errors import DataError
from sidestack.infra.parquet import RowGroup, row_groups
from sidestack.infra.stage import StageRun
from sidestack.infra.tables import (
    SPEC_FILE,
    ContentSpec,
    DatasetSpec,
    Entity,
    content_schema,
    flat_schema,
    label_schema,
    read_json,
)
from sidestack.pipelines.prepare.contract import Part, Prepare, as_time, label_keys
from sidestack.pipelines.prepare.tables.config import TablesConfig
from sidestack.pipelines.prepare.tables.files import LogFiles, log_files
from sidestack.pipelines.prepare.tables.reading import (
    check_date,
    conformed,
    ordered,
    output_schema,
    read,
    require_half_precision,
)
from sidestack.pipelines.prepare.tables.spec import REQUEST_ID, events_contract, tables_spec

_ROWS_A_DAY = 32
"""Bits for a request's number within its date, if requests are numbered here."""


class Tables(TablesConfig):
    """Settings of a growing log: a folder of joined impressions, items and users in the tables' contract."""

    def paths(self) -> Sequence[Path]:
        """Return the folder."""
        return (self.path,)

    def open(self, run: StageRun[Prepare]) -> "TablesLog":
        """Find and identify the folder's files, and complete `dataset.json`.

        Raises:
            DataError: a file is missing or cannot be identified, or `dataset.json` has another number of items or
                users.
            ConfigError: `dataset.json` is not a valid DatasetSpec, or a setting names an unknown task.
        """
        world = run.world.committing  # one rank may read many footers
        with raise_on_all_ranks(world, f"reading {self.path}"):
            files = log_files(self, run.config.as_of, run.config.identity_cache) if world.is_main else None
        found = broadcast(world, files)
        assert found is not None
        with raise_on_all_ranks(world, f"opening {self.path}"):
            spec = tables_spec(self, found)
            return TablesLog(self, found, spec, as_time(run.config.as_of))

    def data_identity(self, prepare: Prepare) -> str:
        """Return a digest of the folder's files and of `dataset.json`."""
        found = log_files(self, prepare.as_of, prepare.identity_cache)
        names = {str(path.relative_to(self.path)): found.identity[path] for path in found.all()}
        return digest({"files": names, "spec": read_json(self.path / SPEC_FILE)})


class TablesLog:
    """A folder of joined impressions as a `pipelines.prepare.contract.Source`.

    Args:
        config: the source's. files: of the folder. spec: the dataset's. end: the snapshot's end.
    """

    def __init__(self, config: TablesConfig, files: LogFiles, spec: DatasetSpec, end: datetime | None) -> None:
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
            schema = output_schema(path, contract)
            found.append(Part(str(path), key, schema, partial(self._content, path, content, schema)))
        return found

    def days(self) -> list[date]:
        """Return the dates that have events."""
        return sorted(self._files.events)

    def day_keys(self, day: date) -> dict[str, str]:
        """Return digests for a date's requests, events and labels; see `pipelines.prepare.contract.Source`."""
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
            rows = conformed(read(group), schema, group)
            require_typed_columns(rows.schema, schema, group)
            check_content(rows, content, group)
            require_half_precision(rows, content, group)
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
            ids_N, number = _number_requests(chunk, day, number, kind)
            yield chunk.append_column(REQUEST_ID, pa.array(ids_N))

    def _checked(self, day: date) -> Iterator[tuple[pa.Table, RowGroup]]:
        """Check and yield a date's row groups: the contract's columns, then further columns sorted by name."""
        first: tuple[pa.Schema, RowGroup] | None = None
        files: dict[str, Path] = {}
        for group in row_groups(self._files.events[day]):
            other = files.setdefault(self._files.identity[group.path], group.path)
            if other != group.path:
                raise DataError(f"{group.path}: is the same file as {other}, rows twice; remove one of them")
            rows = read(group)
            if self._config.requests in ("user_time", "none") and REQUEST_ID in rows.column_names:
                rows = rows.drop_columns([REQUEST_ID])
            schema = self._contract(day, rows.column_names, group)
            require_typed_columns(rows.schema, schema, group)
            check_events(rows, self.spec, group)
            check_date(rows, day, group)
            rows = ordered(rows, schema)
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
        """Add labels from separate files, and set labels to null if their follow-up is not over."""
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
            yield self._mask_immature(rows)
        if labels is not None and labels.num_rows > start:
            raise DataError(
                f"{self._config.path}/labels/date={day}: holds {labels.num_rows} rows for {start} events: they must be"
                " row-aligned"
            )

    def _labels(self, files: Sequence[Path]) -> pa.Table:
        schema, parts = label_schema(self.spec), []
        for group in row_groups(files):
            rows = read(group, schema.names)
            require_typed_columns(rows.schema, schema, group)
            check_events(rows, self.spec, group)
            parts.append(rows.cast(schema))
        return pa.concat_tables([schema.empty_table(), *parts]).combine_chunks()

    def _mask_immature(self, rows: pa.Table) -> pa.Table:
        """Return the rows with labels set to null if their follow-up is not over at the snapshot's end."""
        if self._end is None:
            return rows
        for task, days in self.spec.followup_days.items():
            end = pa.scalar(self._end - timedelta(days=days), pa.timestamp("us"))
            is_known = pc.less(rows["event_time"], end)
            labels = pc.if_else(is_known, rows[task], pa.scalar(None, pa.int8()))
            rows = rows.set_column(rows.schema.get_field_index(task), task, labels)
        return rows


def _by_user_and_time(chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Stable-sort a date's rows by time and user, so that rows of one request are adjacent."""
    parts = list(chunks)
    if parts:
        rows = pa.concat_tables(parts).combine_chunks()
        times_N, users_N = rows["event_time"].cast(pa.int64()).to_numpy(), rows["user_id"].to_numpy()
        yield rows.take(pa.array(np.lexsort((users_N, times_N))))


def _number_requests(chunk: pa.Table, day: date, number: int, kind: str | None) -> tuple[npt.NDArray[np.int64], int]:
    """Number the requests of a chunk from `number` on; return the ids and the next number."""
    starts_R = np.arange(chunk.num_rows)
    if kind == "user_time":
        times_N, users_N = chunk["event_time"].cast(pa.int64()).to_numpy(), chunk["user_id"].to_numpy()
        changes_N = (times_N[1:] != times_N[:-1]) | (users_N[1:] != users_N[:-1])
        starts_R = np.flatnonzero(np.concatenate([[True], changes_N]))
    lengths_R = np.diff(np.append(starts_R, chunk.num_rows))
    numbers_N = np.repeat(np.arange(number, number + len(starts_R)), lengths_R)
    return (day.toordinal() << _ROWS_A_DAY) + numbers_N, number + len(starts_R)
