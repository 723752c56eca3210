"""The behavioural embedding: items that share baskets more often than by chance are close together.

Positive pointwise mutual information of item pairs over baskets, factorized by a truncated singular value
decomposition; Levy and Goldberg (2014) show that this is what skip-gram with negative sampling approximates.
Each value is weighted by log(1 + baskets shared): a pair seen once has high mutual information by chance alone.
"""

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy.sparse.linalg import svds
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from sidestack.pipelines.prepare.complete_journey.config import BehaviourConfig

Ints = npt.NDArray[np.int64]


def behaviour_embeddings(
    items_P: Ints, baskets_P: Ints, num_items: int, config: BehaviourConfig
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
    """Embed items by the baskets they were bought in.

    Args:
        items_P, baskets_P: one purchase line each; an item counts once per basket.

    Returns:
        vectors_ND: float16, unit length, 0 where not valid. valid_N: items with enough baskets.
    """
    pmi_KK, kept_K = _weighted_pmi(items_P, baskets_P, num_items, config.min_baskets)
    return unit_rows(factorized(pmi_KK, config.dim, config.seed), kept_K, num_items)


def items_by_basket(
    items_P: Ints, baskets_P: Ints, num_items: int, min_baskets: int
) -> tuple[scipy.sparse.csr_matrix, Ints]:
    """Return a matrix with 1 for each item in each basket (rows by ascending id), and the items with enough baskets."""
    basket_of_P = np.unique(baskets_P, return_inverse=True)[1]
    lines_P = np.unique((basket_of_P.astype(np.int64) << 32) | items_P)
    basket_of_P, items_P = lines_P >> 32, lines_P & 0xFFFFFFFF
    kept_K = np.flatnonzero(np.bincount(items_P, minlength=num_items) >= min_baskets)
    place_N = np.full(num_items, -1)
    place_N[kept_K] = np.arange(len(kept_K))
    is_kept_P = place_N[items_P] >= 0
    cells = (basket_of_P[is_kept_P], place_N[items_P[is_kept_P]])
    shape = (int(basket_of_P.max(initial=-1)) + 1, len(kept_K))
    return scipy.sparse.csr_matrix((np.ones(len(cells[0]), np.float32), cells), shape=shape), kept_K


def factorized(matrix_KM: scipy.sparse.csr_matrix, dim: int, seed: int) -> npt.NDArray[np.float32]:
    """Return the left singular vectors of the largest singular values, scaled by the values' square roots.

    A truncated decomposition needs a matrix larger than `dim` both ways: for a smaller one all rows are 0.
    """
    if min(matrix_KM.shape) <= dim:
        return np.zeros((matrix_KM.shape[0], dim), np.float32)
    start = np.random.default_rng(seed).standard_normal(min(matrix_KM.shape)).astype(np.float32)
    # One thread: the last bits of a multi-threaded product depend on the number of cores.
    with threadpool_limits(1, user_api="blas"):
        left_KD, values_D, _ = svds(matrix_KM, dim, v0=start, tol=1e-3)
    largest_D = np.abs(left_KD).argmax(axis=0)
    signs_D = np.sign(left_KD[largest_D, np.arange(dim)])  # a singular vector's sign is free: fix it
    return np.asarray(left_KD * signs_D * np.sqrt(values_D), np.float32)


def unit_rows(
    found_KD: npt.NDArray[np.float32], places_K: Ints, num_rows: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
    """Scale vectors to unit length and put them in a table of rows; vectors of length 0 are left out.

    Returns:
        vectors_ND: float16, 0 where not valid. valid_N: rows with a vector.
    """
    vectors_ND = np.zeros((num_rows, found_KD.shape[1]), np.float16)
    valid_N = np.zeros(num_rows, bool)
    norms_K = np.linalg.norm(found_KD, axis=1)
    places_K, found_KD, norms_K = (part[norms_K > 0] for part in (places_K, found_KD, norms_K))
    vectors_ND[places_K] = (found_KD / norms_K[:, None]).astype(np.float16)
    valid_N[places_K] = True
    return vectors_ND, valid_N


def _weighted_pmi(
    items_P: Ints, baskets_P: Ints, num_items: int, min_baskets: int
) -> tuple[scipy.sparse.csr_matrix, Ints]:
    """Return log(1 + n(i, j)) max(0, log p(i, j) / (p(i) p(j))) for items with enough baskets, and these items."""
    bought_BK, kept_K = items_by_basket(items_P, baskets_P, num_items, min_baskets)
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
