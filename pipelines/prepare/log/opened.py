"""An opened raw log as a `pipelines.prepare.contract.Source`: keys of a date's rows, and the rows."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa

from sidestack.infra.code import code_digest
from sidestack.infra.config import digest, parse, plain
from sidestack.infra.errors import DataError
from sidestack.infra.partitions import date_slice
from sidestack.infra.store import Store
from sidestack.infra.tables import DatasetSpec, Entity, TaskSpec, flat_schema
from sidestack.pipelines.prepare.contract import Part, label_keys
from sidestack.pipelines.prepare.log.config import LogConfig
from sidestack.pipelines.prepare.log.content import Content
from sidestack.pipelines.prepare.log.engine import Engine, open_engine
from sidestack.pipelines.prepare.log.features import DatedRows
from sidestack.pipelines.prepare.log.ingest import RawPart, write_batches
from sidestack.pipelines.prepare.log.inputs import LogInputs, State, count_columns, counted
from sidestack.pipelines.prepare.log.numbering import files_of
from sidestack.pipelines.prepare.log.retention import Totals

CODE = tuple(
    f"pipelines/prepare/log/{name}.py" for name in ("engine", "features", "in_spark", "inputs", "on_duckdb", "on_spark")
)
"""Code that decides a state."""
FAR_DATES = 31


@dataclass(frozen=True)
class LogContent:
    """Content of the log, as found by rank 0.

    Attributes:
        events: ingested files. labels: ingested files by table. items, users: their content.
        vocabularies, sizes, edges: of the events' categoricals and quantiles.
        end: the date of the log's end, exclusive.
        totals: of events, by date. since: rows before this date are not kept; `date.min`: all rows are.
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


class LogSource:
    """A raw log as a `pipelines.prepare.contract.Source`.

    Args of the constructor:
        config: the log's. store: of partitions. opened: the log's content. as_of: the snapshot's end.
        log: prints what people should know about the rows.
    """

    def __init__(
        self, config: LogConfig, store: Store, opened: LogContent, as_of: datetime | None, log: Callable[[str], None]
    ) -> None:
        self._config = config
        self._store = store
        self._opened = opened
        self._log = log
        self._end = as_of or datetime.combine(opened.end, time())
        self.spec = self._describe()

    def parts(self, entity: Entity) -> list[Part]:
        """Return the parts of the items or users."""
        content = self._opened.items if entity == "item" else self._opened.users
        return content.dataset_parts(self.spec)

    def days(self) -> list[date]:
        """Return the kept dates with events, before the end."""
        return [day for day in self._chain if day >= self._opened.since]

    def day_keys(self, day: date) -> dict[str, str]:
        """Return digests for a date's requests, events and labels.

        A row depends on all earlier events, so the key covers the log up to the date. It covers the events themselves,
        not the files they are in.
        """
        keys = label_keys(
            {"log": self._chain[day], "settings": self._row_settings}, self._config.followup_days, day, self._end
        )
        tasks = {name: plain(task) for name, task in self._config.tasks.items()}
        return {**keys, "labels": digest({"labels": keys["labels"], "late": self._late_labels(day), "tasks": tasks})}

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, Iterator[pa.Table]]]:
        """Yield some of the dates, each with its joined impressions in chunks."""
        for dates in _runs(days, self.days()):
            with open_engine(self._config.engine, self._store.path.parent) as engine:
                state = self._state(dates[0])
                made = DatedRows(engine, self._config, self._inputs, state, self._log)
                for day, tables in itertools.groupby(made.rows(dates), key=lambda found: found[0]):
                    yield day, (self._conform(table) for _, table in tables)
                if dates[-1] == self.days()[-1]:
                    self._store_state(engine, made, dates[-1])

    def _conform(self, rows: pa.Table) -> pa.Table:
        schema = flat_schema(self.spec)
        return rows.select(schema.names).cast(schema)

    @cached_property
    def _chain(self) -> dict[date, str]:
        """By date: a digest of all events up to its end."""
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

    def _late_labels(self, day: date) -> list[Any]:
        """Return the identity of the label tables' rows that may count for a date."""
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

    def _state_cutoff(self, day: date) -> date:
        """Return the latest date whose state suffices for the rows of a date."""
        look_back = max(float(self._config.count_days), self._config.delay_minutes / 1440)
        return day - timedelta(days=ceil(look_back))

    def _state(self, first: date) -> State | None:
        """Return the newest stored state that suffices for the rows of dates from the first on.

        If retention removed rows and no such state is stored, return the oldest stored state, if any: recent counts
        then lack the removed rows. Without any state, histories and all counts lack them.
        """
        days, latest = self.days(), self._state_cutoff(first)
        for day in reversed(days):
            if day <= latest and (found := self._find_state(day)) is not None:
                return found
        if self._opened.since == date.min or days[0] == next(iter(self._chain)):
            return None
        found = next((one for day in days if day <= first and (one := self._find_state(day)) is not None), None)
        what = "histories and counts" if found is None else f"counts of the last {self._config.count_days} days"
        begins = self._opened.since if found is None else found.day
        self._log(f"prepare: dates from {first} on: {what} begin on {begins}, as earlier rows are no longer kept")
        return found

    def _find_state(self, day: date) -> State | None:
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
        """By date: a digest of all events before it."""
        return dict(zip(self._chain, ["", *self._chain.values()], strict=False))

    @cached_property
    def _code(self) -> str:
        return code_digest(CODE)

    def _store_state(self, engine: Engine, made: DatedRows, last: date) -> None:
        """Store the state that the next date's run needs: it remakes labels that have matured by then."""
        followup = max([0.0, *self._config.followup_days.values()])
        wanted = self._state_cutoff(last + timedelta(days=1) - timedelta(days=ceil(followup)))
        days = [day for day in self.days() if day <= wanted]
        if (
            not days
            or (made.state is not None and days[-1] <= made.state.day)
            or self._find_state(days[-1]) is not None
        ):
            return
        day = days[-1]

        def write(name: str, query: str) -> None:
            with self._store.new_partition(f"raw/state_{name}", date_slice(day), self._state_key(day)) as making:
                write_batches(engine.batches(query), making)

        made.save(day, write)

    def _describe(self) -> DatasetSpec:
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
        origin = f"a log of one's own: {', '.join(self._config.events.path)}"
        return f"{origin}; {drawn} items drawn for each event as impressions with labels 0" if drawn else origin


def split_dates(config: LogConfig, days: Sequence[date], end: datetime) -> tuple[tuple[date, date], tuple[date, date]]:
    """Return first and last training and test date: the test dates end where the labels of all tasks are complete.

    Args:
        config: the log's. days: dates with events, ascending. end: the log's end, exclusive.

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
    """Divide dates into runs whose rows are made together; the log is not read in long gaps between runs."""
    places = {day: place for place, day in enumerate(days)}
    run: list[date] = []
    for day in wanted:
        if run and places[day] - places[run[-1]] > FAR_DATES:
            yield run
            run = []
        run.append(day)
    if run:
        yield run
