"""Quality of a code: losses of the decoded vectors, recall of neighbours, use of the digits."""

import time
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import torch

from sidestack.encoder.evaluation import codebook_use
from sidestack.encoder.quantizers.usage import count_values

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

RECALL_AT = (20, 50, 100)
_SCALE_ROWS = 4096
_VALIDATION_ROWS = 8192
"""Maximum number of validation rows to evaluate; a searched code takes milliseconds per row."""


class Coder(Protocol):
    """A trained quantizer, of ours or of faiss: vectors to digits and back.

    Attributes:
        radix: values a digit can take.
        prefixes: numbers of leading digits that are a coarser code, except the whole code; may be empty.
        centre: the level with value 0 if digits are levels on lines, which SIDE may unpack; else None.
        steps: a step for every digit, if the code publishes them.
        keeps_length: whether decoded vectors are meant to have the length of the encoded vectors.
    """

    radix: int
    prefixes: tuple[int, ...]
    centre: float | None
    steps: tuple[float, ...]
    keeps_length: bool

    def encode(self, x_ND: Vectors) -> Ids:
        """Return the digits, [N, digits]."""

    def decode(self, digits_NK: Ids, prefix: int | None = None) -> Vectors:
        """Decode digits, or only the `prefix` leading ones, to vectors [N, D]."""


class Rows(Protocol):
    """The rows of a corpus that `measure` uses; see `corpora.Corpus`."""

    @property
    def training(self) -> Vectors: ...  # noqa: D102
    @property
    def validation(self) -> Vectors: ...  # noqa: D102
    @property
    def test(self) -> Vectors: ...  # noqa: D102
    @property
    def queries(self) -> Ids: ...  # noqa: D102
    @property
    def truth(self) -> Ids: ...  # noqa: D102


def measure(coder: Coder, corpus: Rows) -> dict[str, Any]:
    """Measure a trained quantizer on the test rows.

    Args:
        coder: the quantizer. corpus: unit vectors [., D], queries and their true neighbours.

    Returns:
        `cosine_loss`: mean of 1 - cos; `validation_loss`: the same on the validation rows;
        `mse`: see `scaled_mse`; `mse_as_decoded`: of the decoded vectors as they are, where they keep the length;
        `recall`, `recall_side`, `recall_side_steps`: see `recall`, for the decoded vectors, the
        centred digits, and the digits times their steps (None where the digits are not levels);
        `prefix_losses`: cosine loss by number of digits; `use`: see `use_of_digits`;
        `unique_share`: distinct codes / rows; `encoded_per_second`: test rows, after a warm-up.
    """
    coder.encode(corpus.test[:256])
    started = time.perf_counter()
    digits_NK = coder.encode(corpus.test)
    seconds = time.perf_counter() - started
    decoded_ND = coder.decode(digits_NK)
    lengths = (*coder.prefixes, digits_NK.shape[1])
    return {
        "digits": digits_NK.shape[1],
        "radix": coder.radix,
        "real_bits": digits_NK.shape[1] * float(np.log2(coder.radix)),
        "cosine_loss": cosine_loss(corpus.test, decoded_ND),
        "validation_loss": _loss_of(coder, corpus.validation[:_VALIDATION_ROWS]),
        "mse": scaled_mse(corpus.test, decoded_ND, _best_scale(coder, corpus.training)),
        "mse_as_decoded": _mse_as_decoded(corpus.test, decoded_ND) if coder.keeps_length else None,
        "recall": recall(decoded_ND, corpus),
        **_side_recalls(coder, digits_NK, corpus),
        "prefix_losses": {n: cosine_loss(corpus.test, coder.decode(digits_NK, n)) for n in lengths},
        "use": use_of_digits(digits_NK, coder.radix),
        "unique_share": len(np.unique(digits_NK, axis=0)) / len(digits_NK),
        "encoded_per_second": len(digits_NK) / seconds,
    }


def unit(x_ND: Vectors) -> Vectors:
    """Normalize vectors to unit length; zero stays zero."""
    lengths_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    unit_ND: Vectors = x_ND / np.maximum(lengths_N1, np.finfo(np.float32).tiny)
    return unit_ND


def cosine_loss(x_ND: Vectors, decoded_ND: Vectors) -> float:
    """Return the mean of 1 - cos(x, decoded) for unit vectors x."""
    return 1.0 - float((x_ND * unit(decoded_ND)).sum(1, dtype=np.float64).mean())


def scaled_mse(x_ND: Vectors, decoded_ND: Vectors, scale: float) -> float:
    """Return the mean of |x - scale * decoded / |decoded||^2, the sum over dimensions, for unit vectors x.

    The cosine loss does not determine the length of decoded vectors. So they are normalized and get one common scale,
    fitted by least squares on training rows (their mean cosine).
    """
    return float(np.square(x_ND - scale * unit(decoded_ND)).sum(1, dtype=np.float64).mean())


def _mse_as_decoded(x_ND: Vectors, decoded_ND: Vectors) -> float:
    return float(np.square(x_ND - decoded_ND).sum(1, dtype=np.float64).mean())


def _best_scale(coder: Coder, training_ND: Vectors) -> float:
    return 1.0 - _loss_of(coder, training_ND[:_SCALE_ROWS])


def _loss_of(coder: Coder, x_ND: Vectors) -> float:
    return cosine_loss(x_ND, coder.decode(coder.encode(x_ND)))


def _side_recalls(coder: Coder, digits_NK: Ids, corpus: Rows) -> dict[str, dict[str, float] | None]:
    if coder.centre is None:
        return {"recall_side": None, "recall_side_steps": None}
    side_NK = side_vectors(digits_NK, coder.centre)
    stepped = recall(side_NK * np.array(coder.steps, np.float32), corpus) if coder.steps else None
    return {"recall_side": recall(side_NK, corpus), "recall_side_steps": stepped}


def side_vectors(digits_NK: Ids, centre: float) -> Vectors:
    """Unpack digits as SIDE does: each level minus the level with value 0."""
    return (digits_NK - centre).astype(np.float32)


def recall(vectors_ND: Vectors, corpus: Rows) -> dict[str, float]:
    """Return the share of a query's true 20 among its nearest 20, 50 and 100 by cosine (paper Table 2).

    Query and corpus vectors are both decoded: a user of the code has no others.
    """
    found_QK = nearest(unit(vectors_ND), corpus.queries, max(RECALL_AT))
    return {str(k): recall_at(corpus.truth, found_QK[:, :k]) for k in RECALL_AT}


def recall_at(truth_QT: Ids, found_QK: Ids) -> float:
    """Return the share of the true neighbours found."""
    return float((truth_QT[:, :, None] == found_QK[:, None, :]).any(2).mean())


def nearest(vectors_ND: Vectors, queries_Q: Ids, number: int) -> Ids:
    """Return the rows with the greatest inner product with each query row, without itself: [Q, number], exact."""
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    index = faiss.IndexFlatIP(vectors_ND.shape[1])
    index.add(vectors_ND)
    _, found_QK = index.search(vectors_ND[queries_Q], number + 1)
    is_self_QK = found_QK == queries_Q[:, None]
    # Among many equal codes the query itself may not be found; then drop the last row.
    is_self_QK[~is_self_QK.any(1), -1] = True
    others_QK: Ids = found_QK[~is_self_QK].reshape(len(queries_Q), number).astype(np.int64)
    return others_QK


def use_of_digits(digits_NK: Ids, radix: int) -> dict[str, Any]:
    """Summarize each digit's use: `entropy_bits`, `perplexity`, `dead_levels`, one number per digit."""
    use = codebook_use(count_values(torch.from_numpy(digits_NK), radix))
    return {name: use[name] for name in ("entropy_bits", "perplexity", "dead_levels")}
