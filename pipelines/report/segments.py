"""Segments of the held-out rows: by how many responses came before, of the user and of the item.

The second paper reports its gains by these, because content should pay most where little is known. A response is a
click on a row of the training dates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray

from infra.errors import DataError
from infra.parquet import read_row_group, row_groups
from infra.tables import Dataset, check_events
from pipelines.report.predictions import Predictions

Integers = NDArray[np.int64]

SEGMENTS = ("0", "1-2", "3-9", "10+")
"""Earlier responses, in the paper's steps."""
_FROM = np.array([1, 3, 10])
"""The number of responses that each segment but the first begins with."""


@dataclass(frozen=True)
class EarlierClicks:
    """Clicks on the training dates' rows.

    Attributes:
        by: `user` and `item` -> clicks of each id.
    """

    by: Mapping[str, Integers]

    def segments(self, predictions: Predictions) -> dict[str, Integers]:
        """Give each held-out row's place in `SEGMENTS`, by its user and by its item.

        Raises:
            DataError: an id lies outside the dataset's table.
        """
        return {kind: np.searchsorted(_FROM, self._clicks(kind, predictions), side="right") for kind in self.by}

    def _clicks(self, kind: str, predictions: Predictions) -> Integers:
        clicks_I, ids_N = self.by[kind], predictions.identity[f"{kind}_id"]
        outside_N = ids_N[(ids_N < 0) | (ids_N >= len(clicks_I))]
        if len(outside_N):
            rule = f"is outside the dataset's table [0, {len(clicks_I)})"
            raise DataError(f"{predictions.path}/predictions: {kind}_id {outside_N[0]} {rule}")
        return clicks_I[ids_N]


def count_clicks(dataset: Dataset, first: date, last: date) -> EarlierClicks:
    """Count the clicks of each user and item on the training dates, reading three columns, one row group at a time.

    Args:
        dataset: any that has the events. first, last: the training dates, inclusive.

    Raises:
        DataError: there are no events, or they break the tables' contract.
    """
    spec = dataset.spec
    by = {"user": np.zeros(spec.num_users, np.int64), "item": np.zeros(spec.num_items, np.int64)}
    for group in row_groups(dataset.event_files(first, last)):
        table = read_row_group(group, ["user_id", "item_id", "click"])
        check_events(table, spec, group)
        clicked_N = table["click"].to_numpy() == 1
        for kind, clicks_I in by.items():
            np.add.at(clicks_I, table[f"{kind}_id"].to_numpy()[clicked_N], 1)
    return EarlierClicks(by)
