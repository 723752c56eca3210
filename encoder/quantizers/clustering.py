"""The classical fits, computed by faiss: k-means, and PCA with iterative quantization.

They run on one thread: with more, the matrix products of the assignments sum in another order, and a vector between two
centroids may be assigned to the other one. On one thread, each fit is a function of its sample and generator alone.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ITERATIONS = 25


def kmeans(x_NM: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Return the centroids [clusters, M] of a sample [N, M], on its device and in its dtype.

    If the sample has fewer vectors than clusters, the centroids are its vectors, repeated.
    """
    seed = _seed(generator)
    if len(x_NM) <= clusters:
        return x_NM[torch.arange(clusters, device=x_NM.device) % len(x_NM)]
    x = _as_numpy(x_NM)
    with _one_thread() as faiss:
        # No subsampling however many vectors there are, and no warning on stderr if there are few per centroid.
        fit = faiss.Kmeans(
            x.shape[1],
            clusters,
            niter=_ITERATIONS,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(x),
        )
        fit.train(x)
    return torch.from_numpy(fit.centroids.copy()).to(x_NM)


def itq_rotation(x_NM: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Return the axes of iterative quantization of a centred sample [N, M]: orthonormal rows [bits, M].

    The leading `bits` principal axes, rotated to minimize the error of the projections' signs.
    Source: Gong et al., the paper's [4]. faiss's own composition, ITQTransform, normalizes vectors in between, and a
    lost length cannot be decoded; so its two parts are composed here.
    """
    x = _as_numpy(x_NM)
    with _one_thread() as faiss:
        pca = faiss.PCAMatrix(x.shape[1], bits)
        pca.train(x)
        itq = faiss.ITQMatrix(bits)
        itq.seed = _seed(generator)
        itq.train(pca.apply(x))
        axes = faiss.vector_to_array(pca.A).reshape(-1, x.shape[1])[:bits]
        rotation = faiss.vector_to_array(itq.A).reshape(bits, bits)
    return torch.from_numpy(rotation @ axes).to(x_NM)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31 - 1, (1,), generator=generator))


def _as_numpy(x_NM: Tensor) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(x_NM.detach().float().cpu().numpy())


@contextlib.contextmanager
def _one_thread() -> Iterator[ModuleType]:
    import faiss  # here, so that encoding and serving do without it

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)
