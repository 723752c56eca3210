"""Quantizers fitted by faiss: residual k-means, product quantization, ITQ, top-k k-means."""

from typing import Any

import faiss
import numpy as np
import pytest
import torch

from sidestack.encoder.quantizers import ItqConfig, ProductConfig, ResidualKmeansConfig, TopkKmeansConfig
from sidestack.encoder.quantizers.clustering import itq_rotation, kmeans
from sidestack.encoder.quantizers.itq import Itq
from sidestack.encoder.quantizers.topk_kmeans import TopkKmeans
from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError
from tests.encoder.quantizers.kinds import started, vectors


def test_kmeans_converges_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Every centroid is the mean of its nearest vectors, up to the error that 25 rounds leave."""
    x_NM = vectors(3000)
    centroids_KM = kmeans(x_NM, 20, torch.Generator().manual_seed(0))
    owner_N = torch.cdist(x_NM, centroids_KM).argmin(1)
    means_KM = torch.stack([x_NM[owner_N == k].mean(0) for k in range(20)])
    assert float((means_KM - centroids_KM).norm() / centroids_KM.norm()) < 0.02
    kmeans(x_NM[:50], 40, torch.Generator().manual_seed(0))
    assert capfd.readouterr() == ("", "")


def test_kmeans_restores_the_thread_count_of_faiss() -> None:
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        kmeans(vectors(200), 4, torch.Generator().manual_seed(0))
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


def test_residual_kmeans_error_is_close_to_faiss() -> None:
    h_BH = vectors(4096)
    ours = ResidualKmeansConfig(codes=16, depth=3, group_dim=8, beam=4).build()
    ours.start(h_BH, torch.Generator().manual_seed(0))
    theirs = faiss.ResidualQuantizer(8, 3, 4)
    theirs.train_type = faiss.ResidualQuantizer.Train_default
    theirs.max_beam_size = 4
    x = h_BH.numpy()
    theirs.train(x)
    error = float((h_BH - ours.decode(ours.encode(h_BH))).square().mean())
    reference = float(np.square(x - theirs.decode(theirs.compute_codes(x))).mean())
    assert error < 1.1 * reference


def test_product_quantization_error_is_close_to_faiss() -> None:
    h_BH = vectors(4096)
    ours = ProductConfig(codes=16, groups=4, group_dim=2).build()
    ours.start(h_BH, torch.Generator().manual_seed(0))
    theirs: Any = faiss.ProductQuantizer(8, 4, 4)
    x = h_BH.numpy()
    theirs.train(x)
    error = float((h_BH - ours.decode(ours.encode(h_BH))).square().mean())
    assert error == pytest.approx(float(np.square(x - theirs.decode(theirs.compute_codes(x))).mean()), rel=0.05)


def test_itq_rotation_minimizes_the_error_of_signs() -> None:
    """Corners of a rotated cube have no principal axis: 50 rounds reach the noise of 0.01, random axes exceed 0.2."""
    generator = torch.Generator().manual_seed(0)
    cube_3H = torch.linalg.qr(torch.randn(8, 3, generator=generator)).Q.T
    corners_N3 = torch.randint(2, (4096, 3), generator=generator) * 2.0 - 1
    h_NH = corners_N3 @ cube_3H + 0.1 * torch.randn(4096, 8, generator=generator)
    losses = []
    for seed in range(8):
        axes_3H = itq_rotation(h_NH - h_NH.mean(0), 3, torch.Generator().manual_seed(seed))
        assert torch.allclose(axes_3H @ axes_3H.T, torch.eye(3), atol=1e-5)
        z_N3 = h_NH @ axes_3H.T
        losses.append(float((z_N3 - z_N3.sign()).square().mean()))
    assert min(losses) == pytest.approx(0.1**2, rel=0.2)
    assert sum(losses) / len(losses) < 0.08


def test_itq_bits_are_signs_of_projections_and_steps_are_optimal() -> None:
    itq, h_BH = started("itq")
    assert isinstance(itq, Itq)
    z_BN = (h_BH - itq.mean_H) @ itq.axes_NH.T
    assert torch.equal(itq.encode(h_BH), (z_BN > 0).long())
    error = (h_BH - itq.decode(itq.encode(h_BH))).square().mean()
    for factor in (0.98, 1.02):
        itq.step_N *= factor
        assert (h_BH - itq.decode(itq.encode(h_BH))).square().mean() > error
        itq.step_N /= factor


def test_topk_digits_are_the_nearest_centroids_in_order_of_distance() -> None:
    quantizer, h_BH = started("topk_kmeans")
    assert isinstance(quantizer, TopkKmeans)
    distance_BC = torch.cdist(h_BH.double(), quantizer.centroids_CH.double())
    digits_BN = quantizer.encode(h_BH)
    assert torch.equal(digits_BN, distance_BC.argsort(1)[:, :5])
    assert torch.equal(quantizer.decode(digits_BN), quantizer.centroids_CH[distance_BC.argmin(1)])
    nothing_BN = torch.zeros_like(digits_BN, dtype=torch.bool)
    assert not quantizer.decode(digits_BN, nothing_BN).any()


@pytest.mark.parametrize(
    ("config", "settings", "rule"),
    [
        (ItqConfig, {"digits": 9, "latent_dim": 8}, "digits 9 must be at most latent_dim 8"),
        (TopkKmeansConfig, {"clusters": 4, "k": 5}, "k 5 must be at most clusters 4"),
        (ProductConfig, {"depth": 2}, "unknown key"),
    ],
)
def test_wrong_settings_are_refused(config: type, settings: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse(config, settings, "quantizer")
