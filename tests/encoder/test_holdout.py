"""The hold-out split: a fixed function of item_id, with the requested share."""

import numpy as np
import pytest

from sidestack.encoder.holdout import held_out


def splitmix64(x: int) -> int:
    """Return the hash as published (Steele, Lea, Flood 2014), computed with Python integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_hash_is_splitmix64() -> None:
    ids_N = np.array([0, 1, 2, 92_330, 2**62])
    expected = [splitmix64(int(i)) < 2**64 // 4 for i in ids_N]
    assert held_out(ids_N, 0.25).tolist() == expected
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator, seed 0


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_held_out_share_is_the_requested_share(share: float) -> None:
    assert held_out(np.arange(100_000), share).mean() == pytest.approx(share, abs=0.005)


def test_held_out_items_do_not_depend_on_other_items() -> None:
    few, many = held_out(np.arange(1000), 0.1), held_out(np.arange(50_000), 0.1)
    assert np.array_equal(few, many[:1000])
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(held_out(order, 0.1), few[order])
    assert not (held_out(np.arange(50_000), 0.05) & ~many).any()
