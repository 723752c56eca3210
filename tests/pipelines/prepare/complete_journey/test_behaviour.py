"""The behavioural embedding: equal to plain counting, and independent of the order of lines and of threads."""

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from sidestack.pipelines.prepare.complete_journey.behaviour import _weighted_pmi, behaviour_embeddings
from sidestack.pipelines.prepare.complete_journey.config import BehaviourConfig

NUM_ITEMS = 60
CONFIG = BehaviourConfig(dim=4, min_baskets=3)


def grouped_lines(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return lines of baskets that have items of one of four groups; the last items are bought once or never."""
    rng = np.random.default_rng(seed)
    baskets_P = np.repeat(np.arange(400), 5)
    items_P = 4 * rng.integers(12, size=len(baskets_P)) + baskets_P % 4
    return np.append(items_P, NUM_ITEMS - 2), np.append(baskets_P, 7)


def test_pmi_equals_plain_counting() -> None:
    items_P, baskets_P = grouped_lines()
    baskets = [set(items_P[baskets_P == basket].tolist()) for basket in np.unique(baskets_P)]
    found_KK, kept_K = _weighted_pmi(items_P, baskets_P, NUM_ITEMS, 3)
    assert kept_K.tolist() == [item for item in range(NUM_ITEMS) if sum(item in basket for basket in baskets) >= 3]
    pairs = np.array([[sum({a, b} <= basket for basket in baskets) * (a != b) for b in kept_K] for a in kept_K], float)
    margins = pairs.sum(axis=1)
    with np.errstate(divide="ignore"):
        expected = np.maximum(0, np.log(pairs * pairs.sum() / np.outer(margins, margins))) * np.log1p(pairs)
    np.testing.assert_allclose(found_KK.toarray(), expected, atol=1e-5)


def test_embeddings_of_items_that_share_baskets_are_close() -> None:
    vectors_ND, valid_N = behaviour_embeddings(*grouped_lines(), NUM_ITEMS, CONFIG)
    assert valid_N.tolist() == [True] * 48 + [False] * 12
    assert (vectors_ND[~valid_N] == 0).all()
    unit_KD = vectors_ND[valid_N].astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(unit_KD, axis=1), 1, atol=2e-3)
    cosines_KK = unit_KD @ unit_KD.T
    same = np.equal.outer(np.arange(48) % 4, np.arange(48) % 4)
    assert cosines_KK[same].min() > 0.9
    assert cosines_KK[~same].max() < 0.5


@pytest.mark.parametrize("threads", [1, 4])
def test_same_bytes_for_any_order_of_lines_and_any_number_of_threads(threads: int) -> None:
    items_P, baskets_P = grouped_lines()
    order = np.random.default_rng(1).permutation(len(items_P))
    with threadpool_limits(threads, user_api="blas"):
        again = behaviour_embeddings(items_P[order], baskets_P[order], NUM_ITEMS, CONFIG)
    assert again[0].tobytes() == behaviour_embeddings(items_P, baskets_P, NUM_ITEMS, CONFIG)[0].tobytes()


def test_too_few_items_give_no_embedding() -> None:
    items_P, baskets_P = grouped_lines()
    _, valid_N = behaviour_embeddings(items_P[:2], baskets_P[:2], NUM_ITEMS, CONFIG)
    assert not valid_N.any()
    _, valid_N = behaviour_embeddings(items_P[:0], baskets_P[:0], NUM_ITEMS, CONFIG)
    assert not valid_N.any()
