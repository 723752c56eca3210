"""The baseline's features of a row: context, counts of earlier dates, and the item's similarity to the history.

No feature depends on the row's own labels, on another row of its date, or on anything later.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from sidestack.infra.checks import check_events
from sidestack.infra.impressions import read_impressions
from sidestack.infra.parquet import RowGroup
from sidestack.infra.snapshot import Dataset
from sidestack.infra.tables import DatasetSpec, TaskSpec
from sidestack.ranker.baseline.columns import (
    Floats,
    Integers,
    calendar_features,
    first_entries,
    histories_of,
    item_categories,
    judged_labels,
    since_newest,
    times_in_history,
)
from sidestack.ranker.baseline.counts import EarlierCounts
from sidestack.ranker.baseline.similarity import Similarity
from sidestack.ranker.config import Dates
from sidestack.ranker.constants import read_embeddings
from sidestack.ranker.features import BASE_COLUMNS, HISTORY_COLUMNS

Block = tuple[pa.Table, dict[str, Floats]]
"""Some rows, and the features of each by name."""

MAX_CATEGORIES = 255
"""Columns with more ids are encoded by the ids' counts: scikit-learn allows no more categories per feature."""
MAX_ENTRIES = 8
"""Only this many first ids of a list are features, one each."""
BLOCK_ROWS = 1 << 15


def columns_read(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the columns of the impressions to read."""
    return ("request_id", *BASE_COLUMNS, *HISTORY_COLUMNS, *spec.all_dense, *spec.all_sparse, *spec.tasks)


class RowFeatures:
    """A reader of a dataset's rows in order of date, with their features.

    Items have the content of their newest part, as in arm `dense`.

    Args:
        dataset: the snapshot. tasks: the predicted tasks.
    """

    def __init__(self, dataset: Dataset, tasks: Mapping[str, TaskSpec]) -> None:
        spec = dataset.spec
        self.dataset, self.tasks = dataset, tasks
        self._categories = item_categories(dataset)
        self._similarities = {
            name: Similarity(read_embeddings(dataset, "item", {name: dim})[0].numpy())
            for name, dim in spec.embeddings.items()
        }
        self._few = [name for name, number in spec.all_sparse.items() if number <= MAX_CATEGORIES]
        self._many = [name for name, number in spec.all_sparse.items() if number > MAX_CATEGORIES]
        sizes = {"user": spec.num_users, "item": spec.num_items}
        sizes |= {_category(name): number for name, number in spec.categoricals.items()}
        self._with_labels = tuple(sizes)
        sizes |= {_sparse(name): spec.all_sparse[name] for name in self._many}
        self._counts = EarlierCounts(sizes, [spec.followup_days.get(task, 0.0) for task in tasks])

    @property
    def categorical(self) -> frozenset[str]:
        """The features whose values are categories, not amounts."""
        return frozenset({"weekday", *(name for column in self._few for name in _entries(column))})

    def read(self, dates: Dates) -> Iterator[Block]:
        """Yield the rows of some dates in order, in blocks; their labels enter the features of later dates.

        Raises:
            DataError: rows break the tables' contract.
        """
        for day in self.dataset.dates(*dates):
            self._counts.begin(day)
            for group in read_impressions(self.dataset, columns_read(self.dataset.spec), day, day, self._check):
                for start in range(0, group.num_rows, BLOCK_ROWS):
                    rows = group.slice(start, BLOCK_ROWS).combine_chunks()
                    ids = self._ids(rows)
                    yield rows, self._features(rows, ids)
                    self._counts.add(day, ids, judged_labels(rows, self.tasks))

    def _check(self, rows: pa.Table, where: RowGroup) -> None:
        check_events(rows, self.dataset.spec, where)

    def _ids(self, rows: pa.Table) -> dict[str, Integers]:
        """Return each row's id in every group of counts; -1 where it has none."""
        items_N = rows["item_id"].to_numpy()
        ids = {"user": rows["user_id"].to_numpy(), "item": items_N}
        ids |= {_category(name): of_item_I[items_N] for name, of_item_I in self._categories.items()}
        return ids | {_sparse(name): first_entries(rows, name, 1)[:, 0] for name in self._many}

    def _features(self, rows: pa.Table, ids: Mapping[str, Integers]) -> dict[str, Floats]:
        found: dict[str, Floats] = {f"dense.{name}": rows[name].to_numpy() for name in self.dataset.spec.all_dense}
        for name in self._few:
            found |= zip(_entries(name), _as_categories(first_entries(rows, name, MAX_ENTRIES)), strict=True)
        return {**found, **calendar_features(rows), **self._counted(ids), **self._of_history(rows)}

    def _counted(self, ids: Mapping[str, Integers]) -> dict[str, Floats]:
        counts = self._counts
        found = {f"{group}.log_impressions": counts.log_impressions(group, ids_N) for group, ids_N in ids.items()}
        for group in self._with_labels:
            for place, task in enumerate(self.tasks):
                found[f"{group}.log_{task}"] = counts.log_positives(group, ids[group], place)
                found[f"{group}.rate_{task}"] = counts.rate(group, ids[group], place)
        return found

    def _of_history(self, rows: pa.Table) -> dict[str, Floats]:
        items_N, histories = rows["item_id"].to_numpy(), histories_of(rows)
        found = {
            "history.length": histories.lengths_R[histories.request_N].astype(np.float32),
            "history.days_since": since_newest(rows),
            "history.times_item": times_in_history(rows),
        }
        for name, similarity in self._similarities.items():
            found[f"{name}.to_mean"] = similarity.to_mean(items_N, histories)
            found[f"{name}.to_newest"] = similarity.to_newest(items_N, histories)
        return found


def _category(name: str) -> str:
    return f"category.{name}"


def _sparse(name: str) -> str:
    return f"sparse.{name}"


def _entries(column: str) -> list[str]:
    return [f"{_sparse(column)}.{place}" for place in range(MAX_ENTRIES)]


def _as_categories(entries_NE: Integers) -> Floats:
    """Return one row per place in the lists, NaN where a list is shorter."""
    return np.where(entries_NE >= 0, entries_NE, np.nan).T.astype(np.float32)
