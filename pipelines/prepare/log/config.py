"""Configuration of a raw log: which files, which of their columns, and what is predicted."""

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
"""Files, folders or globs, of Parquet or CSV; local ones or URLs."""
EngineName = Literal["duckdb", "spark"]


def _by_name(value: Any) -> Any:
    return {name: name for name in value} if isinstance(value, list | tuple) else value


Columns = Annotated[dict[str, str], BeforeValidator(_by_name)]
"""Features by name -> column; a list of columns names features after them."""


class TimeColumn(Config):
    """A column of times; in the configuration its name alone will do."""

    column: str
    unit: Literal["s", "ms", "us", "ns"] = "s"
    """Of numbers, since 1970-01-01 UTC; dates and timestamps have their own."""
    zone: str = "UTC"
    """Time zone of dates, and of timestamps that name none, such as `Europe/Berlin`."""

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
    """Impressions (or actions), one a row."""

    path: Paths
    user: str
    item: str
    time: Time
    event_id: str | None = None
    """Rows of one event id count once; without it, rows that are equal in all columns named here do."""
    request: str | None = None
    """Rows of a date with the same value are one request; by default those of one user and time are."""
    dense: Columns = {}
    """Numbers, taken as they are; a null is 0."""
    quantiles: dict[str, Annotated[int, Field(ge=2, le=1000)]] = {}
    """Numbers that become categories: column -> how many buckets of as many rows each, as first seen."""
    categoricals: Columns = {}


class ContentFiles(Config):
    """The catalogue of items, or of users, one a row."""

    path: Paths
    id: str
    text: tuple[str, ...] = ()
    """Text columns, embedded together by the sentence encoder (items only)."""
    embeddings: Columns = {}
    """Lists of numbers, each column of one length; they are brought to unit length."""
    categoricals: Columns = {}


class LabelFiles(Config):
    """What happened later, one a row, to be matched to events by event id, or by user and item."""

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
    """One thing to predict."""

    where: str = "true"
    """SQL condition over the columns of the events' files, or of the table's; the label is 1 where it holds."""
    table: str | None = None
    """Which of `labels` has it; by default the events themselves."""
    within_days: FollowupDays | None = None
    """With a table: a row of it counts from its event's time until so many days after; until they are over the label
    is null."""

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if (self.table is None) != (self.within_days is None):
            raise ValueError("table and within_days go together: how long after the event does a row of it count?")
        return self


class LogConfig(SourceConfig):
    """A log of one's own from raw files: string ids, events without histories, late labels, texts.

    All faults of all files are reported at once. What is read once is kept, typed and by date, beside the tables;
    ids and vocabularies are kept and only grow.
    """

    kind: Literal["log"]
    engine: EngineName = "duckdb"
    """What makes requests, histories, counts and labels: DuckDB on this machine, or Spark; the rows are the same."""
    events: EventFiles
    items: ContentFiles | None = None
    users: ContentFiles | None = None
    labels: dict[str, LabelFiles] = {}
    tasks: dict[str, LogTask]
    history: str | None = None
    """The task whose positives are a user's history, and the positives of count features; by default the first without
    a parent. It must be told by the events themselves."""
    max_history: PositiveInt = 32
    count_days: Days = 7
    """Count features (of user, item, and user x the items' first categorical) are of all earlier events, and of the
    last so many days."""
    delay_minutes: NonNegativeFloat = 0.0
    """How long after its time an event is known to histories and counts."""
    negatives: NonNegativeInt = 0
    """For a log of positives alone: so many items are drawn for each event, from those of the same date by how often
    they occur, as impressions whose labels are 0."""
    vocabulary: PositiveInt = 10_000
    """Most values of a categorical that are kept, the most frequent; all others are one value, `unknown`."""
    max_dropped: Share = 0.05
    """Rows without user, item or time are left out and counted; a larger share of a file than this is an error."""
    max_unknown_items: Share = 0.2
    """The largest share of events whose item the catalogue lacks (items then have no content)."""
    identify: Identify = "footer"
    """What tells Parquet files from each other; other files are told by all their bytes."""
    text: TextConfig = TextConfig()
    privacy: Privacy = Privacy()
    train_days: Days | None = None
    """So many dates before the test dates are trained on; by default all."""
    test_days: Days | None = None
    """Dates to test on: the newest whose labels are complete; by default a fifth of all dates."""

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
            raise ValueError(f"history: {self.history_task!r} is known later; take a task that the events tell")
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
        """Yield columns of masked ids that are named a second time, in a role that would keep them as they are."""
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
        """Check that what is configured can be had where the log's store is to be.

        Args:
            path: the store, or a folder above it.

        Raises:
            ConfigError: it is at a URL, where nothing is deleted, and which Spark's executors do not see.
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
        """By task: how long after an event its label is known, where that is later than the event."""
        return {name: task.within_days for name, task in self.tasks.items() if task.within_days is not None}
