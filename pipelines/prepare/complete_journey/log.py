"""The raw log as arrays, and a time index for counts before a moment."""

from dataclasses import dataclass, replace
from datetime import date
from typing import Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

DAY = 86_400
"""Seconds in a day."""
EPOCH = date(1970, 1, 1)
FIRST_MONDAY = date(2017, 1, 2)
"""The first day of week 2; week 1 is the Sunday before."""
_TIME_BITS = 32


def midnight(day: date) -> int:
    """Return the second at which a day begins, on the log's own clock."""
    return (day - EPOCH).days * DAY


def week_of(times_N: Ints) -> Ints:
    """Return the week numbers of times: weeks run from Monday to Sunday, local time."""
    return (times_N - midnight(FIRST_MONDAY)) // (7 * DAY) + 2


@dataclass(frozen=True)
class RawLog:
    """Purchase lines, ordered by household, time and item.

    Attributes:
        users_P: row numbers in the users table. items_P: row numbers in the items table.
        times_P: seconds since 1970 on the stores' local clock, equal for all lines of a basket.
        baskets_P: the source's basket ids. stores_P: the source's store ids.
        num_items: rows of the items table.
        end: the second up to which (exclusive) the log is complete; later events are unknown.
    """

    users_P: Ints
    items_P: Ints
    times_P: Ints
    baskets_P: Ints
    stores_P: Ints
    num_items: int
    end: int

    @classmethod
    def ordered(
        cls, users_P: Ints, items_P: Ints, times_P: Ints, baskets_P: Ints, stores_P: Ints, num_items: int, end: int
    ) -> Self:
        """Build a log from lines in any order."""
        order = np.lexsort((baskets_P, items_P, times_P, users_P))
        return cls(
            users_P=users_P[order],
            items_P=items_P[order],
            times_P=times_P[order],
            baskets_P=baskets_P[order],
            stores_P=stores_P[order],
            num_items=num_items,
            end=end,
        )

    def keep(self, lines_P: npt.NDArray[np.bool_]) -> "RawLog":
        """Return the log with the marked lines only."""
        return replace(
            self,
            users_P=self.users_P[lines_P],
            items_P=self.items_P[lines_P],
            times_P=self.times_P[lines_P],
            baskets_P=self.baskets_P[lines_P],
            stores_P=self.stores_P[lines_P],
        )

    def cut(self, end: int) -> "RawLog":
        """Return the log as it was known at `end`: the lines before it, with follow-up until then."""
        return replace(self.keep(self.times_P < end), end=min(end, self.end))


@dataclass(frozen=True)
class Promotions:
    """Promotions: one row for each store, week and product, with its slots.

    Attributes:
        keys_K: week, store and item in one integer (`promotion_key`), ascending, each once.
        starts_K1: the slots of key k are rows starts_K1[k] to starts_K1[k + 1] of the two columns below.
        displays_M: where the product was displayed. mailers_M: where in the mailer it was.
    """

    keys_K: Ints
    starts_K1: Ints
    displays_M: Ints
    mailers_M: Ints

    @classmethod
    def ordered(cls, keys_M: Ints, displays_M: Ints, mailers_M: Ints) -> Self:
        """Index promotion rows in any order; a key may have several slots."""
        order = np.lexsort((mailers_M, displays_M, keys_M))
        keys_K, starts_K = np.unique(keys_M[order], return_index=True)
        return cls(keys_K, np.append(starts_K, len(order)), displays_M[order], mailers_M[order])


def promotion_key(weeks_N: Ints, stores_N: Ints, items_N: Ints) -> Ints:
    """Pack week, store and item into one integer, week in the highest bits.

    Store ids must be below 2^20 and item ids below 2^32.
    """
    return (weeks_N << 52) | (stores_N << 32) | items_N


class Timeline:
    """Index of moments by id, for counting an id's moments before a time.

    Args:
        ids_P: non-negative, below 2^31. times_P: seconds, non-negative, below 2^32.
    """

    def __init__(self, ids_P: Ints, times_P: Ints) -> None:
        self._keys_P = np.sort(_keyed(ids_P, times_P))

    def position(self, ids_N: Ints, times_N: Ints) -> Ints:
        """Return the position, in the order of (id, time), of the first moment at or after each time."""
        return np.searchsorted(self._keys_P, _keyed(ids_N, times_N))

    def before(self, ids_N: Ints, times_N: Ints) -> Ints:
        """Count the id's moments strictly before each time."""
        return self.position(ids_N, times_N) - self.position(ids_N, np.zeros_like(times_N))

    def within(self, ids_N: Ints, first_N: Ints, end_N: Ints) -> Ints:
        """Count the id's moments from first (inclusive) to end (exclusive)."""
        return self.position(ids_N, end_N) - self.position(ids_N, np.maximum(first_N, 0))

    def last_before(self, ids_N: Ints, times_N: Ints) -> Ints:
        """Return the id's newest moment strictly before each time; -1 if there is none."""
        return self._moment(self.position(ids_N, times_N) - 1, self.before(ids_N, times_N) > 0)

    def first_before(self, ids_N: Ints, times_N: Ints) -> Ints:
        """Return the id's first moment if it is strictly before the time, else -1."""
        return self._moment(self.position(ids_N, np.zeros_like(times_N)), self.before(ids_N, times_N) > 0)

    def _moment(self, positions_N: Ints, exists_N: npt.NDArray[np.bool_]) -> Ints:
        moments_N = np.full(len(positions_N), -1)
        moments_N[exists_N] = self._keys_P[positions_N[exists_N]] & ((1 << _TIME_BITS) - 1)
        return moments_N


def _keyed(ids_N: Ints, times_N: Ints) -> Ints:
    return (ids_N.astype(np.int64) << _TIME_BITS) | times_N
