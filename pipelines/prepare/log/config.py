"""Configuration of a raw log: files, columns and tasks."""

from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from sidestack.infra.config import Config, Days
from sidestack.infra.errors import ConfigError
from sidestack.infra.identity import Identify
from sidestack.infra.remote.fields import PlaceText
from sidestack.infra.remote.urls import url_of
from sidestack.infra.tables import FollowupDays, TaskSpec
from sidestack.pipelines.prepare.contract import SourceConfig
from sidestack.pipelines.prepare.log.privacy_config import Privacy
from sidestack.pipelines.prepare.text_config import TextConfig

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Paths = Annotated[tuple[PlaceText, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Files, folders or globs of Parquet or CSV; local paths or URLs."""
EngineName = Literal["duckdb", "spark"]


def _by_name(value: Any) -> Any:
    return {name: name for name in value} if isinstance(value, list | tuple) else value


Columns = Annotated[dict[str, str], BeforeValidator(_by_name)]
"""Feature name -> column; in a list of columns each feature has its column's name."""


class TimeColumn(Config):
    """A column of times; in the configuration its name is enough."""

    column: str
    unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of numbers since 1970-01-01 UTC; dates and timestamps have their own."""
    zone: str = "UTC"
    """Time zone of dates and of timestamps without one, such as `Europe/Berlin`."""

    @field_validator("zone")
    @classmethod
    def _check_zone(cls, zone: str) -> str:
        try:
            ZoneInfo(zone)
        except (ValueError, OSError) as error:
            raise ValueError(f"{zone!r} is no time zone") from error
        return zone


Time = Annotated[TimeColumn, BeforeValidator(lambda value: {"column": value} if isinstance(value, str) else value)]


class EventFiles(Config):
    """Files of impressions (or actions), one a row."""

    path: Paths
    user: str
    item: str
    time: Time
    event_id: str | None = None
    """Rows with the same event id count once; without it, rows that are equal in all columns named here."""
    request: str | None = None
    """Rows of a date with the same value are one request; by default, rows with the same user and time."""
    dense: Columns = {}
    """Numbers, used as they are; null becomes 0."""
    quantiles: dict[str, Annotated[int, Field(ge=2, le=1000)]] = {}
    """Numbers to discretize: column -> number of buckets with equal row counts, fixed at the first prepare."""
    categoricals: Columns = {}


class ContentFiles(Config):
    """Files of the catalogue of items or users, one a row."""

    path: Paths
    id: str
    text: tuple[str, ...] = ()
    """Text columns, embedded together by the sentence encoder (items only)."""
    embeddings: Columns = {}
    """Lists of numbers, of one length per column; they are normalized to unit length."""
    categoricals: Columns = {}


class LabelFiles(Config):
    """Files of later events, one a row, matched to impressions by event id, or by user and item."""

    path: Paths
    time: Time
    event_id: str | None = None
    user: str | None = None
    item: str | None = None

    @model_validator(mode="after")
    def _check_match(self) -> Self:
        if (self.event_id is None) == (self.user is None or self.item is None):
            raise ValueError("name either event_id, or user and item, to match events by")
        return self


class LogTask(TaskSpec):
    """One prediction task."""

    where: str = "true"
    """SQL condition over the columns of the events' files, or of the table's; the label is 1 where it is true."""
    table: str | None = None
    """Name of the table in `labels` that has the task; by default the events themselves."""
    within_days: FollowupDays | None = None
    """With a table: number of days after the event in which a row counts; until they are over the label is null."""

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if (self.table is None) != (self.within_days is None):
            raise ValueError("table and within_days go together: how long after the event does a row of it count?")
        return self


class LogConfig(SourceConfig):
    """Configuration of the user's own log from raw files: string ids, events without histories, late labels, texts.

    All faults of all files are reported at once. Ingested files are stored, typed and by date, next to the tables. Ids
    and vocabularies are stored; ids only grow.
    """

    kind: Literal["log"]
    engine: EngineName = "duckdb"
    """The engine for requests, histories, counts and labels: DuckDB on this machine, or Spark, with equal rows."""
    events: EventFiles
    items: ContentFiles | None = None
    users: ContentFiles | None = None
    labels: dict[str, LabelFiles] = {}
    tasks: dict[str, LogTask]
    history: str | None = None
    """The task whose positives are a user's history and the positives of count features; by default the first without a
    parent. Its labels must be in the events' files."""
    max_history: PositiveInt = 32
    count_days: Days = 7
    """Window in days of recent count features. Count features (of user, item, and user x the items' first categorical)
    are of all earlier events and of this window."""
    delay_minutes: NonNegativeFloat = 0.0
    """Delay after an event until histories and counts include it."""
    negatives: NonNegativeInt = 0
    """For a log of positives only: number of items drawn for each event as impressions with label 0. They are drawn
    from the date's items, by frequency."""
    vocabulary: PositiveInt = 10_000
    """Maximum number of values of a categorical: the most frequent are kept, all others become `unknown`."""
    max_dropped: Share = 0.05
    """Rows without user, item or time are dropped and counted; a larger share of a file than this is an error."""
    max_unknown_items: Share = 0.2
    """Maximum share of events whose item is not in the catalogue (such items have no content)."""
    identify: Identify = "footer"
    """How Parquet files are identified; other files are identified by all their bytes."""
    text: TextConfig = TextConfig()
    privacy: Privacy = Privacy()
    train_days: Days | None = None
    """Number of dates before the test dates to train on; by default all."""
    test_days: Days | None = None
    """Number of test dates: the newest with complete labels; by default a fifth of all dates."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if not self.tasks:
            raise ValueError("tasks: name at least one")
        for name, task in self.tasks.items():
            if task.table is not None and task.table not in self.labels:
                raise ValueError(f"tasks.{name}.table: {task.table!r} is not among labels ({', '.join(self.labels)})")
            if task.given is not None and task.given not in self.tasks:
                raise ValueError(f"tasks.{name}.given: {task.given!r} is no task; tasks are {', '.join(self.tasks)}")
        if self.history_task not in self.tasks:
            raise ValueError(f"history: {self.history!r} is no task; tasks are {', '.join(self.tasks)}")
        if self.tasks[self.history_task].table is not None:
            raise ValueError(f"history: {self.history_task!r} is known later; take a task that the events have")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        events = self.events
        names = [*events.dense, *events.quantiles, *events.categoricals]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"events: column {twice[0]!r} is named twice among dense, quantiles and categoricals")
        if self.users is not None and self.users.text:
            raise ValueError("users.text: texts are embedded of items alone")
        return self

    @model_validator(mode="after")
    def _check_privacy(self) -> Self:
        faults = [*self._unmasked_columns(), *self._short_retention()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _unmasked_columns(self) -> Iterator[str]:
        """Yield columns of masked ids that are also used in a role that would store them unmasked."""
        if self.privacy.key is None:
            return
        events, takes_items = self.events, self.privacy.mask_items
        ids = {events.user, events.event_id, events.request, *([events.item] if takes_items else [])}
        kept = {"events": (ids, [*events.dense.values(), *events.quantiles, *events.categoricals.values()])}
        for name, content, is_masked in (("items", self.items, takes_items), ("users", self.users, True)):
            if content is not None and is_masked:
                kept[name] = (
                    {content.id},
                    [*content.text, *content.embeddings.values(), *content.categoricals.values()],
                )
        for name, (masked, columns) in kept.items():
            for column in sorted({one for one in columns if one in masked}):
                yield f"{name}: column {column!r} holds ids that privacy.key masks; it cannot be a feature or text too"

    def _short_retention(self) -> Iterator[str]:
        days = self.privacy.retention_days
        needed = ceil(max(self.count_days, self.delay_minutes / 1440) + max([0.0, *self.followup_days.values()])) + 2
        if days is not None and days < needed:
            yield (
                f"privacy.retention_days: {days} must be at least {needed}: what count_days, delay_minutes and the"
                " labels' within_days look back on, and two dates"
            )

    def require_filesystem(self, path: Path) -> None:
        """Check that the location of the log's store supports the configured settings.

        Args:
            path: the store, or a folder above it.

        Raises:
            ConfigError: the store is at a URL, where nothing is deleted and which Spark's executors cannot read.
        """
        url = url_of(path)
        if url is not None and self.privacy.retention_days is not None:
            raise ConfigError(
                f"prepare.source.privacy.retention_days: nothing would be deleted at {url}; keep the run on a"
                " filesystem, where pipelines.privacy.expire deletes"
            )
        if url is not None and self.engine == "spark":
            raise ConfigError(
                f"prepare.source.engine: spark: its executors do not see {url}; keep the run on a filesystem"
            )

    @property
    def history_task(self) -> str:
        """The task whose positives make histories."""
        return self.history or next(name for name, task in self.tasks.items() if task.given is None)

    @property
    def followup_days(self) -> Mapping[str, float]:
        """By task: how long after an event its label is known, if later than the event."""
        return {name: task.within_days for name, task in self.tasks.items() if task.within_days is not None}
