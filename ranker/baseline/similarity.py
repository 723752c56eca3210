"""Similarity of an item to the history before it, by an embedding."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Histories:
    """The histories of R requests, with T entries in total, and the N rows that share them.

    Attributes:
        entries_T: item ids, oldest first. lengths_R: entries of each.
        request_N: the request of each row.
    """

    entries_T: Integers
    lengths_R: Integers
    request_N: Integers

    def newest(self) -> Integers:
        """Return the newest entry of each request, int64 [R]; -1 where it has none."""
        ends_R = np.cumsum(self.lengths_R)
        padded = np.append(self.entries_T, -1)
        newest_R: Integers = padded[np.where(self.lengths_R > 0, ends_R - 1, -1)]
        return newest_R


class Similarity:
    """Cosines of one embedding.

    Args:
        embeddings_IE: float16, a row per item, zeros where an item has none; normalized to unit length in place.
    """

    def __init__(self, embeddings_IE: NDArray[np.float16]) -> None:
        lengths_I = np.sqrt(np.einsum("ie,ie->i", embeddings_IE, embeddings_IE, dtype=np.float32))
        np.divide(embeddings_IE, np.where(lengths_I > 0, lengths_I, 1)[:, None], out=embeddings_IE, casting="unsafe")
        self._units_IE = embeddings_IE

    def to_newest(self, items_N: Integers, histories: Histories) -> Floats:
        """Return each item's cosine to its history's newest entry; NaN where either has no embedding."""
        newest_R = histories.newest()
        newest_RE = self._units(newest_R)
        newest_RE[newest_R < 0] = 0
        return self._cosine(items_N, newest_RE, histories.request_N)

    def to_mean(self, items_N: Integers, histories: Histories) -> Floats:
        """Return each item's cosine to the mean of its history's unit vectors; NaN where either has none."""
        lengths_R = histories.lengths_R
        sums_RE = np.zeros((len(lengths_R), self._units_IE.shape[1]), np.float32)
        is_held_R = lengths_R > 0
        if is_held_R.any():
            starts_R = np.cumsum(lengths_R) - lengths_R
            sums_RE[is_held_R] = np.add.reduceat(self._units(histories.entries_T), starts_R[is_held_R])
        norms_R = np.linalg.norm(sums_RE, axis=1)
        sums_RE /= np.where(norms_R > 0, norms_R, 1)[:, None]
        return self._cosine(items_N, sums_RE, histories.request_N)

    def _units(self, items_N: Integers) -> Floats:
        return self._units_IE[items_N].astype(np.float32)

    def _cosine(self, items_N: Integers, others_RE: Floats, request_N: Integers) -> Floats:
        items_NE = self._units(items_N)
        has_R = np.any(others_RE != 0, axis=1)
        has_both_N = np.any(items_NE != 0, axis=1) & has_R[request_N]
        cosine_N = np.einsum("ne,ne->n", items_NE, others_RE[request_N])
        return np.where(has_both_N, cosine_N, np.nan).astype(np.float32)
