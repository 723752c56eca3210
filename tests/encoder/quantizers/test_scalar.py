"""The scalar quantizer, compared with figures from the literature and from shared/notes."""

import pytest
import torch

from sidestack.encoder.quantizers.scalar import best_step, centred_levels, normal_mse, thresholds_and_values
from sidestack.encoder.sid.spec import Bound


@pytest.mark.parametrize(("levels", "mse"), [(3, 0.191), (8, 0.0376), (64, 0.0010)])
def test_mse_on_the_normal_distribution_matches_the_literature(levels: int, mse: float) -> None:
    thresholds, values = thresholds_and_values(levels, "clamp")
    step = best_step(levels, "clamp")
    assert normal_mse(step * thresholds, step * values) == pytest.approx(mse, rel=0.06)


@pytest.mark.parametrize(
    ("levels", "even", "centroids"), [(3, 0.194, 0.1902), (8, 0.0648, 0.0375), (64, 0.0041, 0.0007)]
)
def test_mse_of_squashed_cells_matches_the_notes_and_is_lower_with_centroids(
    levels: int, even: float, centroids: float
) -> None:
    """The notes' tanh figures use values even on the squashed line, in the best unit; centroids avoid that loss."""
    middles = (centred_levels(levels)[1:] + centred_levels(levels)[:-1]) / (levels - 1)
    found = min(
        normal_mse(unit * torch.atanh(middles), unit * centred_levels(levels) / ((levels - 1) / 2))
        for unit in torch.arange(0.5, 6, 0.01).tolist()
    )
    assert found == pytest.approx(even, rel=0.01)
    for bound in ("tanh", "ifsq"):
        assert normal_mse(*thresholds_and_values(levels, bound)) == pytest.approx(centroids, abs=6e-5)


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
@pytest.mark.parametrize("levels", [2, 3, 8, 64, 256])
def test_values_lie_in_their_cells_and_are_symmetric(levels: int, bound: Bound) -> None:
    thresholds, values = thresholds_and_values(levels, bound)
    assert bool((values[1:] > thresholds).all()) and bool((values[:-1] < thresholds).all())
    assert torch.allclose(values, -values.flip(0))


def test_best_step_is_the_lloyd_max_step() -> None:
    assert best_step(3, "clamp") == pytest.approx(1.224, abs=1e-3)
    assert best_step(2, "clamp") / 2 == pytest.approx((2 / torch.pi) ** 0.5, abs=1e-3)


def test_levels_are_symmetric_and_half_integers_when_even() -> None:
    assert centred_levels(3).tolist() == [-1, 0, 1]
    assert centred_levels(4).tolist() == [-1.5, -0.5, 0.5, 1.5]


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
@pytest.mark.parametrize("levels", [2, 3, 8])
def test_closed_form_error_matches_a_sample(bound: Bound, levels: int) -> None:
    thresholds, values = thresholds_and_values(levels, bound)
    x_N = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (x_N - values[torch.bucketize(x_N, thresholds)]).square().mean()
    assert normal_mse(thresholds, values) == pytest.approx(float(error), rel=0.02)
