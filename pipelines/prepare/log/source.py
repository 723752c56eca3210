"""A raw log as a data source: ingest new files, number new ids, and open the result."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import duckdb

from sidestack.infra.config import digest, plain
from sidestack.infra.distributed import broadcast, raise_on_all_ranks
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.remote.urls import local_path
from sidestack.infra.sql import file_list, literal, quoted
from sidestack.infra.stage import StageRun
from sidestack.infra.store import Store
from sidestack.infra.tables import Entity
from sidestack.pipelines.prepare.contract import STORE, Prepare, as_time
from sidestack.pipelines.prepare.log.config import ContentFiles, LogConfig
from sidestack.pipelines.prepare.log.content import (
    TEXT_EMBEDDING,
    Content,
    VocabularyRule,
    distinct_texts,
    embedding_dims,
    entity_columns,
    read_values,
    vocabularies,
)
from sidestack.pipelines.prepare.log.engine import require_engine
from sidestack.pipelines.prepare.log.files import EVENTS, ITEMS, USERS, paths_of, raw_files
from sidestack.pipelines.prepare.log.ingest import RawPart, ingest, repairs, table_settings
from sidestack.pipelines.prepare.log.masking import masking_of, require_one_key
from sidestack.pipelines.prepare.log.numbering import Numbering, create_once, files_of
from sidestack.pipelines.prepare.log.on_duckdb import database
from sidestack.pipelines.prepare.log.opened import LogContent, LogSource
from sidestack.pipelines.prepare.log.retention import RETAINED_SINCE, Retention, Totals, carried_totals
from sidestack.pipelines.prepare.text import embed_texts, embedding_dim


class Log(LogConfig):
    """Settings of the user's own log from raw files: string ids, events without histories, late labels, texts."""

    def paths(self) -> Sequence[Path]:
        """Return the paths of all tables' files, which may be globs."""
        return [local_path(path) for paths in paths_of(self).values() for path in paths]

    def open(self, run: StageRun[Prepare]) -> LogSource:
        """Ingest new raw files, number new ids, and open the log. Every rank must call it; rank 0 reads.

        Raises:
            DataError: lists all faults of all files; see `pipelines.prepare.log.ingest`. ConfigError: the tasks'
                parents form a cycle, or the engine or the text encoder is not installed.
        """
        require_engine(self.engine)
        world = run.world.committing
        store = Store(run.out.parent / STORE)
        with raise_on_all_ranks(world, "reading the raw log"):
            opened = _read_log(run, self, store) if world.is_main else None
        found = broadcast(world, opened)
        assert found is not None
        if self.items is not None and self.items.text:
            found = replace(found, items=_with_texts(run, self, found.items))
        if found.since > date.min:
            run.facts[RETAINED_SINCE] = found.since.isoformat()
        return LogSource(self, store, found, as_time(run.config.as_of), run.log.info)

    def data_identity(self, prepare: Prepare) -> str:
        """Return a digest of the raw files of each table, and of the masking key if there is one."""
        raw, masking = raw_files(self, prepare.identity_cache), masking_of(self.privacy)
        key: dict[str, Any] = {} if masking is None else {"key": masking.key_id}
        return digest(key | {name: sorted(raw.identity[file] for file in files) for name, files in raw.tables.items()})

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the tables: all but the query engine, as the rows are the same."""
        return self.model_dump(mode="json", exclude={"engine"})


def _read_log(run: StageRun[Prepare], config: LogConfig, store: Store) -> LogContent:
    config.require_filesystem(store.path)
    files = raw_files(config, run.config.identity_cache)
    masking = masking_of(config.privacy)
    require_one_key(store, masking, config.privacy.mask_items)
    retention = Retention(store, config.privacy.retention_days, run.config.as_of)
    with database(run.out.parent) as connection:
        parts, since = ingest(config, files, store, connection, masking, retention)
        settings = digest(table_settings(config, EVENTS, masking))
        totals = carried_totals(store, settings, _totals(parts[EVENTS]), since)
        events = [part for part in parts[EVENTS] if part.is_kept(store)]
        labels = {name: [part for part in parts[f"labels.{name}"] if part.is_kept(store)] for name in config.labels}
        days = [day for day in sorted(totals) if day >= since]
        if not days:
            kept = f" on {since} or later, and earlier rows are not kept" if totals else ""
            raise DataError(f"prepare.source.events.path: the files hold no event{kept}")
        late = [day for found in labels.values() for part in found for day in part.days]
        end = run.config.as_of or max(days + late) + timedelta(days=1)
        if days[0] >= end:
            kept = " that is kept" if since > date.min else ""
            raise DataError(f"prepare.as_of: {end}: the log's first event{kept} is on {days[0]}")
        items = _content(connection, store, config, "item", parts.get(ITEMS, ()), events, end)
        users = _content(connection, store, config, "user", parts.get(USERS, ()), events, end)
        lists = _event_lists(connection, store, config, events, end)
        for repair in repairs(parts):
            run.log.info(f"prepare: {repair}")
    return LogContent(events, labels, items, users, *lists, end, totals, since)


def _totals(events: Sequence[RawPart]) -> Totals:
    """Return row counts and hash sums of all events, by date."""
    totals: Totals = {}
    for part in events:
        for day, (rows, total) in part.days.items():
            before = totals.get(day, (0, 0))
            totals[day] = (before[0] + rows, (before[1] + total) % 2**64)
    return totals


def _content(
    connection: duckdb.DuckDBPyConnection,
    store: Store,
    config: LogConfig,
    entity: Entity,
    catalogue: Sequence[RawPart],
    events: Sequence[RawPart],
    end: date,
) -> Content:
    files: ContentFiles | None = config.items if entity == "item" else config.users
    settings = digest({"files": None if files is None else plain(files), "events": plain(config.events)})
    numbering = Numbering(store, entity, settings, entity_columns(entity, files))
    numbering.update(connection, catalogue, events, end)
    parts = numbering.parts(end)
    if files is None:
        return Content(numbering, parts, None)
    values = vocabularies(
        numbering, parts[0], files, _vocabulary_rule(config), _rows_before(store, events, end), connection
    )
    return Content(numbering, parts, files, values, embedding_dims(numbering, parts, files, connection))


def _vocabulary_rule(config: LogConfig) -> VocabularyRule:
    return VocabularyRule(config.vocabulary, config.privacy.min_users)


def _rows_before(store: Store, events: Sequence[RawPart], end: date) -> str:
    """Return the events before a date, as SQL."""
    files = file_list(files_of(store, events))
    return f"(SELECT * FROM read_parquet({files}, union_by_name = true) WHERE event_time < TIMESTAMP '{end}')"


def _event_lists(
    connection: duckdb.DuckDBPyConnection, store: Store, config: LogConfig, events: Sequence[RawPart], end: date
) -> tuple[dict[str, Path], dict[str, int], dict[str, list[float]]]:
    """Return vocabularies, their sizes, and quantile edges; made from the events the first time, then kept."""
    source, kept = _rows_before(store, events, end), _vocabulary_rule(config)
    settings = {"events": plain(config.events)}
    values, sizes, edges = {}, {}, {}
    for name in config.events.categoricals:
        seen = f"SELECT {quoted(f'value:{name}')} AS value, user_key AS user FROM {source}"
        query = kept.query(source, f"value:{name}", seen)
        values[name] = create_once(store, connection, f"event.{name}", {**settings, **kept.settings}, query)
        sizes[name] = len(read_values(connection, values[name])) + 1
    for name, buckets in config.events.quantiles.items():
        shares = [number / buckets for number in range(1, buckets)]
        column = quoted(f"number:{name}")
        query = f"SELECT DISTINCT unnest(quantile_disc({column}, {shares})) AS edge FROM {source} ORDER BY edge"
        file = create_once(store, connection, f"quantiles.{name}", {**settings, "most": kept.most}, query)
        rows = connection.execute(f"SELECT edge FROM read_parquet({literal(str(file))}) ORDER BY edge").fetchall()
        edges[name] = [float(edge) for (edge,) in rows if edge is not None]
    return values, sizes, edges


def _with_texts(run: StageRun[Prepare], config: LogConfig, items: Content) -> Content:
    """Embed each part's texts that are not cached, on all ranks."""
    try:
        model = Path(str(package_files(config.text.package))) / "model"
    except ModuleNotFoundError as error:
        raise ConfigError(f"prepare.source.text.package: {config.text.package!r} is not installed") from error
    cached = []
    for part in items.parts:
        texts = distinct_texts(items.numbering.store, part) or [""]
        cached.append(embed_texts(texts, model, config.text, run.config.cache_dir, run.world, run.log))
    return replace(items, texts=cached, dims={TEXT_EMBEDDING: embedding_dim(cached[0]), **items.dims})
