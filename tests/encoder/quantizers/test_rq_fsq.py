"""RQ-FSQ in both readings: `scale`, an even grid in base L, and `project`, layers with their own bases."""

import pytest
import torch

from sidestack.encoder.quantizers import RqFsqConfig
from sidestack.encoder.quantizers.rq_fsq import ProjectedRqFsq
from sidestack.encoder.sid.spec import Bound
from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError
from tests.encoder.quantizers.kinds import started, vectors


@pytest.mark.parametrize("levels", [2, 3, 4, 8])
def test_scaled_layers_are_the_digits_of_one_even_grid(levels: int) -> None:
    depth = 3
    quantizer = RqFsqConfig(levels=levels, dims=1, depth=depth).build()
    cells = levels**depth
    end = (1 + 1 / (levels - 1)) * (1 - 1e-4)  # outer border of the first layer's outermost cells
    h_B1 = torch.linspace(-end, end, 20_011)[:, None]
    digits_BN = quantizer.encode(h_B1)
    cell_B = (digits_BN * levels ** torch.arange(depth - 1, -1, -1)).sum(1)
    assert torch.equal(cell_B.unique(), torch.arange(cells)) and bool((cell_B.diff() >= 0).all())
    centres_B = quantizer.decode(digits_BN).squeeze(1)
    width = 2 * end / (1 - 1e-4) / cells
    assert torch.allclose(centres_B, (cell_B - (cells - 1) / 2) * width, atol=1e-5)
    assert float((h_B1.squeeze(1) - centres_B).abs().max()) <= width / 2 + 1e-5


def test_scaled_steps_shrink_by_the_number_of_levels() -> None:
    spec = RqFsqConfig(levels=3, dims=2, depth=3).build().sid_spec("ab")
    assert (spec.depth, spec.groups, spec.radix, spec.lines) == (3, 2, 3, 1)
    assert spec.steps == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 9, 1 / 9])


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
def test_projected_codes_round_least_squares_coordinates(bound: Bound) -> None:
    quantizer, h_BH = started("rq_fsq_project", bound=bound)
    assert isinstance(quantizer, ProjectedRqFsq)
    with torch.no_grad():  # perturb the orthogonal axes that start chooses
        noise_DNH = torch.randn(quantizer.basis_DNH.shape, generator=torch.Generator().manual_seed(0))
        quantizer.basis_DNH.add_(0.1 * noise_DNH)
    residual_BH, expected = h_BH.double(), []
    for basis_NH, offset_H in zip(quantizer.basis_DNH.double(), quantizer.offset_DH.double(), strict=True):
        z_NB = torch.linalg.lstsq(basis_NH.T, (residual_BH - offset_H).T).solution
        digits_BN = torch.bucketize(z_NB.T.contiguous(), quantizer.thresholds.double())
        residual_BH = residual_BH - offset_H - quantizer.values_L.double()[digits_BN] @ basis_NH
        expected.append(digits_BN)
    found_BN = quantizer.encode(h_BH)
    assert (found_BN == torch.cat(expected, 1)).all(1).float().mean() > 0.99
    assert len(found_BN.unique()) == 3


def test_projected_layers_reduce_the_codebook_loss() -> None:
    quantizer, _ = started("rq_fsq_project")
    h_BH = vectors(2048, seed=5) * torch.linspace(0.5, 2, 8)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.01)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = quantizer(h_BH).codebook_loss().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"dims": 4, "latent_dim": 8}, "latent_dim 8 must equal dims 4 in the reading 'scale'"),
        ({"reading": "project", "dims": 4, "latent_dim": 3}, "latent_dim 3 must be at least dims 4"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse(RqFsqConfig, settings, "quantizer")
