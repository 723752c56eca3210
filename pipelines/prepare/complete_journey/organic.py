"""User embeddings of organic activity: a household's purchases of unpromoted products, before the events begin.

A purchase is organic if its product was neither displayed nor in the mailer, in the store and week of the purchase. The
promotions cover every week, but not every store. Lines in a store and week without any promotion row are unknown and
left out (1.4 % of the lines). Promoted purchases are the events' clicks, so organic activity and clicks are two
surfaces of one household, as feed and ads are in "Quantizing Intent" (arXiv 2606.01396). By default, the events use no
organic purchases. The paper's sources, from poor to rich: who the user is (here the demographics in the users table),
sparse activity through a language model, and the whole activity itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse

from sidestack.pipelines.prepare.complete_journey.behaviour import factorized, items_by_basket, unit_rows
from sidestack.pipelines.prepare.complete_journey.config import OrganicConfig
from sidestack.pipelines.prepare.complete_journey.log import RawLog

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Vectors = tuple[npt.NDArray[np.float16], Bools]

TEXT, BEHAVIOUR = "organic_text_embedding", "organic_behaviour_embedding"


@dataclass(frozen=True)
class OrganicActivity:
    """User embeddings from organic activity.

    Attributes:
        embeddings: name -> vectors_UD (float16, unit length, 0 where not valid) and valid_U.
        counts: purchase lines by kind, and users with an embedding, for the log.
    """

    embeddings: Mapping[str, Vectors]
    counts: Mapping[str, int]


def organic_dims(config: OrganicConfig, text_dim: int) -> dict[str, int]:
    """Return the dimensions of the users' embeddings by name."""
    return {TEXT: text_dim, BEHAVIOUR: config.dim}


def organic_activity(
    log: RawLog,
    promoted_P: Bools,
    known_P: Bools,
    num_users: int,
    text_ND: npt.NDArray[np.float16],
    config: OrganicConfig,
) -> OrganicActivity:
    """Embed the users by their organic purchases.

    Args:
        log: the purchases before the events begin. promoted_P, known_P: as `RawFiles.promoted` returns them.
        text_ND: the items' text embeddings.
    """
    lines = log.keep(known_P & ~promoted_P)
    found = {
        TEXT: newest_text_embeddings(lines, text_ND, num_users, config.newest),
        BEHAVIOUR: purchase_embeddings(lines, num_users, config),
    }
    counts = {
        "lines": len(log.items_P),
        "lines_promoted": int(promoted_P.sum()),
        "lines_unknown": int((~known_P).sum()),
        "lines_organic": len(lines.items_P),
        **{f"users_with_{name}": int(valid_U.sum()) for name, (_, valid_U) in found.items()},
    }
    return OrganicActivity(found, counts)


def newest_text_embeddings(lines: RawLog, text_ND: npt.NDArray[np.float16], num_users: int, newest: int) -> Vectors:
    """Average the text embeddings of each user's newest purchases; without purchases there is no embedding.

    Among lines with equal times (mostly of one basket), the last in the log's order are the newest.
    """
    lines_V = np.unique(lines.users_P, return_counts=True)[1]
    from_newest_P = np.repeat(np.cumsum(lines_V), lines_V) - np.arange(len(lines.users_P))
    recent = lines.keep(from_newest_P <= newest)
    users_V, starts_V = np.unique(recent.users_P, return_index=True)
    # The sum has the mean's direction; the length is normalized anyway.
    sums_VD = np.add.reduceat(text_ND[recent.items_P].astype(np.float32), starts_V)
    return unit_rows(sums_VD, users_V, num_users)


def purchase_embeddings(lines: RawLog, num_users: int, config: OrganicConfig) -> Vectors:
    """Factorize the matrix of users' baskets by item.

    A user's row holds log(1 + baskets) log(1 + users / users who bought the item), at unit length, so that heavy buyers
    and popular items do not dominate. A user who bought none of the items with enough baskets has no embedding. If the
    matrix is too small for `config.dim`, no user has one.
    """
    bought_BK, _ = items_by_basket(lines.items_P, lines.baskets_P, lines.num_items, config.min_baskets)
    users_B = lines.users_P[np.unique(lines.baskets_P, return_index=True)[1]]
    cells = (users_B, np.arange(len(users_B)))
    of_user_UB = scipy.sparse.csr_matrix((np.ones(len(users_B), np.float32), cells), shape=(num_users, len(users_B)))
    weights_VK, users_V = _weighted((of_user_UB @ bought_BK).tocoo())
    return unit_rows(factorized(weights_VK, config.dim, config.seed), users_V, num_users)


def _weighted(baskets_UK: scipy.sparse.coo_matrix) -> tuple[scipy.sparse.csr_matrix, Ints]:
    """Weight the counts; return the rows of users with any, at unit length, and these users."""
    users_V, rows = np.unique(baskets_UK.row, return_inverse=True)
    columns, shape = baskets_UK.col, (len(users_V), baskets_UK.shape[1])
    users_K = np.bincount(columns, minlength=shape[1])
    values = np.log1p(baskets_UK.data) * np.log1p(len(users_V) / users_K)[columns]
    values /= np.sqrt(np.bincount(rows, values**2, shape[0]))[rows]
    return scipy.sparse.csr_matrix((values.astype(np.float32), (rows, columns)), shape=shape), users_V
