"""Impressions of a basket: all promoted products that were bought, and a sample of the others.

The sample depends only on the basket's id and the week's promotions, not on the rest of the log. Rates and calibration
downstream are those of the sampled log.
"""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from sidestack.pipelines.prepare.complete_journey.log import Promotions, RawLog, promotion_key, week_of
from sidestack.pipelines.prepare.hashing import below

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Impressions:
    """Impressions ordered by time, basket and item.

    Attributes:
        baskets_N: the source's basket ids: the requests. users_N, items_N: row numbers in their tables. times_N:
        seconds. stores_N: the source's store ids. clicks_N: whether the product was bought in the basket.
        promotions_N: which of the promotions' keys was shown.
    """

    baskets_N: Ints
    users_N: Ints
    items_N: Ints
    times_N: Ints
    stores_N: Ints
    clicks_N: npt.NDArray[np.bool_]
    promotions_N: Ints

    def between(self, first: int, end: int) -> "Impressions":
        """Return the impressions from `first` (inclusive) to `end` (exclusive), in seconds."""
        part = slice(*np.searchsorted(self.times_N, (first, end)))
        return Impressions(**{one.name: getattr(self, one.name)[part] for one in fields(self)})


def impressions(log: RawLog, promotions: Promotions, first: int, end: int, draws: int, seed: int) -> Impressions:
    """Return the impressions of the baskets from `first` (inclusive) to `end` (exclusive), in seconds.

    Args:
        draws: products drawn, with replacement, among those promoted in a basket's store and week.
        seed: seed of the draws.
    """
    lines = log.keep((log.times_P >= first) & (log.times_P < end))
    baskets_B, heads_B, basket_of_P = np.unique(lines.baskets_P, return_index=True, return_inverse=True)
    weeks_B, stores_B = week_of(lines.times_P[heads_B]), lines.stores_P[heads_B]

    keys_P = promotion_key(weeks_B[basket_of_P], lines.stores_P, lines.items_P)
    bought_P = np.minimum(np.searchsorted(promotions.keys_K, keys_P), max(len(promotions.keys_K) - 1, 0))
    promoted_P = promotions.keys_K[bought_P] == keys_P if len(promotions.keys_K) else np.zeros(len(keys_P), bool)
    clicked = _pair(basket_of_P[promoted_P], bought_P[promoted_P])
    shown = np.union1d(clicked, _drawn(promotions, baskets_B, weeks_B, stores_B, draws, seed))

    basket_N, promotions_N = shown >> 32, shown & 0xFFFFFFFF
    order = np.lexsort((promotions_N, baskets_B[basket_N], lines.times_P[heads_B][basket_N]))
    basket_N, promotions_N = basket_N[order], promotions_N[order]
    head_N = heads_B[basket_N]
    return Impressions(
        baskets_N=baskets_B[basket_N],
        users_N=lines.users_P[head_N],
        items_N=promotions.keys_K[promotions_N] & 0xFFFFFFFF,
        times_N=lines.times_P[head_N],
        stores_N=lines.stores_P[head_N],
        clicks_N=np.isin(shown, clicked)[order],
        promotions_N=promotions_N,
    )


def _drawn(promotions: Promotions, baskets_B: Ints, weeks_B: Ints, stores_B: Ints, draws: int, seed: int) -> Ints:
    """Draw promoted products for each basket; return pairs of basket number and promotion number."""
    none_B = np.zeros_like(stores_B)
    low_B = np.searchsorted(promotions.keys_K, promotion_key(weeks_B, stores_B, none_B))
    high_B = np.searchsorted(promotions.keys_K, promotion_key(weeks_B, stores_B + 1, none_B))
    number_B1 = (high_B - low_B)[:, None]
    picks_BD = low_B[:, None] + below(np.maximum(number_B1, 1), seed, baskets_B[:, None], np.arange(draws))
    pairs_BD = _pair(np.arange(len(baskets_B))[:, None], picks_BD)
    return np.unique(pairs_BD[np.broadcast_to(number_B1 > 0, pairs_BD.shape)])


def _pair(baskets_N: Ints, promotions_N: Ints) -> Ints:
    return (baskets_N.astype(np.int64) << 32) | promotions_N
