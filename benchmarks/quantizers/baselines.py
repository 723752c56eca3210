"""faiss's own quantizers, at 8 bits a code, behind the same interface as ours."""

import time
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

MOST_TRAINING_ROWS = 131_072
"""Maximum number of training rows for faiss's quantizers, 512 per codeword; our encoder trains on all rows."""


class FaissCoder:
    """A trained quantizer of faiss."""

    radix = 256
    centre: float | None = None
    steps: tuple[float, ...] = ()
    keeps_length = True

    def __init__(self, quantizer: Any, prefixes: tuple[int, ...] = (), rotation: Any = None, padding: int = 0) -> None:
        """Wrap a trained quantizer.

        Args:
            quantizer: with 8 bits per code. prefixes: numbers of leading codes that can be decoded alone.
            rotation: a linear map before it. padding: number of zeros to append to vectors.
        """
        self.quantizer = quantizer
        self.prefixes = prefixes
        self.rotation = rotation
        self.padding = padding

    def encode(self, x_ND: Vectors) -> Ids:
        """Return the codes, [N, digits]."""
        x_ND = padded(x_ND, self.padding)
        if self.rotation is not None:
            x_ND = self.rotation.apply(x_ND)
        codes_NK: Ids = self.quantizer.compute_codes(x_ND).astype(np.int64)
        return codes_NK

    def decode(self, digits_NK: Ids, prefix: int | None = None) -> Vectors:
        """Decode codes, or only the `prefix` leading ones, to vectors."""
        if prefix is not None and prefix < digits_NK.shape[1]:
            return self._sum_of_codewords(digits_NK[:, :prefix])
        y_ND = self.quantizer.decode(np.ascontiguousarray(digits_NK.astype(np.uint8)))
        if self.rotation is not None:
            y_ND = self.rotation.reverse_transform(y_ND)
        decoded_ND: Vectors = y_ND[:, : y_ND.shape[1] - self.padding]
        return decoded_ND

    def _sum_of_codewords(self, digits_NK: Ids) -> Vectors:
        """Decode an additive code here, because faiss decodes only whole codes."""
        words = faiss.vector_to_array(self.quantizer.codebooks).reshape(-1, self.quantizer.d)
        rows_NK = digits_NK + np.arange(digits_NK.shape[1]) * self.radix
        total_ND: Vectors = words[rows_NK].sum(1)
        return total_ND


def padded(x_ND: Vectors, zeros: int) -> Vectors:
    """Append columns of zeros: product quantizers need a multiple of their number of codes."""
    return np.ascontiguousarray(np.pad(x_ND, ((0, 0), (0, zeros))))


def trained(name: str, codes: int, training_ND: Vectors, seed: int) -> tuple[FaissCoder, float]:
    """Train a faiss quantizer on at most `MOST_TRAINING_ROWS` rows, in an order drawn from the seed.

    Args:
        name: pq, opq, rq_beam<n> or lsq. codes: number of codes of 8 bits each.
        training_ND: unit vectors. seed: of the order, and of faiss's own generators where they can be seeded.

    Returns:
        the quantizer, and the seconds of training.
    """
    order_N = np.random.default_rng(seed).permutation(len(training_ND))[:MOST_TRAINING_ROWS]
    x_ND = training_ND[order_N]
    started = time.perf_counter()
    if name.startswith("rq_beam"):
        coder = _residual(x_ND, codes, seed, beam=int(name.removeprefix("rq_beam")))
    else:
        coder = {"pq": _product, "opq": _rotated_product, "lsq": _local_search}[name](x_ND, codes, seed)
    return coder, time.perf_counter() - started


def _product(x_ND: Vectors, codes: int, seed: int) -> FaissCoder:
    padding = -x_ND.shape[1] % codes
    return FaissCoder(_trained_pq(padded(x_ND, padding), codes, seed), padding=padding)


def _rotated_product(x_ND: Vectors, codes: int, seed: int) -> FaissCoder:
    padding = -x_ND.shape[1] % codes
    wide_ND = padded(x_ND, padding)
    rotation = faiss.OPQMatrix(wide_ND.shape[1], codes)
    inner = _pq(wide_ND.shape[1], codes, seed)
    rotation.pq = inner  # OPQ alternates with it but holds no reference: `inner` must outlive the training
    rotation.train(wide_ND)
    return FaissCoder(_trained_pq(rotation.apply(wide_ND), codes, seed), rotation=rotation, padding=padding)


def _trained_pq(x_ND: Vectors, codes: int, seed: int) -> Any:
    quantizer = _pq(x_ND.shape[1], codes, seed)
    quantizer.train(x_ND)
    return quantizer


def _pq(dim: int, codes: int, seed: int) -> Any:
    quantizer = faiss.ProductQuantizer(dim, codes, 8)
    quantizer.cp.seed = seed + 1
    quantizer.cp.min_points_per_centroid = 1  # no warnings on a small corpus
    return quantizer


def _residual(x_ND: Vectors, codes: int, seed: int, beam: int) -> FaissCoder:
    quantizer = faiss.ResidualQuantizer(x_ND.shape[1], codes, 8)
    quantizer.max_beam_size = beam
    quantizer.cp.seed = seed + 1
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(x_ND)
    return FaissCoder(quantizer, prefixes=tuple(range(1, codes)))


def _local_search(x_ND: Vectors, codes: int, seed: int) -> FaissCoder:
    quantizer = faiss.LocalSearchQuantizer(x_ND.shape[1], codes, 8)
    quantizer.random_seed = seed + 1
    quantizer.train(x_ND)
    return FaissCoder(quantizer)
