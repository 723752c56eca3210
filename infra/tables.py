"""The tables' contract: the content of items, users, requests, events and labels.

| table | a row is | ids |
|---|---|---|
| `items`, `users` | an item, a user; in parts; a later part may revise rows of an earlier one | from 0 without a gap |
| `requests` | a request: user, time, values shared by all its impressions, the user's history | `request_id` |
| `events` | an impression of a request; the rows of a request are adjacent, in the requests' order | |
| `labels` | row-aligned with events: one column per task, null while it is unknown | |

Requests, events and labels are partitions, one per date of the request's time (`infra.snapshot`). The i-th row groups
of a date's files hold the same requests, so that a reader joins them without a search (`infra.impressions`).
`infra.checks` checks rows against this contract. Embeddings are fixed-size lists of half precision in memory, and plain
lists of float32 in Parquet, which other programs can read (infra/parquet.py). Columns beyond the contract are kept
unchanged.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, PositiveFloat, model_validator

from sidestack.infra.config import Config, Day, matching, parse, require_plain
from sidestack.infra.errors import ConfigError, DataError

SPEC_FILE = "dataset.json"
TIME = pa.timestamp("us")
Entity = Literal["item", "user"]
"""The entities that have content signals, and so can have Semantic IDs."""
Size = Annotated[int, Field(gt=0, lt=2**31)]
"""A number of dimensions or categories, which Arrow counts in 32 bits."""
NumIds = Annotated[int, Field(gt=0, lt=2**63)]
"""A number of ids, which are int64. An embedding table may have fewer rows: `ranker.model.table_rows` hashes ids."""

Column = Annotated[str, matching(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+", "a column's name, without control characters")]
"""The name of a column."""
IdColumn = Annotated[Column, matching(r"[^.]+", "without a dot, as a part of the model is named after it")]
"""The name of a column of ids that have embeddings."""
TaskName = Annotated[str, matching("[a-z][a-z0-9_]{0,99}", "of a-z, 0-9 and _, as a column is named after it")]
"""The name of a task."""
FollowupDays = Annotated[float, Field(gt=0, le=36_500)]
"""Days, at most a century, until a label is known."""
REQUEST_ID = pa.field("request_id", pa.int64(), nullable=False)
"""The id of a request in `requests` and `events`; unique within a date."""
EVENT_COLUMNS = ("request_id", "user_id", "event_time", "item_id", "history_item_ids", "history_times")
"""The columns of every log, besides the labels, dense and sparse columns in its spec."""


class ContentSpec(NamedTuple):
    """The content signals of one table, items or users.

    Attributes:
        id_column: the column of its ids, which are row numbers. rows: the number of ids.
        embeddings: embedding signals, name -> dimensions. categoricals: name -> cardinality.
    """

    id_column: str
    rows: int
    embeddings: Mapping[str, int]
    categoricals: Mapping[str, int]


class TaskSpec(Config):
    """One prediction task: an int8 label column, 0 or 1, null where the label is not (or not yet) known.

    Where the label of its `given` task is 0, its own is 0 as well, once it is known.
    """

    given: str | None = None
    """The task that this one is conditional on: its probability is p(task | given = 1), and it is evaluated on rows
    with a `given` label of 1. None: it applies to every row."""
    weight: PositiveFloat = 1.0
    """Weight of its loss relative to the other tasks."""


def ancestors(tasks: Mapping[str, TaskSpec], task: str) -> tuple[str, ...]:
    """Return the tasks that a task is conditional on, directly or indirectly, nearest first."""
    found: list[str] = []
    parent = tasks[task].given
    while parent is not None:
        found.append(parent)
        parent = tasks[parent].given
    return tuple(found)


class DatasetSpec(Config):
    """The content of a dataset, besides the columns every dataset has (ids, times, history)."""

    embeddings: dict[Column, Size]
    """Item embedding signals: name -> dimensions."""
    categoricals: dict[Column, Size]
    """Item categorical signals: name -> cardinality; ids are in [0, cardinality)."""
    user_categoricals: dict[Column, Size]
    """User categorical signals, likewise."""
    user_embeddings: dict[Column, Size] = {}
    """User embedding signals, likewise."""
    num_items: NumIds
    """Number of items; item_id is in [0, num_items)."""
    num_users: Annotated[int, Field(ge=0, lt=2**63)]
    """Number of users; user_id is in [0, num_users). A dataset of items alone has none."""
    tasks: dict[TaskName, TaskSpec] = {}
    """The prediction tasks, by the name of the label column; a dataset of items alone has none."""
    followup_days: dict[str, FollowupDays] = {}
    """Days after an impression until a task's label is known; a task that is not listed has its label at once."""
    dense: tuple[Column, ...]
    """Columns of an impression, of type float32."""
    sparse: dict[IdColumn, NumIds]
    """Columns of an impression, of type list<int64>: name -> number of ids; ids are in [0, number)."""
    request_dense: tuple[Column, ...] = ()
    """Columns that are the same for all impressions of a request, of type float32."""
    request_sparse: dict[IdColumn, NumIds] = {}
    """Columns that are the same for all impressions of a request, of type list<int64>, as `sparse`."""
    max_history: Annotated[int, Field(ge=0, lt=2**31)]
    """The most entries of a history."""
    train: tuple[Day, Day]
    """First and last date of training events, inclusive."""
    test: tuple[Day, Day]
    """First and last date of test events, inclusive."""
    origin: str
    """One sentence about the source of the data."""

    def content(self, entity: Entity) -> ContentSpec:
        """Return the content signals of the items or of the users."""
        if entity == "item":
            return ContentSpec("item_id", self.num_items, self.embeddings, self.categoricals)
        return ContentSpec("user_id", self.num_users, self.user_embeddings, self.user_categoricals)

    @model_validator(mode="after")
    def _check_splits(self) -> "DatasetSpec":
        if not self.train[0] <= self.train[1] < self.test[0] <= self.test[1]:
            raise ValueError(f"train {self.train} must end before test {self.test} begins")
        return self

    @property
    def all_dense(self) -> tuple[str, ...]:
        """The dense columns of impressions and of requests."""
        return (*self.dense, *self.request_dense)

    @property
    def all_sparse(self) -> dict[str, int]:
        """The sparse columns of impressions and of requests: name -> number of ids."""
        return {**self.sparse, **self.request_sparse}

    def ancestors(self, task: str) -> tuple[str, ...]:
        """Return the tasks that a task is conditional on, directly or indirectly, nearest first."""
        return ancestors(self.tasks, task)

    @model_validator(mode="after")
    def _check_tasks(self) -> "DatasetSpec":
        for name, task in self.tasks.items():
            if task.given is not None and task.given not in self.tasks:
                raise ValueError(f"tasks.{name}.given: {task.given!r} is no task; tasks are {', '.join(self.tasks)}")
        for name in self.followup_days:
            if name not in self.tasks:
                raise ValueError(f"followup_days.{name}: is no task; tasks are {', '.join(self.tasks)}")
        for name in self.tasks:
            seen, parent = {name}, self.tasks[name].given
            while parent is not None:
                if parent in seen:
                    raise ValueError(f"tasks.{name}.given: the tasks are given each other in a circle")
                seen.add(parent)
                parent = self.tasks[parent].given
        return self

    @model_validator(mode="after")
    def _check_names(self) -> "DatasetSpec":
        tables = {
            "items": ["item_id", "text", *self.embeddings, *self.categoricals],
            "users": ["user_id", *self.user_embeddings, *self.user_categoricals],
            "events": [*EVENT_COLUMNS, *self.tasks, *self.all_dense, *self.all_sparse],
        }
        for table, names in tables.items():
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{table}: column {twice[0]!r} is named twice")
        return self


def read_spec(file: Path) -> DatasetSpec:
    """Read a dataset's description.

    Raises:
        DataError: there is no such file. ConfigError: it breaks the DatasetSpec.
    """
    return parse(DatasetSpec, read_json(file), str(file))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: the file is missing, not UTF-8, not a JSON object, has a duplicate key, or a value breaks a rule of
            `infra.config.require_plain`.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from error
    return parse_json(content, str(file))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in a file's content; see `read_json`.

    Args:
        content: bytes of the file. where: the name of the file in messages.
    """
    try:
        values = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_with_each_key_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: must hold a JSON object, holds a {type(values).__name__}")
    try:
        require_plain(values, where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    return values


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping of the pairs, without duplicate keys: `json` would keep the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return values


def write_spec(path: Path, spec: DatasetSpec) -> None:
    """Write the spec as `dataset.json` into the directory."""
    (Path(path) / SPEC_FILE).write_text(spec.model_dump_json(indent=1), encoding="utf-8")


def item_schema(spec: DatasetSpec, embedding_type: pa.DataType | None = None) -> pa.Schema:
    """Return the items' schema; embeddings have half precision by default."""
    ids, *signals = _content_fields(spec.content("item"), embedding_type)
    return pa.schema([ids, pa.field("text", pa.string()), *signals])


def user_schema(spec: DatasetSpec, embedding_type: pa.DataType | None = None) -> pa.Schema:
    """Return the users' schema; embeddings have half precision by default."""
    return pa.schema(_content_fields(spec.content("user"), embedding_type))


def content_schema(spec: DatasetSpec, entity: Entity) -> pa.Schema:
    """Return the schema of the items or of the users, with half-precision embeddings."""
    return item_schema(spec) if entity == "item" else user_schema(spec)


def _content_fields(content: ContentSpec, embedding_type: pa.DataType | None) -> list[pa.Field]:
    stored = embedding_type or pa.float16()
    return [
        pa.field(content.id_column, pa.int64(), nullable=False),
        *(pa.field(name, pa.list_(stored, dim)) for name, dim in content.embeddings.items()),
        *(pa.field(name, pa.int32()) for name in content.categoricals),
    ]


def request_schema(spec: DatasetSpec) -> pa.Schema:
    """Return the requests' schema: one row per request."""
    return pa.schema(
        [
            REQUEST_ID,
            pa.field("user_id", pa.int64(), nullable=False),
            pa.field("event_time", TIME, nullable=False),
            *_features(spec.request_dense, spec.request_sparse),
            pa.field("history_item_ids", pa.list_(pa.int64())),
            pa.field("history_times", pa.list_(TIME)),
        ]
    )


def event_schema(spec: DatasetSpec) -> pa.Schema:
    """Return the events' schema: one row per impression."""
    item_id = pa.field("item_id", pa.int64(), nullable=False)
    return pa.schema([REQUEST_ID, item_id, *_features(spec.dense, spec.sparse)])


def label_schema(spec: DatasetSpec) -> pa.Schema:
    """Return the labels' schema: one row per impression, in the events' order."""
    return pa.schema([pa.field(name, pa.int8()) for name in spec.tasks])


def daily_tables(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the tables that have one partition per date; without a task there are no labels."""
    return ("requests", "events", "labels") if spec.tasks else ("requests", "events")


def flat_schema(spec: DatasetSpec) -> pa.Schema:
    """Return the schema of impressions joined with their request and labels, as in a raw log."""
    parts = (request_schema(spec), event_schema(spec), label_schema(spec))
    fields = {field.name: field for part in parts for field in part}
    return pa.schema(list(fields.values()))


def _features(dense: tuple[str, ...], sparse: Mapping[str, int]) -> list[pa.Field]:
    return [
        *(pa.field(name, pa.float32(), nullable=False) for name in dense),
        *(pa.field(name, pa.list_(pa.int64())) for name in sparse),
    ]
