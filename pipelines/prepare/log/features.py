"""The rows of dates, by SQL: requests, histories, counts and labels; features only use what was known before a request.

All queries are joins and window functions that an engine runs in bounded memory, spilling to disk. Everything before
the dates is in a `State`: totals, and the newest entries of histories. So the cost of a new date is that of the date,
the days of the count window, and the state, independent of the log's length.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime, time, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.errors import DataError
from sidestack.infra.sql import interval, matching, quoted
from sidestack.pipelines.prepare.log.config import LogConfig
from sidestack.pipelines.prepare.log.content import UNKNOWN
from sidestack.pipelines.prepare.log.engine import Engine
from sidestack.pipelines.prepare.log.files import EVENTS
from sidestack.pipelines.prepare.log.ingest import raw_tables
from sidestack.pipelines.prepare.log.inputs import LogInputs, State, count_columns, counted
from sidestack.pipelines.prepare.log.labels import LateLabels

StateWriter = Callable[[str, str], None]
"""Function that writes one part of a state, given its name and the query of its rows."""
KEYED = ("user_key", "item_key", "event_time")
"""The columns of every event."""
SOME_SUNDAY = date(1970, 1, 4)


class DatedRows:
    """Builder of the joined rows of a run of dates.

    Args of the constructor:
        engine: without tables yet. config: the log's. inputs: the files that rows are made from.
        state: what was known at an earlier date; None: the whole log is read.
        log: prints what was repaired, and how many labels were found.
    """

    def __init__(
        self, engine: Engine, config: LogConfig, inputs: LogInputs, state: State | None, log: Callable[[str], None]
    ) -> None:
        self.engine = engine
        self.config = config
        self.inputs = inputs
        self.state = state
        self.log = log
        self._columns = [quoted(name) for name in raw_tables(config)[EVENTS].columns if name not in KEYED]
        """Columns of the events other than ids and time."""

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, pa.Table]]:
        """Yield the rows of some dates, in order, each date in one or more tables; read the log up to the last date.

        Raises:
            DataError: rows of one request have several users, or too many events have items that are not in the
                catalogue.
        """
        self._load(days[-1])
        self._check_catalogue()
        self._make_requests(days)
        for name, by in counted(self.inputs).items():
            self._count(name, by)
        self._make_histories()
        labels = LateLabels(self.engine, self.config, self.inputs, self.log)
        labels.make(self.state, days[0], self._until(days[-1]))
        for batch in self.engine.batches(self._joined(labels)):
            yield from _by_day(pa.Table.from_batches([batch]))

    def save(self, day: date, write: StateWriter) -> None:
        """Write the state at the beginning of a date; call it after `rows` is exhausted."""
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
            f"SELECT user_id, event_time, item_id FROM (SELECT *, row_number() OVER (PARTITION BY user_id"
            f" ORDER BY place DESC) AS age FROM entries WHERE {before}) WHERE age <= {self.config.max_history}"
            " ORDER BY user_id, place",
        )

    def _until(self, last: date) -> datetime:
        """Return the end of the part of the log that is read for dates up to `last`."""
        return self.inputs.end if last >= self.inputs.newest else datetime.combine(last, time()) + timedelta(days=1)

    def _load(self, last: date) -> None:
        """Create `log`: each event once, with ids, from the state to the last date."""
        inputs = self.inputs
        self.engine.files("item_files", inputs.items)
        self.engine.files("user_files", inputs.users)
        self.engine.files("event_files", inputs.events)
        # The first part decides, even if its value is null: boxed, as arg_min skips nulls.
        category = (
            f"arg_min({{'value': {quoted(inputs.category)}}}, filename).value" if inputs.category else "NULL::VARCHAR"
        )
        self.engine.table(
            "items",
            f"SELECT key, id, {category} AS category, bool_or(is_listed) AS is_listed FROM item_files GROUP BY key, id",
        )
        self.engine.table("users", "SELECT DISTINCT key, id FROM user_files")
        begins = self.state.day if self.state is not None else inputs.since
        since = f"event_time >= TIMESTAMP '{begins}' AND " if begins > date.min else ""
        columns = ", ".join((*KEYED, *self._columns))
        raw = (
            f"SELECT CAST(event_time AS DATE) AS day, {columns} FROM event_files"
            f" WHERE {since}event_time < TIMESTAMP '{self._until(last)}'"
        )
        once = f"SELECT DISTINCT * FROM ({raw})"
        if self.config.events.event_id is not None:
            order = ", ".join(("event_time", "user_key", "item_key", *self._columns))
            once = (
                f"SELECT day, {columns} FROM ({raw}) QUALIFY event_id IS NULL"
                f" OR row_number() OVER (PARTITION BY day, event_id ORDER BY {order}) = 1"
            )
        positive = quoted(f"task:{self.config.history_task}")
        own = ", ".join(f"raw.{name}" for name in self._columns)
        self.engine.table(
            "log",
            "SELECT raw.day, raw.event_time, users.id AS user_id, items.id AS item_id, items.category,"
            f" items.is_listed, raw.{positive} AS is_positive, false AS is_drawn, {own} FROM ({once}) AS raw"
            " JOIN users ON users.key = raw.user_key JOIN items ON items.key = raw.item_key",
        )
        (again,) = self.engine.row(f"SELECT (SELECT count(*) FROM ({raw})) - (SELECT count(*) FROM log)")
        if again:
            self.log(f"prepare: {again:,} rows of events came twice and count once")

    def _check_catalogue(self) -> None:
        if self.config.items is None:
            return
        rows, unlisted, items = self.engine.row(
            "SELECT count(*), count(*) FILTER (WHERE NOT is_listed),"
            " count(DISTINCT item_id) FILTER (WHERE NOT is_listed) FROM log"
        )
        if unlisted > self.config.max_unknown_items * rows:
            raise DataError(
                f"events: {unlisted / rows:.1%} of {rows:,} are of items that the catalogue lacks ({items:,} of them);"
                f" at most {self.config.max_unknown_items:.0%} may be (prepare.source.max_unknown_items)"
            )

    def _make_requests(self, days: Sequence[date]) -> None:
        """Create `requests`, numbered by date, and `impressions`, the rows to be written, for the dates only."""
        dates = ", ".join(f"DATE '{day}'" for day in days)
        is_wanted = f"day IN ({dates})"
        by = "user_id, event_time" if self.config.events.request is None else "request_key"
        key = "NULL" if self.config.events.request is None else "request_key"
        self.engine.table(
            "requests",
            "SELECT *, (datediff('day', DATE '0001-01-01', day) + 1) * 4294967296"
            " + row_number() OVER (PARTITION BY day ORDER BY event_time, user_id, request_key) - 1 AS request_id FROM ("
            f"SELECT day, {key}::VARCHAR AS request_key, min(event_time) AS event_time, min(user_id) AS user_id,"
            f" max(user_id) AS last_user_id FROM log WHERE {is_wanted} GROUP BY day, {by})",
        )
        wrong, day = self.engine.row("SELECT count(*), min(day) FROM requests WHERE user_id <> last_user_id")
        if wrong:
            raise DataError(
                f"events: column {self.config.events.request!r}: {wrong:,} requests have rows of several users, such"
                f" as on {day}; rows of a date with one value must be of one user"
            )
        drawn = f" UNION ALL {self._drawn(is_wanted)}" if self.config.negatives else ""
        same = " AND ".join(f"r.{one} IS NOT DISTINCT FROM shown.{one}" for one in ("day", *by.split(", ")))
        self.engine.table(
            "impressions",
            f"SELECT shown.*, r.request_id FROM (SELECT * FROM log WHERE {is_wanted}{drawn}) AS shown"
            f" JOIN requests AS r ON {same}",
        )

    def _drawn(self, is_wanted: str) -> str:
        """Return the query of drawn negatives: items of the date's events, except those of the user's own events."""
        draws = ", ".join(f"({draw})" for draw in range(self.config.negatives))
        own = ", ".join(
            "e.request_key" if name == quoted("request_key") else "0::TINYINT" if name.startswith('"task:') else "NULL"
            for name in self._columns
        )
        return f"""
            SELECT e.day, e.event_time, e.user_id, p.item_id, p.category, p.is_listed, 0::TINYINT, true, {own}
            FROM (SELECT *, count(*) OVER (PARTITION BY day) AS num FROM log WHERE {is_wanted}) AS e
            CROSS JOIN (VALUES {draws}) AS draws(draw)
            JOIN (
                SELECT *, row_number() OVER (PARTITION BY day ORDER BY event_time, user_id, item_id) - 1 AS place
                FROM log WHERE {is_wanted}
            ) AS p ON p.day = e.day
                AND p.place = hashed(concat_ws(' ', e.user_id, e.item_id, e.event_time, draws.draw)) % e.num
            WHERE NOT EXISTS (
                SELECT 1 FROM log AS own WHERE own.day = e.day AND own.user_id = e.user_id AND own.item_id = p.item_id
            )"""

    def _count(self, name: str, by: Sequence[str]) -> None:
        """Create `tallies_<name>`: events by key and time, and `counts_<name>`: counts known to a request (row)."""
        keys = ", ".join(by)
        known = ""
        if self.state is not None:
            self.engine.files(f"state_{name}", [self.state.counts[name]])
            known = f" UNION ALL SELECT {keys}, TIMESTAMP '1970-01-01', events, positives FROM state_{name}"
        self.engine.table(
            f"tallies_{name}",
            f"SELECT {keys}, event_time, count(*) AS events, sum(is_positive)::BIGINT AS positives FROM log"
            f" WHERE {' AND '.join(f'{key} IS NOT NULL' for key in by)} GROUP BY {keys}, event_time{known}",
        )
        self.engine.table(
            "running",
            f"SELECT {keys}, event_time, sum(events) OVER seen AS events, sum(positives) OVER seen AS positives FROM"
            f" tallies_{name} WINDOW seen AS (PARTITION BY {keys} ORDER BY event_time)",
        )
        seen = (
            "SELECT request_id, user_id, event_time FROM requests"
            if by == ("user_id",)
            else f"SELECT DISTINCT i.request_id, {', '.join(f'i.{key}' for key in by)}, r.event_time"
            " FROM impressions AS i JOIN requests AS r ON r.request_id = i.request_id"
        )
        starts = {"known": self._known, "old": f"asked.event_time - INTERVAL {self.config.count_days} DAY"}
        for window, at in starts.items():
            values = {f"{window}_{what}": what for what in ("events", "positives")}
            seen = self.engine.asof(seen, "SELECT * FROM running", by, at, values)
        columns = count_columns(name, self.config.count_days)
        of_all, recent, (log_odds,) = columns[:2], columns[2:4], columns[4:]
        numbers = [
            f"coalesce(known_{what}, 0)::FLOAT AS {total},"
            f" greatest(coalesce(known_{what}, 0) - coalesce(old_{what}, 0), 0)::FLOAT AS {of_days}"
            for what, total, of_days in zip(("events", "positives"), of_all, recent, strict=True)
        ]
        positives = "coalesce(known_positives, 0)"
        others = f"(coalesce(known_events, 0) - {positives})"
        numbers.append(f"ln(({positives} + 1) / ({others} + 1))::FLOAT AS {log_odds}")
        self.engine.table(f"counts_{name}", f"SELECT request_id, {keys}, {', '.join(numbers)} FROM ({seen})")

    @property
    def _known(self) -> str:
        """Return the time up to which events are known to a request, exclusive."""
        return f"asked.event_time - {interval(self.config.delay_minutes / 1440)}"

    def _make_histories(self) -> None:
        """Create `entries`: each user's positives, numbered by time; and `histories`: the newest ones for each request.

        A user's entries are cut into blocks of the maximum length of a history, so a history spans at most two blocks.
        This bounds the length of lists for any number of entries.
        """
        most = self.config.max_history
        entries = "SELECT user_id, event_time, item_id FROM log WHERE is_positive = 1"
        if self.state is not None:
            self.engine.files("state_history", [self.state.history])
            entries += " UNION ALL SELECT user_id, event_time, item_id FROM state_history"
        self.engine.table(
            "entries",
            "SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY event_time, item_id) - 1 AS place"
            f" FROM ({entries})",
        )
        entry = "{'place': place, 'item_id': item_id, 'event_time': event_time}"
        self.engine.table(
            "blocks",
            f"SELECT user_id, place // {most} AS block, list_sort(list({entry})) AS entries FROM entries"
            f" GROUP BY user_id, place // {most}",
        )
        seen = self.engine.asof(
            "SELECT request_id, user_id, event_time FROM requests",
            "SELECT user_id, event_time, max(place) AS place FROM entries GROUP BY user_id, event_time",
            ("user_id",), self._known, {"place": "place"},
        )  # fmt: skip
        self.engine.table(
            "histories",
            "SELECT request_id, list_transform(seen, lambda one: one.item_id) AS items,"
            " list_transform(seen, lambda one: one.event_time) AS times FROM (SELECT p.request_id, list_filter("
            "CASE WHEN before.entries IS NULL THEN last.entries ELSE list_concat(before.entries, last.entries) END,"
            f" lambda one: one.place > p.place - {most} AND one.place <= p.place) AS seen FROM ({seen}) AS p"
            f" JOIN blocks AS last ON last.user_id = p.user_id AND last.block = p.place // {most}"
            f" LEFT JOIN blocks AS before ON before.user_id = p.user_id AND before.block = p.place // {most} - 1)",
        )

    def _joined(self, labels: LateLabels) -> str:
        config, inputs = self.config, self.inputs
        columns = [
            "r.day", "r.request_id", "r.user_id", "r.event_time", "i.item_id",
            "coalesce(h.items, []::BIGINT[]) AS history_item_ids",
            "coalesce(h.times, []::TIMESTAMP[]) AS history_times",
            "[hour(r.event_time)] AS hour", f"[datediff('day', DATE '{SOME_SUNDAY}', r.day) % 7] AS weekday",
        ]  # fmt: skip
        joins = ""
        for name, by in counted(inputs).items():
            columns += [
                f"coalesce(c_{name}.{one}, 0)::FLOAT AS {one}" for one in count_columns(name, config.count_days)
            ]
            keys = ["request_id", *(key for key in by if by != ("user_id",))]
            joins += f" LEFT JOIN counts_{name} AS c_{name} ON {matching(f'c_{name}', 'i', keys)}"
        columns += [
            f"coalesce(i.{quoted(f'number:{name}')}, 0)::FLOAT AS {quoted(name)}" for name in config.events.dense
        ]
        for name, edges in inputs.edges.items():
            value = f"i.{quoted(f'number:{name}')}"
            borders = ", ".join(f"'{edge!r}'::DOUBLE" for edge in edges)
            over = f"array_length(list_filter([{borders}]::DOUBLE[], lambda edge: edge <= {value}))"
            columns.append(f"CASE WHEN {value} IS NULL THEN []::BIGINT[] ELSE [{over}] END AS {quoted(name)}")
        for number, (name, file) in enumerate(inputs.vocabularies.items()):
            value = f"i.{quoted(f'value:{name}')}"
            columns.append(
                f"CASE WHEN {value} IS NULL THEN []::BIGINT[] ELSE [coalesce(v_{number}.id, {UNKNOWN})] END"
                f" AS {quoted(name)}"
            )
            self.engine.files(f"vocabulary_{number}", [file])
            values = f"SELECT value, row_number() OVER (ORDER BY rows DESC, value) AS id FROM vocabulary_{number}"
            joins += f" LEFT JOIN ({values}) AS v_{number} ON v_{number}.value = {value}"
        columns += [f"({labels.label(name)})::TINYINT AS {quoted(name)}" for name in config.tasks]
        rest = "".join(f", i.{name}" for name in self._columns if ":" in name)
        return (
            f"SELECT {', '.join(columns)} FROM impressions AS i JOIN requests AS r ON r.request_id = i.request_id"
            f" LEFT JOIN histories AS h ON h.request_id = i.request_id{joins}{labels.joins()}"
            f" ORDER BY r.request_id, i.is_drawn, i.event_time, i.item_id{rest}"
        )


def _by_day(rows: pa.Table) -> Iterator[tuple[date, pa.Table]]:
    """Split rows that are sorted by date into one table per date."""
    start = 0
    for day, count in zip(*pc.value_counts(rows["day"]).flatten(), strict=True):
        yield day.as_py(), rows.slice(start, count.as_py()).drop_columns(["day"])
        start += count.as_py()
