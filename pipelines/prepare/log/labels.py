"""Labels that arrive after their events, in separate tables: by SQL, for the rows of some dates."""

from collections.abc import Callable, Iterator
from datetime import date, datetime

from sidestack.infra.sql import interval, matching, quoted
from sidestack.pipelines.prepare.log.config import LogConfig, LogTask
from sidestack.pipelines.prepare.log.engine import Engine
from sidestack.pipelines.prepare.log.inputs import LogInputs, State

IMPRESSION = ("request_id", "user_id", "item_id", "event_time")
"""The key of impressions whose labels may differ."""


class LateLabels:
    """Queries of all tasks' labels, over tables `log`, `impressions`, `users` and `items`.

    Args of the constructor:
        engine: that has these tables. config: the log's. inputs: the files that rows are made from.
        log: prints how many labels were found, and how many rows of their tables have no event.
    """

    def __init__(self, engine: Engine, config: LogConfig, inputs: LogInputs, log: Callable[[str], None]) -> None:
        self.engine = engine
        self.config = config
        self.inputs = inputs
        self.log = log

    def make(self, state: State | None, first: date, until: datetime) -> None:
        """Create `late_<n>` for each task with a label table: the table's first row at or after each impression.

        Args:
            state: the state at the beginning of `log`. first: of the dates. until: the end of `log`.
        """
        for late, name, task, within_days in self._late():
            if not self.inputs.labels[task.table or ""]:
                columns = ", ".join(IMPRESSION)
                self.engine.table(late, f"SELECT {columns}, event_time AS happened FROM impressions WHERE false")
                continue
            by = self._load(task, quoted(f"task:{name}"), first if state is not None else None)
            self.engine.table(late, self._firsts(by))
            is_within = f"happened < event_time + {interval(within_days)}"
            (found,) = self.engine.row(f"SELECT count(*) FROM {late} WHERE {is_within}")
            self.log(f"prepare: {found:,} impressions have a row of {task.table} within {within_days:g} days ({name})")
            early, lost = self._without_event(by, until)
            if early or lost:
                since = f" since {state.day}" if state is not None else ""
                self.log(
                    f"prepare: {task.table}: {early:,} rows lie before their event and {lost:,} match no event{since}"
                    f" ({name}); they count for nothing"
                )

    def label(self, name: str) -> str:
        """Return the expression of a task's label over `impressions` as `i`, and `joins`."""
        task = self.config.tasks[name]
        own = f"i.{quoted(f'task:{name}')}"
        unknown = "false"
        if task.within_days is not None:
            within = interval(task.within_days)
            late = next(late for late, one, *_ in self._late() if one == name)
            own = f"CASE WHEN {late}.happened < i.event_time + {within} THEN 1 ELSE 0 END"
            unknown = f"NOT i.is_drawn AND i.event_time + {within} >= TIMESTAMP '{self.inputs.end}'"
        if task.given is not None:
            own = f"CASE ({self.label(task.given)}) WHEN 1 THEN {own} WHEN 0 THEN 0 END"
        return f"CASE WHEN {unknown} THEN NULL ELSE {own} END"

    def joins(self) -> str:
        """Return the joins of `late_<n>` to `impressions` as `i`."""
        return "".join(f" LEFT JOIN {late} ON {matching(late, 'i', IMPRESSION)}" for late, *_ in self._late())

    def _late(self) -> Iterator[tuple[str, str, LogTask, float]]:
        """Yield the tasks with a label table, each with its `late_<n>`, name, and days."""
        for number, (name, task) in enumerate(self.config.tasks.items()):
            if task.within_days is not None:
                yield f"late_{number}", name, task, task.within_days

    def _load(self, task: LogTask, flag: str, first: date | None) -> tuple[str, ...]:
        """Create `happened`, a task's label rows from a date on, and return the columns that match it to events.

        Matched by user and item, ids are null for keys in no event and no catalogue.
        """
        assert task.table is not None
        self.engine.files("label_files", self.inputs.labels[task.table])
        since = f" AND event_time >= TIMESTAMP '{first}'" if first is not None else ""
        is_own = f"{flag} = 1 AND event_time < TIMESTAMP '{self.inputs.end}'{since}"
        if self.config.labels[task.table].event_id is not None:
            self.engine.table("happened", f"SELECT event_id, event_time FROM label_files WHERE {is_own}")
            return ("event_id",)
        self.engine.table(
            "happened",
            "SELECT users.id AS user_id, items.id AS item_id, event_time"
            f" FROM (SELECT user_key, item_key, event_time FROM label_files WHERE {is_own}) AS raw"
            " LEFT JOIN users ON users.key = raw.user_key LEFT JOIN items ON items.key = raw.item_key",
        )
        return ("user_id", "item_id")

    def _firsts(self, by: tuple[str, ...]) -> str:
        """Return the query of the first row of `happened` at or after each impression."""
        impression, columns = ", ".join(IMPRESSION), ", ".join(dict.fromkeys((*IMPRESSION, *by)))
        has_key = " AND ".join(f"{key} IS NOT NULL" for key in by)
        found = self.engine.asof(
            f"SELECT DISTINCT {columns} FROM impressions", f"SELECT * FROM happened WHERE {has_key}",
            by, "asked.event_time", {"happened": "event_time"}, is_later=True,
        )  # fmt: skip
        return (
            f"SELECT {impression}, min(happened) AS happened FROM ({found}) WHERE happened IS NOT NULL"
            f" GROUP BY {impression}"
        )

    def _without_event(self, by: tuple[str, ...], until: datetime) -> tuple[int, int]:
        """Return how many rows of `happened` are before the first event they match, and how many match none."""
        keys = ", ".join(f"log.{key}" for key in by)
        firsts = (
            f"SELECT {keys}, min(log.event_time) AS first FROM log JOIN (SELECT DISTINCT {', '.join(by)} FROM happened)"
            f" AS asked ON {matching('log', 'asked', by)} GROUP BY {keys}"
        )
        early, lost = self.engine.row(
            "SELECT count(*) FILTER (WHERE firsts.first > happened.event_time),"
            f" count(*) FILTER (WHERE firsts.first IS NULL) FROM happened LEFT JOIN ({firsts}) AS firsts"
            f" ON {matching('firsts', 'happened', by)} WHERE happened.event_time < TIMESTAMP '{until}'"
        )
        return early, lost
