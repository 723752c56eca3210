"""The behavioural embedding: items that share baskets more often than chance lie close together.

Positive pointwise mutual information of item pairs over baskets, factorized by a truncated singular value
decomposition; Levy and Goldberg (2014) show that this is what skip-gram with negative sampling approximates.
Each value is weighted by log(1 + baskets shared): a pair seen once has a high information by chance alone.
"""

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy.sparse.linalg import svds
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipelines.prepare.config import BehaviourConfig

Ints = npt.NDArray[np.int64]


def behaviour_embeddings(
    items_P: Ints, baskets_P: Ints, num_items: int, config: BehaviourConfig
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
    """Embed items by the baskets they were bought in.

    Args:
        items_P, baskets_P: one purchase line each; an item counts once a basket.

    Returns:
        vectors_ND: float16, unit length, 0 where not valid. valid_N: items with enough baskets.
    """
    vectors_ND = np.zeros((num_items, config.dim), np.float16)
    valid_N = np.zeros(num_items, bool)
    pmi_KK, kept_K = _weighted_pmi(items_P, baskets_P, num_items, config.min_baskets)
    if len(kept_K) > config.dim:  # a truncated decomposition has fewer dimensions than the matrix
        found_KD = _factorized(pmi_KK, config)
        norms_K = np.linalg.norm(found_KD, axis=1)
        kept_K, found_KD, norms_K = (part[norms_K > 0] for part in (kept_K, found_KD, norms_K))
        vectors_ND[kept_K] = (found_KD / norms_K[:, None]).astype(np.float16)
        valid_N[kept_K] = True
    return vectors_ND, valid_N


def _weighted_pmi(
    items_P: Ints, baskets_P: Ints, num_items: int, min_baskets: int
) -> tuple[scipy.sparse.csr_matrix, Ints]:
    """Give log(1 + n(i, j)) max(0, log p(i, j) / (p(i) p(j))) of the items with enough baskets, and these items."""
    basket_of_P = np.unique(baskets_P, return_inverse=True)[1]
    lines_P = np.unique((basket_of_P.astype(np.int64) << 32) | items_P)
    basket_of_P, items_P = lines_P >> 32, lines_P & 0xFFFFFFFF
    kept_K = np.flatnonzero(np.bincount(items_P, minlength=num_items) >= min_baskets)
    place_N = np.full(num_items, -1)
    place_N[kept_K] = np.arange(len(kept_K))
    is_kept_P = place_N[items_P] >= 0
    cells = (basket_of_P[is_kept_P], place_N[items_P[is_kept_P]])
    shape = (int(basket_of_P.max(initial=-1)) + 1, len(kept_K))
    bought_BK = scipy.sparse.csr_matrix((np.ones(len(cells[0]), np.float32), cells), shape=shape)
    together_KK = (bought_BK.T @ bought_BK).tocoo()
    return _pmi_of_counts(together_KK), kept_K


def _pmi_of_counts(counts_KK: scipy.sparse.coo_matrix) -> scipy.sparse.csr_matrix:
    pair = counts_KK.row != counts_KK.col
    rows, columns, counts = counts_KK.row[pair], counts_KK.col[pair], counts_KK.data[pair].astype(np.float64)
    margin_K = np.bincount(rows, counts, counts_KK.shape[0])
    pmi = np.log(counts * counts.sum() / (margin_K[rows] * margin_K[columns]))
    above = pmi > 0
    values = (np.log1p(counts[above]) * pmi[above]).astype(np.float32)
    return scipy.sparse.csr_matrix((values, (rows[above], columns[above])), shape=counts_KK.shape)


def _factorized(pmi_KK: scipy.sparse.csr_matrix, config: BehaviourConfig) -> npt.NDArray[np.float32]:
    start_K = np.random.default_rng(config.seed).standard_normal(pmi_KK.shape[0]).astype(np.float32)
    # One thread: the sums of a threaded product depend on the number of cores, and so would the last bits.
    with threadpool_limits(1, user_api="blas"):
        left_KD, values_D, _ = svds(pmi_KK, config.dim, v0=start_K, tol=1e-3)
    largest_D = np.abs(left_KD).argmax(axis=0)
    signs_D = np.sign(left_KD[largest_D, np.arange(config.dim)])  # a singular vector's sign is free: fix it
    return np.asarray(left_KD * signs_D * np.sqrt(values_D), np.float32)
