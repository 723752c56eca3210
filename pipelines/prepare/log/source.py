"""A raw log as a `pipelines.prepare.dataset.Source`: ingest what is new, number it, make the rows of dates."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from functools import cached_property
from importlib.resources import files as package_files
from math import ceil
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from infra.code import code_digest
from infra.config import digest, parse, plain
from infra.distributed import broadcast, together
from infra.errors import ConfigError, DataError
from infra.partitions import date_slice
from infra.sql import file_list, literal, quoted
from infra.stage import StageRun
from infra.store import Store
from infra.tables import DatasetSpec, Entity, TaskSpec, flat_schema
from pipelines.prepare.config import LEDGER, PrepareConfig
from pipelines.prepare.dataset import STORE, Part, as_time, label_keys
from pipelines.prepare.log.config import ContentFiles, Log
from pipelines.prepare.log.content import (
    TEXT_EMBEDDING,
    Content,
    Kept,
    distinct_texts,
    embedding_dims,
    entity_columns,
    read_values,
    vocabularies,
)
from pipelines.prepare.log.engine import Engine, open_engine, require_engine
from pipelines.prepare.log.features import DatedRows
from pipelines.prepare.log.files import EVENTS, ITEMS, USERS, raw_files
from pipelines.prepare.log.ingest import RawPart, ingest, repairs, table_settings, write_batches
from pipelines.prepare.log.inputs import LogInputs, State, count_columns, counted
from pipelines.prepare.log.masking import masking_of, require_one_key
from pipelines.prepare.log.numbering import Numbering, files_of, made_once
from pipelines.prepare.log.on_duckdb import database
from pipelines.prepare.log.retention import RETAINED_SINCE, Retention, Totals, carried_totals
from pipelines.prepare.remote import require_filesystem
from pipelines.prepare.text import embed_texts, embedding_dim

CODE = tuple(
    f"pipelines/prepare/log/{name}.py" for name in ("engine", "features", "in_spark", "inputs", "on_duckdb", "on_spark")
)
"""What decides a state."""
FAR_DATES = 31


def open_log(run: StageRun[PrepareConfig], config: Log) -> "LogSource":
    """Read what is new of the raw files, number it, and open the log. Every rank calls; rank 0 reads.

    Raises:
        DataError: all faults of all files; see `pipelines.prepare.log.ingest`. ConfigError: the tasks are given each
            other in a circle, or the engine or the text encoder is not installed.
    """
    require_engine(config.engine)
    world = run.world.committing
    store = Store(run.out.parent / STORE)
    with together(world, "reading the raw log"):
        opened = _opened(run, config, store) if world.is_main else None
    found = broadcast(world, opened)
    assert found is not None
    if config.items is not None and config.items.text:
        found = replace(found, items=_with_texts(run, config, found.items))
    if found.since > date.min:
        run.facts[RETAINED_SINCE] = found.since.isoformat()
    return LogSource(config, store, found, as_time(run.config.as_of), run.log.say)


@dataclass(frozen=True)
class Opened:
    """What rank 0 found.

    Attributes:
        events: ingested files. labels: by table, likewise. items, users: their content.
        vocabularies, sizes, edges: of the events' categoricals and quantiles.
        end: the date at which the log ends, exclusive.
        totals: of events, by date. since: rows before this date are not kept; `date.min`: all are.
    """

    events: Sequence[RawPart]
    labels: Mapping[str, Sequence[RawPart]]
    items: Content
    users: Content
    vocabularies: Mapping[str, Path]
    sizes: Mapping[str, int]
    edges: Mapping[str, Sequence[float]]
    end: date
    totals: Totals
    since: date


def _opened(run: StageRun[PrepareConfig], config: Log, store: Store) -> Opened:
    require_filesystem(config, store.path)
    files = raw_files(config, run.config.cache_dir / LEDGER)
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
        for told in repairs(parts):
            run.log.say(f"prepare: {told}")
    return Opened(events, labels, items, users, *lists, end, totals, since)


def _totals(events: Sequence[RawPart]) -> Totals:
    """Return rows and hashes of all events, by date."""
    totals: Totals = {}
    for part in events:
        for day, (rows, total) in part.days.items():
            before = totals.get(day, (0, 0))
            totals[day] = (before[0] + rows, (before[1] + total) % 2**64)
    return totals


def _content(
    connection: duckdb.DuckDBPyConnection,
    store: Store,
    config: Log,
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
        numbering, parts[0], files, _kept_values(config), _rows_before(store, events, end), connection
    )
    return Content(numbering, parts, files, values, embedding_dims(numbering, parts, files, connection))


def _kept_values(config: Log) -> Kept:
    return Kept(config.vocabulary, config.privacy.min_users)


def _rows_before(store: Store, events: Sequence[RawPart], end: date) -> str:
    """Return the events before a date, as SQL."""
    files = file_list(files_of(store, events))
    return f"(SELECT * FROM read_parquet({files}, union_by_name = true) WHERE event_time < TIMESTAMP '{end}')"


def _event_lists(
    connection: duckdb.DuckDBPyConnection, store: Store, config: Log, events: Sequence[RawPart], end: date
) -> tuple[dict[str, Path], dict[str, int], dict[str, list[float]]]:
    """Return vocabularies, their sizes, and the borders of quantiles: of the events, the first time, and kept."""
    source, kept = _rows_before(store, events, end), _kept_values(config)
    settings = {"events": plain(config.events)}
    values, sizes, edges = {}, {}, {}
    for name in config.events.categoricals:
        seen = f"SELECT {quoted(f'value:{name}')} AS value, user_key AS user FROM {source}"
        query = kept.query(source, f"value:{name}", seen)
        values[name] = made_once(store, connection, f"event.{name}", {**settings, **kept.settings}, query)
        sizes[name] = len(read_values(connection, values[name])) + 1
    for name, buckets in config.events.quantiles.items():
        shares = [place / buckets for place in range(1, buckets)]
        column = quoted(f"number:{name}")
        query = f"SELECT DISTINCT unnest(quantile_disc({column}, {shares})) AS edge FROM {source} ORDER BY edge"
        file = made_once(store, connection, f"quantiles.{name}", {**settings, "most": kept.most}, query)
        rows = connection.execute(f"SELECT edge FROM read_parquet({literal(str(file))}) ORDER BY edge").fetchall()
        edges[name] = [float(edge) for (edge,) in rows if edge is not None]
    return values, sizes, edges


def _with_texts(run: StageRun[PrepareConfig], config: Log, items: Content) -> Content:
    """Embed each part's texts, by all ranks, unless they are kept already."""
    try:
        model = Path(str(package_files(config.text.package))) / "model"
    except ModuleNotFoundError as error:
        raise ConfigError(f"prepare.source.text.package: {config.text.package!r} is not installed") from error
    cached = []
    for part in items.parts:
        texts = distinct_texts(items.numbering.store, part) or [""]
        cached.append(embed_texts(texts, model, config.text, run.config.cache_dir, run.world, run.log))
    return replace(items, texts=cached, dims={TEXT_EMBEDDING: embedding_dim(cached[0]), **items.dims})


class LogSource:
    """A raw log as a `pipelines.prepare.dataset.Source`.

    Args of the constructor:
        config: the log's. store: where partitions lie. opened: what it holds. as_of: when the snapshot ends.
        say: told what people should know of the rows.
    """

    def __init__(
        self, config: Log, store: Store, opened: Opened, as_of: datetime | None, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._store = store
        self._opened = opened
        self._say = say
        self._end = as_of or datetime.combine(opened.end, time())
        self.spec = self._described()

    def parts(self, entity: Entity) -> list[Part]:
        """Return the parts of the items or users."""
        content = self._opened.items if entity == "item" else self._opened.users
        return content.dataset_parts(self.spec)

    def days(self) -> list[date]:
        """Return the dates that have events and are kept, before the end."""
        return [day for day in self._chain if day >= self._opened.since]

    def day_keys(self, day: date) -> dict[str, str]:
        """Return what decides a date's requests, events and labels.

        A row depends on all earlier events, so the key is of the log up to the date. It is of the events themselves,
        not of the files that hold them.
        """
        keys = label_keys(
            {"log": self._chain[day], "settings": self._row_settings}, self._config.followup_days, day, self._end
        )
        tasks = {name: plain(task) for name, task in self._config.tasks.items()}
        return {**keys, "labels": digest({"labels": keys["labels"], "late": self._late(day), "tasks": tasks})}

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, Iterator[pa.Table]]]:
        """Yield some of the dates, each with its joined impressions in chunks."""
        for dates in _runs(days, self.days()):
            with open_engine(self._config.engine, self._store.path.parent) as engine:
                state = self._state(dates[0])
                made = DatedRows(engine, self._config, self._inputs, state, self._say)
                for day, tables in itertools.groupby(made.rows(dates), key=lambda found: found[0]):
                    yield day, (self._conformed(table) for _, table in tables)
                if dates[-1] == self.days()[-1]:
                    self._keep_state(engine, made, dates[-1])

    def _conformed(self, rows: pa.Table) -> pa.Table:
        schema = flat_schema(self.spec)
        return rows.select(schema.names).cast(schema)

    @cached_property
    def _chain(self) -> dict[date, str]:
        """By date, a digest of all events up to its end."""
        chain, before = {}, ""
        for day, (rows, total) in sorted(self._opened.totals.items()):
            if datetime.combine(day, time()) < self._end:
                before = chain[day] = digest({"before": before, "day": str(day), "rows": rows, "hash": total})
        return chain

    @cached_property
    def _row_settings(self) -> dict[str, Any]:
        config = self._config
        names = ("events", "history", "max_history", "count_days", "delay_minutes", "negatives", "vocabulary")
        return {
            **{name: value for name, value in plain(config).items() if name in names},
            "tasks": {name: plain(task) for name, task in config.tasks.items() if task.table is None},
            "category": self._inputs.category,
            "min_users": config.privacy.min_users,
            "numbers": [self._opened.items.numbering.settings, self._opened.users.numbering.settings],
        }

    def _late(self, day: date) -> list[Any]:
        """Return what tells the rows of the label tables that may count for a date."""
        found: list[Any] = []
        for task in self._config.tasks.values():
            if task.table is None or task.within_days is None:
                continue
            if self._end - timedelta(days=task.within_days) <= datetime.combine(day, time()):
                continue  # none of the date's labels is known yet
            last = min(day + timedelta(days=ceil(task.within_days)), self._end.date() - timedelta(days=1))
            for part in self._opened.labels[task.table]:
                found += [[str(one), *of] for one, of in sorted(part.days.items()) if day <= one <= last]
        return sorted(found)

    @cached_property
    def _inputs(self) -> LogInputs:
        opened, items = self._opened, self._config.items
        categoricals = list(items.categoricals) if items is not None else []
        return LogInputs(
            events=files_of(self._store, opened.events),
            labels={name: files_of(self._store, parts) for name, parts in opened.labels.items()},
            items=[self._store.file(part) for part in opened.items.parts],
            users=[self._store.file(part) for part in opened.users.parts],
            category=f"value:{categoricals[0]}" if categoricals else None,
            vocabularies=opened.vocabularies,
            edges=opened.edges,
            end=self._end,
            newest=self.days()[-1],
            since=opened.since,
        )

    def _since(self, day: date) -> date:
        """Return the latest date whose state will do for the rows of a date."""
        look_back = max(float(self._config.count_days), self._config.delay_minutes / 1440)
        return day - timedelta(days=ceil(look_back))

    def _state(self, first: date) -> State | None:
        """Return the newest state that will do for the rows of dates from the first on.

        Where rows were left out by retention and no such state is kept, return the oldest one that is, if any: counts
        of the last days then lack what was left out. Without one, nothing is known of what was left out.
        """
        days, latest = self.days(), self._since(first)
        for day in reversed(days):
            if day <= latest and (found := self._kept(day)) is not None:
                return found
        if self._opened.since == date.min or days[0] == next(iter(self._chain)):
            return None
        found = next((one for day in days if day <= first and (one := self._kept(day)) is not None), None)
        what = "histories and counts" if found is None else f"counts of the last {self._config.count_days} days"
        begins = self._opened.since if found is None else found.day
        self._say(f"prepare: dates from {first} on: {what} begin on {begins}, as earlier rows are no longer kept")
        return found

    def _kept(self, day: date) -> State | None:
        key, files = self._state_key(day), {}
        for name in (*counted(self._inputs), "history"):
            part = self._store.find(f"raw/state_{name}", date_slice(day), key)
            if part is None:
                return None
            files[name] = self._store.file(part)
        return State(day, {name: file for name, file in files.items() if name != "history"}, files["history"])

    def _state_key(self, day: date) -> str:
        return digest({"log": self._before[day], "settings": self._row_settings, "code": self._code})

    @cached_property
    def _before(self) -> dict[date, str]:
        """By date, a digest of all events before it."""
        return dict(zip(self._chain, ["", *self._chain.values()], strict=False))

    @cached_property
    def _code(self) -> str:
        return code_digest(CODE)

    def _keep_state(self, engine: Engine, made: DatedRows, last: date) -> None:
        """Keep the state that the next date's run begins with: labels that mature by then are made again."""
        followup = max([0.0, *self._config.followup_days.values()])
        wanted = self._since(last + timedelta(days=1) - timedelta(days=ceil(followup)))
        days = [day for day in self.days() if day <= wanted]
        if not days or (made.state is not None and days[-1] <= made.state.day) or self._kept(days[-1]) is not None:
            return
        day = days[-1]

        def write(name: str, query: str) -> None:
            with self._store.making(f"raw/state_{name}", date_slice(day), self._state_key(day)) as making:
                write_batches(engine.batches(query), making)

        made.save(day, write)

    def _described(self) -> DatasetSpec:
        config, opened = self._config, self._opened
        train, test = split_dates(config, self.days(), self._end)
        counts = {name: count_columns(name, config.count_days) for name in counted(self._inputs)}
        user = counts.pop("user")
        values = dict(
            embeddings=dict(opened.items.dims),
            categoricals={name: len(values) + 1 for name, values in opened.items.vocabularies.items()},
            user_embeddings=dict(opened.users.dims),
            user_categoricals={name: len(values) + 1 for name, values in opened.users.vocabularies.items()},
            num_items=opened.items.rows,
            num_users=opened.users.rows,
            tasks={name: TaskSpec(given=task.given, weight=task.weight) for name, task in config.tasks.items()},
            dense=(*itertools.chain.from_iterable(counts.values()), *config.events.dense),
            sparse={
                **{name: len(edges) + 1 for name, edges in opened.edges.items()},
                **opened.sizes,
            },
            request_dense=tuple(user),
            request_sparse={"hour": 24, "weekday": 7},
            max_history=config.max_history,
            followup_days=dict(config.followup_days),
            train=train,
            test=test,
            origin=self._origin(),
        )
        return parse(DatasetSpec, values, "prepare.source")

    def _origin(self) -> str:
        drawn = self._config.negatives
        said = f"a log of one's own: {', '.join(self._config.events.path)}"
        return f"{said}; {drawn} items drawn for each event as impressions with labels 0" if drawn else said


def split_dates(config: Log, days: Sequence[date], end: datetime) -> tuple[tuple[date, date], tuple[date, date]]:
    """Return first and last training and test date: the test dates end where the labels of all tasks are complete.

    Args:
        config: the log's. days: dates with events, ascending. end: when the log ends, exclusive.

    Raises:
        DataError: there are too few dates.
    """
    followup = timedelta(days=max([0.0, *config.followup_days.values()]))
    complete = [day for day in days if datetime.combine(day, time()) + timedelta(days=1) + followup <= end]
    num_test = config.test_days or max(1, len(complete) // 5)
    test, before = complete[-num_test:], complete[:-num_test]
    train = before[-config.train_days :] if config.train_days else before
    if not train:
        raise DataError(
            f"events: {len(days)} dates before {end.date()}, {len(complete)} of them with complete labels, leave"
            f" none to train on beside {num_test} test dates"
        )
    return (train[0], train[-1]), (test[0], test[-1])


def _runs(wanted: Sequence[date], days: Sequence[date]) -> Iterator[list[date]]:
    """Cut dates into runs whose rows are made together: where many dates lie between two, the log is not read there."""
    places = {day: place for place, day in enumerate(days)}
    run: list[date] = []
    for day in wanted:
        if run and places[day] - places[run[-1]] > FAR_DATES:
            yield run
            run = []
        run.append(day)
    if run:
        yield run
