"""A click file: one Parquet file of impressions, whose rows carry the vector of their item.

The file has the columns time, user, item, vector and click. A request is one impression; its history is the user's
earlier clicks. Everything is made again when the file changes, and every rank holds the whole file in memory: for a log
that grows by the day, `kind: log` and `kind: tables` make only what is new.
"""

from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import PositiveInt

from sidestack.infra.config import Days, digest, parse
from sidestack.infra.distributed import raise_on_all_ranks
from sidestack.infra.errors import DataError
from sidestack.infra.identity import IdentityCache
from sidestack.infra.remote.fields import Place
from sidestack.infra.stage import StageRun
from sidestack.infra.tables import DatasetSpec, Entity, TaskSpec, content_schema, flat_schema
from sidestack.pipelines.prepare.columns import Ragged, embeddings, table
from sidestack.pipelines.prepare.contract import Part, Prepare, SourceConfig, label_keys

COLUMNS = pa.schema(
    {
        "time": pa.timestamp("us"),
        "user": pa.string(),
        "item": pa.string(),
        "vector": pa.list_(pa.float32()),
        "click": pa.int8(),
    }
)
"""The file's columns; other types of the same values are cast."""


class ClickFile(SourceConfig):
    """Settings of a click file."""

    kind: Literal["click_file"] = "click_file"
    path: Place
    """The file, or its URL."""
    test_days: Days = 1
    """The newest so many dates are tested on, all before are trained on."""
    max_history: PositiveInt = 16
    """Newest earlier clicks of the user in a row's history."""

    def paths(self) -> Sequence[Path]:
        """Return the file."""
        return (self.path,)

    def open(self, run: StageRun[Prepare]) -> "ClickLog":
        """Read the file, up to the snapshot's time, on every rank."""
        with raise_on_all_ranks(run.world, f"reading {self.path}"):
            rows = read_clicks(self.path, run.config.as_of)
            return ClickLog(
                self, rows, digest({"file": self.data_identity(run.config), "as_of": str(run.config.as_of)})
            )

    def data_identity(self, prepare: Prepare) -> str:
        """Return what identifies the file: its size and its Parquet footer."""
        return IdentityCache(prepare.identity_cache).identities([self.path])[self.path]


def read_clicks(path: Path, as_of: date | None) -> pa.Table:
    """Return the rows of a click file before a date, in order of time.

    Raises:
        DataError: a column is missing, of another type or has nulls, vectors differ in length, or there are no rows.
    """
    try:
        rows = pq.read_table(path).select(COLUMNS.names).cast(COLUMNS)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"prepare.source.path: {path}: must hold {', '.join(COLUMNS.names)}: {error}") from error
    if as_of is not None:
        rows = rows.filter(pc.less(rows["time"], pa.scalar(datetime.combine(as_of, time()), pa.timestamp("us"))))
    for name in COLUMNS.names:
        if rows[name].null_count:
            raise DataError(f"{path}: column {name!r}: must not be null")
    if len(pc.unique(pc.list_value_length(rows["vector"]))) != 1:
        raise DataError(f"{path}: column 'vector': must hold lists of one length, and at least one row")
    return rows.sort_by([(name, "ascending") for name in ("time", "user", "item")])


class ClickLog:
    """A click file as a `pipelines.prepare.contract.Source`.

    Args:
        config: the source's settings. rows: of the file. identity: names what decides every row.
    """

    def __init__(self, config: ClickFile, rows: pa.Table, identity: str) -> None:
        self._config, self._identity = config, identity
        self._times_N = rows["time"].to_numpy().astype("datetime64[us]")
        self._days_N = self._times_N.astype("datetime64[D]")
        self._clicks_N = rows["click"].to_numpy()
        self._users, self._user_N = np.unique(rows["user"].to_numpy(), return_inverse=True)
        self._items, first_I, self._item_N = np.unique(rows["item"].to_numpy(), return_index=True, return_inverse=True)
        vectors = rows["vector"].combine_chunks().take(pa.array(first_I))
        self._vectors_ID = vectors.flatten().to_numpy().reshape(len(first_I), -1)
        self.spec = self._describe()

    def parts(self, entity: Entity) -> list[Part]:
        """Return the one part of the items, whose text is their key, or of the users."""
        schema = content_schema(self.spec, entity)
        key = digest({"log": self._identity, "entity": entity})
        return [Part(str(self._config.path), key, schema, lambda: [table(self._content(entity), schema)])]

    def days(self) -> list[date]:
        """Return the dates that have events."""
        days: list[date] = np.unique(self._days_N).tolist()
        return days

    def day_keys(self, day: date) -> dict[str, str]:
        """Return what decides a date's rows; all labels are known at once."""
        decides = {"log": self._identity, "day": str(day), "max_history": self._config.max_history}
        return label_keys(decides, {}, day, None)

    def rows(self, days: Sequence[date]) -> Iterator[tuple[date, list[pa.Table]]]:
        """Yield some of the dates, each with its impressions."""
        schema = flat_schema(self.spec)
        for day in days:
            yield day, [table(self._impressions(day), schema)]

    def _describe(self) -> DatasetSpec:
        days, tested = self.days(), self._config.test_days
        if len(days) <= tested:
            raise DataError(f"{self._config.path}: {len(days)} dates leave none to train on beside test_days={tested}")
        values = dict(
            embeddings={"vector": self._vectors_ID.shape[1]},
            categoricals={},
            user_categoricals={},
            num_items=len(self._items),
            num_users=len(self._users),
            tasks={"click": TaskSpec()},
            dense=(),
            sparse={},
            request_dense=("clicks_before",),
            request_sparse={"hour": 24},
            max_history=self._config.max_history,
            train=(days[0], days[-tested - 1]),
            test=(days[-tested], days[-1]),
            origin=f"the click file {self._config.path.name}",
        )
        return parse(DatasetSpec, values, "prepare.source")

    def _content(self, entity: Entity) -> dict[str, Any]:
        if entity == "user":
            return {"user_id": np.arange(len(self._users))}
        is_there_I = np.ones(len(self._items), bool)
        return {
            "item_id": np.arange(len(self._items)),
            "text": pa.array(self._items, pa.string()),
            "vector": embeddings(self._vectors_ID.astype(np.float16), is_there_I),
        }

    def _impressions(self, day: date) -> dict[str, Any]:
        row_N = np.flatnonzero(self._days_N == np.datetime64(day))
        clicked_C, first_N, stop_N = self._clicks_before(row_N)
        start_N = np.maximum(first_N, stop_N - self._config.max_history)
        time_N = self._times_N[row_N]
        return {
            "request_id": (day.toordinal() << 32) + np.arange(len(row_N)),
            "user_id": self._user_N[row_N],
            "event_time": time_N,
            "clicks_before": (stop_N - first_N).astype(np.float32),
            "hour": Ragged.single((time_N - time_N.astype("datetime64[D]")) // np.timedelta64(1, "h")),
            "history_item_ids": Ragged.spans(self._item_N[clicked_C], start_N, stop_N),
            "history_times": Ragged.spans(self._times_N[clicked_C], start_N, stop_N),
            "item_id": self._item_N[row_N],
            "click": self._clicks_N[row_N],
        }

    def _clicks_before(self, row_N: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Return the rows of all clicks by user and time, and for each row where those of its user begin, and where
        those before its time end."""
        rank_N = np.unique(self._times_N, return_inverse=True)[1]
        place_N = self._user_N * (len(rank_N) + 1) + rank_N  # by user, then time
        clicked_C = np.flatnonzero(self._clicks_N)
        clicked_C = clicked_C[np.argsort(place_N[clicked_C], kind="stable")]
        first_N = np.searchsorted(place_N[clicked_C], self._user_N[row_N] * (len(rank_N) + 1))
        stop_N = np.searchsorted(place_N[clicked_C], place_N[row_N])
        return clicked_C, first_N, stop_N
