"""Counter-based randomness: a draw is a pure function of its keys.

With a stateful generator every draw depends on the number of earlier draws, so cutting the log or moving a day to
another rank would change all later rows. Here a draw depends on its own keys only.
"""

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]
Key = int | npt.NDArray[np.integer]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mixed(*keys: Key) -> UInt64s:
    """Hash keys to 64 bits each (the finalizer of splitmix64, chained over the keys).

    Args:
        keys: integers or integer arrays, broadcast against each other.

    Returns:
        uint64, of the keys' broadcast shape (at least one dimension).
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        words = np.atleast_1d(np.asarray(key)).astype(np.int64).view(np.uint64)
        state = _finalized((state ^ words) + _GOLDEN)
    return state


def _finalized(words: UInt64s) -> UInt64s:
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))


def uniform(*keys: Key) -> npt.NDArray[np.float64]:
    """Return uniform draws in [0, 1) for the keys, with 53 random bits; shapes as in `mixed`."""
    return (mixed(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(limit: Key, *keys: Key) -> npt.NDArray[np.int64]:
    """Return uniform integer draws in [0, limit) for the keys; `limit` >= 1 broadcasts with them."""
    return np.floor(uniform(*keys) * limit).astype(np.int64)
