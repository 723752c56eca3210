"""An id table with admission over a hundred nightly trainings, on a log whose items come and go.

`python -m benchmarks.admission [--quick] [--out DIR]`. Only the map from id to row is simulated, without training. Each
night new items are added, the night's impressions are counted, and rows are evicted and admitted (`ranker.admission`).
The result is the share of the next night's impressions whose id has a row of its own.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.record import Row, results_folder
from sidestack.benchmarks.timing import Spread, spread
from sidestack.ranker.admission import IdRows, Integers
from sidestack.ranker.config import AdmissionConfig, ModelConfig

FIRST_DAY = date(2024, 1, 1)
MIB = 2**20
ROW_BYTES = ModelConfig().embedding_dim * 4 + 4
"""Bytes of a row's weights and optimizer state."""
MAP_BYTES = 12
"""Bytes of an id's row, count and date, int32 each."""
HALF_LIFE_DAYS = 10.0
TAIL = 1.1
"""Exponent of the Pareto distribution of items' popularity."""
COLUMNS = {
    "table": "", "night": "d", "ids": ",d", "rows_in_use": ",d", "admitted": ",d", "evicted": ",d",
    "waiting": ",d", "mib": ",.1f", "every_id_mib": ",.1f", "map_mib": ",.1f", "own_row_share": ".1%",
    "best_share": ".1%", "modulo_share": ".1%", "seconds": ".3f",
}  # fmt: skip
WORDS = """
Each night {new:,} items come to the {first:,} of the first night, and {impressions:,} impressions are drawn: an item's
chance is Pareto ({tail}) times a decay with a half-life of {half_life:g} days. A table is named by its `max_rows`,
`min_count` and `max_age_days`; a sixteenth of its rows are `fallback_rows`. The map alone is simulated, without a
training; no model was measured.

- `rows_in_use`: rows that belong to an id, and the fallback rows. `admitted`, `evicted`: on that night. `waiting`: ids
  that were seen often enough and got no row.
- `mib`: the table, weights and optimizer states of all `max_rows`. `every_id_mib`: the same with a row for each id.
  `map_mib`: row, count and date of each id in the ranker's bundle, which grow with the ids; a served ranker has a third
  of it.
- `own_row_share`: of the *next* night's impressions, those whose id has a row of its own. `best_share`: the same if the
  rows belonged to the ids that the next night shows most. `modulo_share`: the share whose id has its row for itself in
  a table of as many rows by modulo (`table_rows`), among all ids that were seen so far.
- `seconds`: counting the night's ids and giving rows, one thread.
"""


@dataclass(frozen=True)
class Sizes:
    """Nights, items on the first, new items and impressions per night, the tables, and the nights to show."""

    nights: int
    first: int
    new: int
    impressions: int
    tables: tuple[AdmissionConfig, ...]
    shown: tuple[int, ...]


def table(max_rows: int, min_count: int, max_age_days: int) -> AdmissionConfig:
    """Return a table's settings."""
    return AdmissionConfig(
        min_count=min_count, max_age_days=max_age_days, max_rows=max_rows, fallback_rows=max_rows // 16
    )


FULL = Sizes(
    nights=100, first=200_000, new=20_000, impressions=2_000_000, shown=(1, 25, 50, 75, 100),
    tables=(table(2**17, 5, 7), table(2**17, 5, 1), table(2**17, 30, 3), table(2**15, 30, 1)),
)  # fmt: skip
QUICK = Sizes(
    nights=20, first=2000, new=200, impressions=10_000, tables=(table(2**10, 3, 3), table(2**9, 3, 1)), shown=(1, 20)
)
STEADY = 0.5
"""After this share of the nights, the share of own rows is compared with its goal: by then, ids have come and gone."""


def main() -> None:
    """Simulate, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.admission", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 nights of a small log, to see that it runs")
    parser.add_argument("--out", type=Path, help="where admission.json and .md go")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    tables = [list(simulated(sizes, settings)) for settings in sizes.tables]
    rows = [row for nights in tables for row in nights if row["night"] in sizes.shown]
    goals = [one for nights, settings in zip(tables, sizes.tables, strict=True) for one in goals_of(nights, settings)]
    words = WORDS.format(**vars(sizes), tail=TAIL, half_life=HALF_LIFE_DAYS)
    out = results_folder(arguments.out, quick=arguments.quick)
    publish("admission", "Id tables with admission", words, [*rows, *goals], COLUMNS, packages=["numpy"], out=out)


def name_of(settings: AdmissionConfig) -> str:
    """Return the name of a table."""
    return f"{settings.max_rows:,} rows, {settings.min_count} times, {settings.max_age_days} d"


class Log:
    """Items added each night, and impressions of them; deterministic for given sizes.

    Args of the constructor:
        sizes: the numbers of items and impressions.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes, total = sizes, sizes.first + sizes.new * sizes.nights
        self._popularity_I = np.random.default_rng(0).pareto(TAIL, total) + 1
        born = np.maximum(np.arange(total) - sizes.first, -1) // sizes.new + 1
        self._born_I: Integers = born.astype(np.int64)

    def num_ids(self, night: int) -> int:
        """Return the number of items that exist on a night; nights count from 0."""
        return self._sizes.first + self._sizes.new * night

    def counts(self, night: int) -> Integers:
        """Return the number of impressions of each item on a night."""
        number = self.num_ids(night)
        age_I = night - self._born_I[:number]
        chance_I: npt.NDArray[np.float64] = self._popularity_I[:number] * 0.5 ** (age_I / HALF_LIFE_DAYS)
        drawn = np.random.default_rng(night + 1).multinomial(self._sizes.impressions, chance_I / chance_I.sum())
        return np.asarray(drawn, np.int64)


def simulated(sizes: Sizes, settings: AdmissionConfig) -> Iterator[Row]:
    """Yield a row for each night."""
    log, ids = Log(sizes), IdRows.empty()
    was_seen_I = np.zeros(log.num_ids(sizes.nights), bool)
    shown_I = log.counts(0)
    for night in range(sizes.nights):
        seen = np.flatnonzero(shown_I)
        was_seen_I[seen] = True
        day = FIRST_DAY + timedelta(days=night)
        began = time.perf_counter()
        ids.grow(len(shown_I), settings.fallback_rows)
        ids.add_counts(seen, shown_I[seen], day)
        turnover = ids.admit(settings, day)
        seconds = time.perf_counter() - began
        shown_I = log.counts(night + 1)
        yield {
            "table": name_of(settings),
            "night": night + 1,
            "ids": len(ids.row_I),
            "rows_in_use": turnover.own_rows + settings.fallback_rows,
            "admitted": turnover.admitted,
            "evicted": turnover.evicted,
            "waiting": turnover.waiting,
            "mib": settings.max_rows * ROW_BYTES / MIB,
            "every_id_mib": len(ids.row_I) * ROW_BYTES / MIB,
            "map_mib": len(ids.row_I) * MAP_BYTES / MIB,
            "own_row_share": own_row_share(ids, settings, shown_I),
            "best_share": best_share(settings, shown_I),
            "modulo_share": modulo_share(np.flatnonzero(was_seen_I), settings.max_rows, shown_I),
            "seconds": seconds,
        }


def own_row_share(ids: IdRows, settings: AdmissionConfig, shown_I: Integers) -> float:
    """Return the share of impressions whose id has a row of its own; `shown_I` has the impressions of each id."""
    own = np.flatnonzero(ids.row_I >= settings.fallback_rows)
    return float(shown_I[own].sum() / shown_I.sum())


def best_share(settings: AdmissionConfig, shown_I: Integers) -> float:
    """Return the maximum share for this number of rows: that of the ids with the most impressions."""
    number = min(settings.max_rows - settings.fallback_rows, len(shown_I))
    return float(np.partition(shown_I, -number)[-number:].sum() / shown_I.sum())


def modulo_share(seen: Integers, rows: int, shown_I: Integers) -> float:
    """Return the share of impressions whose id was seen and shares its row (id modulo rows) with no other."""
    ids_R = np.bincount(seen % rows, minlength=rows)
    alone = seen[ids_R[seen % rows] == 1]
    return float(shown_I[alone].sum() / shown_I.sum())


def goals_of(nights: list[Row], settings: AdmissionConfig) -> Iterator[Row]:
    """Compare a table's nights with the goals: its bound, and a share of own rows that does not fall."""
    of_bound = np.array([settings.max_rows / row["rows_in_use"] for row in nights])
    name, (_, low, high) = name_of(settings), spread(of_bound)
    yield goal(f"{name}: bound / most rows in use", Spread(float(of_bound.min()), low, high), 1.0)
    share_N = np.array([row["own_row_share"] for row in nights[int(STEADY * len(nights)) :]])
    before_N, last_N = np.array_split(share_N, 2)
    yield goal(f"{name}: own-row share, last quarter / the one before", spread(last_N / np.median(before_N)), 0.98)


if __name__ == "__main__":
    main()
