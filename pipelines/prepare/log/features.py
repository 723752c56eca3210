"""The rows of dates, by SQL: requests, histories, counts, labels; of what was known strictly before each request.

All of it is joins and window functions that DuckDB runs in bounded memory, spilling to disk. What lies before the
dates that are made comes as a `State`: totals, and the newest entries of histories; so a new date costs that date,
the days that counts look back on, and the state, however long the log is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa

from infra.errors import DataError
from infra.sql import file_list, literal, quoted
from pipelines.prepare.log.config import Log, LogTask
from pipelines.prepare.log.content import UNKNOWN

BATCH_ROWS = 1 << 15
StateWriter = Callable[[str, str], None]
"""Writes one part of a state, by its name and the query of its rows."""
COUNTED: Mapping[str, tuple[str, ...]] = {
    "user": ("user_id",),
    "item": ("item_id",),
    "user_category": ("user_id", "category"),
}
"""What events are counted of, by the names of the features."""


@dataclass(frozen=True)
class State:
    """What is known at the beginning of a date.

    Attributes:
        day: the date. counts: by `COUNTED`, the file of totals. history: the file of histories' newest entries.
    """

    day: date
    counts: Mapping[str, Path]
    history: Path


@dataclass(frozen=True)
class LogInputs:
    """What the rows are made of.

    Attributes:
        events: ingested files. labels: by table, likewise. items, users: the files of numbers, oldest first.
        category: the items' categorical that events are counted by, as ingested; None: there is none.
        vocabularies: event categorical -> the file of its values. edges: column -> the borders of its buckets.
        end: when the log ends, exclusive.
    """

    events: Sequence[Path]
    labels: Mapping[str, Sequence[Path]]
    items: Sequence[Path]
    users: Sequence[Path]
    category: str | None
    vocabularies: Mapping[str, Path]
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    end: datetime = datetime.max


def counted(inputs: LogInputs) -> dict[str, tuple[str, ...]]:
    """Return what events are counted of."""
    return {name: by for name, by in COUNTED.items() if inputs.category is not None or "category" not in by}


def count_columns(name: str, days: int) -> list[str]:
    """Return the names of the count features of one of `COUNTED`: all and recent counts, and the log odds of all.

    Log odds are log((positives + 1) / (others + 1)), 0 without events: a network on logarithms of counts alone learns
    this difference of two of them slowly.
    """
    counts = [f"{name}_{what}{window}" for window in ("", f"_{days}d") for what in ("events", "positives")]
    return [*counts, f"{name}_log_odds"]


class DatedRows:
    """The joined rows of a run of dates.

    Args of the constructor:
        database: a connection of its own. config: the log's. inputs: what rows are made of.
        state: what was known at an earlier date; None: nothing, so all the log is read.
        say: told of what was repaired, and of how many labels were found.
    """

    def __init__(
        self,
        database: duckdb.DuckDBPyConnection,
        config: Log,
        inputs: LogInputs,
        state: State | None,
        say: Callable[[str], None],
    ) -> None:
        self.database = database
        self.config = config
        self.inputs = inputs
        self.state = state
        self.say = say

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, pa.Table]]:
        """Yield the rows of some dates, in order, each date in one or more tables; the log is read up to the last.

        Raises:
            DataError: rows of one request have several users, or too many events are of items outside the catalogue.
        """
        self._load(days[0], days[-1])
        self._check_catalogue()
        self._make_requests(days)
        for name, by in counted(self.inputs).items():
            self._count(name, by)
        self._make_histories()
        self._make_labels()
        for batch in self.database.sql(self._joined()).to_arrow_reader(BATCH_ROWS):
            yield from _by_day(pa.Table.from_batches([batch]))

    def save(self, day: date, write: StateWriter) -> None:
        """Write what is known at the beginning of a date, once `rows` is through."""
        before = f"event_time < TIMESTAMP '{day}'"
        for name, by in counted(self.inputs).items():
            keys = ", ".join(by)
            write(
                name,
                f"SELECT {keys}, sum(events)::BIGINT AS events, sum(positives)::BIGINT AS positives FROM tallies_{name}"
                f" WHERE {before} GROUP BY {keys} ORDER BY {keys}",
            )
        write(
            "history",
            f"SELECT user_id, event_time, item_id FROM entries WHERE {before} QUALIFY row_number() OVER (PARTITION BY"
            f" user_id ORDER BY place DESC) <= {self.config.max_history} ORDER BY user_id, place",
        )

    def _table(self, name: str, query: str) -> None:
        self.database.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {query}")

    def _load(self, first: date, last: date) -> None:
        """Bring `log`: each event once, with ids, from the state on to the last date."""
        inputs, config = self.inputs, self.config
        category = f"arg_min({quoted(inputs.category)}, filename)" if inputs.category else "NULL::VARCHAR"
        items = f"read_parquet({file_list(inputs.items)}, filename = true, union_by_name = true)"
        self._table(
            "items",
            f"SELECT key, id, {category} AS category, bool_or(is_listed) AS is_listed FROM {items} GROUP BY key, id",
        )
        self._table(
            "users", f"SELECT DISTINCT key, id FROM read_parquet({file_list(inputs.users)}, union_by_name = true)"
        )
        since = f"event_time >= TIMESTAMP '{self.state.day}' AND " if self.state is not None else ""
        until = min(inputs.end, datetime.combine(last, datetime.min.time()) + timedelta(days=1))
        raw = (
            "SELECT *, CAST(event_time AS DATE) AS day FROM"
            f" read_parquet({file_list(inputs.events)}, union_by_name = true)"
            f" WHERE {since}event_time < TIMESTAMP '{until}'"
        )
        once = f"SELECT DISTINCT * FROM ({raw})"
        if config.events.event_id is not None:
            once = (
                f"SELECT * FROM ({raw}) QUALIFY event_id IS NULL OR row_number() OVER (PARTITION BY day, event_id"
                " ORDER BY event_time, user_key, item_key) = 1"
            )
        positive = quoted(f"task:{config.history_task}")
        self._table(
            "log",
            f"SELECT raw.* EXCLUDE (user_key, item_key), users.id AS user_id, items.id AS item_id, items.category,"
            f" items.is_listed, {positive} AS is_positive, false AS is_drawn FROM ({once}) AS raw"
            " JOIN users ON users.key = raw.user_key JOIN items ON items.key = raw.item_key",
        )
        again = self._number(f"SELECT (SELECT count(*) FROM ({raw})) - (SELECT count(*) FROM log)")
        if again:
            self.say(f"prepare: {again:,} rows of events came twice and count once")

    def _number(self, query: str) -> int:
        return int(self.database.execute(query).fetchall()[0][0])

    def _check_catalogue(self) -> None:
        if self.config.items is None:
            return
        found = self.database.execute(
            "SELECT count(*), count(*) FILTER (WHERE NOT is_listed),"
            " count(DISTINCT item_id) FILTER (WHERE NOT is_listed) FROM log"
        ).fetchall()[0]
        rows, unlisted, items = found
        if unlisted > self.config.max_unknown_items * rows:
            raise DataError(
                f"events: {unlisted / rows:.1%} of {rows:,} are of items that the catalogue lacks ({items:,} of them);"
                f" at most {self.config.max_unknown_items:.0%} may be (prepare.source.max_unknown_items)"
            )

    def _make_requests(self, days: Sequence[date]) -> None:
        """Bring `impressions`, the rows to be written, and `requests`: both of the dates alone, numbered by date."""
        dates = ", ".join(f"DATE '{day}'" for day in days)
        is_wanted = f"day IN ({dates})"
        drawn = f" UNION ALL BY NAME {self._drawn(is_wanted)}" if self.config.negatives else ""
        by = "request_key" if self.config.events.request is not None else "user_id, event_time"
        self._table(
            "impressions",
            f"SELECT *, dense_rank() OVER (ORDER BY day, {by}) AS request"
            f" FROM (SELECT * FROM log WHERE {is_wanted}{drawn})",
        )
        self._table(
            "requests",
            "SELECT *, row_number() OVER (PARTITION BY day ORDER BY event_time, user_id, request) - 1 AS number FROM ("
            "SELECT request, min(day) AS day, min(event_time) AS event_time, min(user_id) AS user_id,"
            " max(user_id) AS last_user_id FROM impressions GROUP BY request)",
        )
        wrong = self.database.execute(
            "SELECT count(*), min(day) FROM requests WHERE user_id <> last_user_id"
        ).fetchall()[0]
        if wrong[0]:
            raise DataError(
                f"events: column {self.config.events.request!r}: {wrong[0]:,} requests have rows of several users, such"
                f" as on {wrong[1]}; rows of a date with one value must be of one user"
            )

    def _drawn(self, is_wanted: str) -> str:
        """Return the query of drawn negatives: items of other events of the same date, none that the user has there."""
        tasks = ", ".join(
            f"0::TINYINT AS {quoted(f'task:{name}')}" for name, one in self.config.tasks.items() if not one.table
        )
        request = ", e.request_key" if self.config.events.request is not None else ""
        return f"""
            SELECT e.day, e.event_time, e.user_id, p.item_id, p.category, p.is_listed, 0::TINYINT AS is_positive,
                true AS is_drawn, {tasks}{request}
            FROM (
                SELECT *, count(*) OVER (PARTITION BY day) AS num, unnest(range({self.config.negatives})) AS draw
                FROM log WHERE {is_wanted}
            ) AS e
            JOIN (
                SELECT *, row_number() OVER (PARTITION BY day ORDER BY event_time, user_id, item_id) - 1 AS place
                FROM log WHERE {is_wanted}
            ) AS p ON p.day = e.day AND p.place = hash(e.user_id, e.item_id, e.event_time, e.draw) % e.num
            WHERE NOT EXISTS (
                SELECT 1 FROM log AS own WHERE own.day = e.day AND own.user_id = e.user_id AND own.item_id = p.item_id
            )"""

    def _count(self, name: str, by: Sequence[str]) -> None:
        """Bring `tallies_<name>`: events by key and time, and `counts_<name>`: what a request (a row) sees of them."""
        keys = ", ".join(by)
        known = ""
        if self.state is not None:
            known = f" UNION ALL SELECT {keys}, TIMESTAMP '1970-01-01', events, positives FROM {self._state(name)}"
        self._table(
            f"tallies_{name}",
            f"SELECT {keys}, event_time, count(*) AS events, sum(is_positive)::BIGINT AS positives FROM log"
            f" WHERE {' AND '.join(f'{key} IS NOT NULL' for key in by)} GROUP BY {keys}, event_time{known}",
        )
        self._table(
            "running",
            f"SELECT {keys}, event_time, sum(events) OVER seen AS events, sum(positives) OVER seen AS positives FROM"
            f" tallies_{name} WINDOW seen AS (PARTITION BY {keys} ORDER BY event_time)",
        )
        source = (
            "SELECT request, user_id, event_time FROM requests"
            if by == ("user_id",)
            else f"SELECT DISTINCT i.request, {', '.join(f'i.{key}' for key in by)}, r.event_time FROM impressions AS i"
            " JOIN requests AS r USING (request)"
        )
        match = " AND ".join(f"q.{key} = {{}}.{key}" for key in by)
        *all_of, recent_events, recent_positives, log_odds = count_columns(name, self.config.count_days)
        numbers = [
            f"coalesce(known.{what}, 0)::FLOAT AS {column}"
            for what, column in zip(("events", "positives"), all_of, strict=True)
        ] + [
            f"greatest(coalesce(known.{what}, 0) - coalesce(old.{what}, 0), 0)::FLOAT AS {column}"
            for what, column in (("events", recent_events), ("positives", recent_positives))
        ]
        positives = "coalesce(known.positives, 0)"
        others = f"(coalesce(known.events, 0) - {positives})"
        numbers.append(f"ln(({positives} + 1) / ({others} + 1))::FLOAT AS {log_odds}")
        keep = ", ".join(f"q.{key}" for key in ("request", *by))
        self._table(
            f"counts_{name}",
            f"SELECT {keep}, {', '.join(numbers)} FROM ({source}) AS q"
            f" ASOF LEFT JOIN running AS known ON {match.format(*['known'] * len(by))}"
            f" AND q.event_time - {self._delay} > known.event_time"
            f" ASOF LEFT JOIN running AS old ON {match.format(*['old'] * len(by))}"
            f" AND q.event_time - INTERVAL {self.config.count_days} DAY > old.event_time",
        )

    @property
    def _delay(self) -> str:
        return _days(self.config.delay_minutes / 1440)

    def _state(self, name: str) -> str:
        assert self.state is not None
        file = self.state.history if name == "history" else self.state.counts[name]
        return f"read_parquet({literal(str(file))})"

    def _make_histories(self) -> None:
        """Bring `entries`: the positives of each user, numbered by time; and `histories`: of each request the newest.

        A user's entries are cut into blocks as long as a history is at most, so that a history lies in two blocks: no
        list is longer than that, however much a user did.
        """
        most = self.config.max_history
        entries = "SELECT user_id, event_time, item_id FROM log WHERE is_positive = 1"
        if self.state is not None:
            entries += f" UNION ALL SELECT user_id, event_time, item_id FROM {self._state('history')}"
        self._table(
            "entries",
            "SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY event_time, item_id) - 1 AS place"
            f" FROM ({entries})",
        )
        self._table(
            "blocks",
            f"SELECT user_id, place // {most} AS block, list(item_id ORDER BY place) AS items,"
            " list(event_time ORDER BY place) AS times FROM entries GROUP BY user_id, block",
        )
        self._table(
            "places",
            f"SELECT r.request, r.user_id, seen.place + 1 AS num, greatest(seen.place + 1 - {most}, 0) AS first,"
            f" seen.place // {most} AS block FROM requests AS r ASOF JOIN"
            " (SELECT user_id, event_time, max(place) AS place FROM entries GROUP BY user_id, event_time) AS seen"
            f" ON r.user_id = seen.user_id AND r.event_time - {self._delay} > seen.event_time",
        )
        cut = f"[first - greatest(block - 1, 0) * {most} + 1 : num - greatest(block - 1, 0) * {most}]"
        self._table(
            "histories",
            "SELECT request, "
            + ", ".join(
                f"(CASE block WHEN 0 THEN last.{name} ELSE list_concat(before.{name}, last.{name}) END){cut} AS {name}"
                for name in ("items", "times")
            )
            + " FROM places AS p JOIN blocks AS last USING (user_id, block)"
            " LEFT JOIN blocks AS before ON before.user_id = p.user_id AND before.block = p.block - 1",
        )

    def _make_labels(self) -> None:
        """Bring `late_<n>`, of each task that a table tells: the first of its rows at or after each impression."""
        for number, (name, task) in enumerate(self.config.tasks.items()):
            if task.table is None or task.within_days is None:
                continue
            self._table(f"late_{number}", self._late(task, f"task:{name}"))
            is_within = f"happened < event_time + {_days(task.within_days)}"
            found = self._number(f"SELECT count(*) FROM late_{number} WHERE {is_within}")
            self.say(
                f"prepare: {found:,} impressions have a row of {task.table} within {task.within_days:g} days ({name})"
            )

    def _late(self, task: LogTask, flag: str) -> str:
        assert task.table is not None
        files = self.inputs.labels[task.table]
        by_event = self.config.labels[task.table].event_id is not None
        if not files:
            return (
                "SELECT request, user_id, item_id, event_time, NULL::TIMESTAMP AS happened FROM impressions WHERE false"
            )
        happened = (
            f"SELECT * FROM read_parquet({file_list(files)}, union_by_name = true) WHERE {quoted(flag)} = 1"
            f" AND event_time < TIMESTAMP '{self.inputs.end}'"
        )
        if by_event:
            source, match = f"SELECT event_id, event_time FROM ({happened})", "i.event_id = l.event_id"
        else:
            source = (
                f"SELECT users.id AS user_id, items.id AS item_id, event_time FROM ({happened}) AS raw"
                " JOIN users ON users.key = raw.user_key JOIN items ON items.key = raw.item_key"
            )
            match = "i.user_id = l.user_id AND i.item_id = l.item_id"
        return (
            f"SELECT DISTINCT i.request, i.user_id, i.item_id, i.event_time, min(l.event_time) AS happened"
            f" FROM (SELECT DISTINCT request, user_id, item_id, event_time{', event_id' if by_event else ''}"
            f" FROM impressions) AS i ASOF JOIN ({source}) AS l ON {match} AND i.event_time <= l.event_time"
            " GROUP BY i.request, i.user_id, i.item_id, i.event_time"
        )

    def _label(self, name: str) -> str:
        """Return the expression of a task's label over `impressions` and the `late_<n>`."""
        task = self.config.tasks[name]
        own = f"i.{quoted(f'task:{name}')}"
        unknown = "false"
        if task.within_days is not None:
            within = _days(task.within_days)
            number = list(self.config.tasks).index(name)
            own = f"CASE WHEN late_{number}.happened < i.event_time + {within} THEN 1 ELSE 0 END"
            unknown = f"NOT i.is_drawn AND i.event_time + {within} >= TIMESTAMP '{self.inputs.end}'"
        if task.given is not None:
            own = f"CASE ({self._label(task.given)}) WHEN 1 THEN {own} WHEN 0 THEN 0 END"
        return f"CASE WHEN {unknown} THEN NULL ELSE {own} END"

    def _joined(self) -> str:
        config, inputs = self.config, self.inputs
        columns = [
            "r.day",
            "(datediff('day', DATE '0001-01-01', r.day) + 1) * 4294967296 + r.number AS request_id",
            "r.user_id", "r.event_time", "i.item_id",
            "coalesce(h.items, []::BIGINT[]) AS history_item_ids",
            "coalesce(h.times, []::TIMESTAMP[]) AS history_times",
            "[hour(r.event_time)] AS hour", "[dayofweek(r.event_time)] AS weekday",
        ]  # fmt: skip
        joins = ""
        for name, by in counted(inputs).items():
            columns += [
                f"coalesce(c_{name}.{one}, 0)::FLOAT AS {one}" for one in count_columns(name, config.count_days)
            ]
            keys = [key for key in by if by != ("user_id",)]
            match = "".join(f" AND c_{name}.{key} = i.{key}" for key in keys)
            joins += f" LEFT JOIN counts_{name} AS c_{name} ON c_{name}.request = i.request{match}"
        columns += [
            f"coalesce(i.{quoted(f'number:{name}')}, 0)::FLOAT AS {quoted(name)}" for name in config.events.dense
        ]
        for name, edges in inputs.edges.items():
            value = f"i.{quoted(f'number:{name}')}"
            over = f"len(list_filter({list(edges)}::DOUBLE[], lambda edge: edge <= {value}))"
            columns.append(f"CASE WHEN {value} IS NULL THEN []::BIGINT[] ELSE [{over}] END AS {quoted(name)}")
        for number, (name, file) in enumerate(inputs.vocabularies.items()):
            value = f"i.{quoted(f'value:{name}')}"
            columns.append(
                f"CASE WHEN {value} IS NULL THEN []::BIGINT[] ELSE [coalesce(v_{number}.id, {UNKNOWN})] END"
                f" AS {quoted(name)}"
            )
            values = f"SELECT value, row_number() OVER () AS id FROM read_parquet({literal(str(file))})"
            joins += f" LEFT JOIN ({values}) AS v_{number} ON v_{number}.value = {value}"
        for number, task in enumerate(config.tasks.values()):
            if task.table is not None:
                same = " AND ".join(
                    f"late_{number}.{key} = i.{key}" for key in ("request", "user_id", "item_id", "event_time")
                )
                joins += f" LEFT JOIN late_{number} ON {same}"
        columns += [f"({self._label(name)})::TINYINT AS {quoted(name)}" for name in config.tasks]
        return (
            f"SELECT {', '.join(columns)} FROM impressions AS i JOIN requests AS r ON r.request = i.request"
            f" LEFT JOIN histories AS h ON h.request = i.request{joins}"
            " ORDER BY r.day, r.number, i.is_drawn, i.event_time, i.item_id"
        )


def _days(number: float) -> str:
    """Return days as an SQL interval."""
    return f"INTERVAL {round(number * 86_400_000_000)} MICROSECOND"


def _by_day(rows: pa.Table) -> Iterator[tuple[date, pa.Table]]:
    """Cut rows that are sorted by date into those of each."""
    days = rows["day"].to_pylist()
    start = 0
    for place in range(1, len(days) + 1):
        if place == len(days) or days[place] != days[start]:
            yield days[start], rows.slice(start, place - start).drop_columns(["day"])
            start = place
