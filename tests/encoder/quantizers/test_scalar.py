"""The scalar quantizer against the figures of the literature and of shared/notes."""

import pytest
import torch

from encoder.quantizers.scalar import best_step, centred_levels, normal_mse, thresholds_and_values


@pytest.mark.parametrize(("levels", "mse"), [(3, 0.191), (8, 0.0376), (64, 0.0010)])
def test_mse_on_the_normal_law(levels: int, mse: float) -> None:
    thresholds, values = thresholds_and_values(levels, "clamp")
    step = best_step(levels, "clamp")
    clamp = normal_mse(step * thresholds, step * values)
    assert clamp == pytest.approx(mse, rel=0.06)
    squashed = {bound: normal_mse(*thresholds_and_values(levels, bound)) for bound in ("ifsq", "tanh")}
    assert clamp < squashed["ifsq"]
    assert clamp < squashed["tanh"]


def test_the_best_ternary_step_is_lloyd_max() -> None:
    assert best_step(3, "clamp") == pytest.approx(1.224, abs=1e-3)
    assert best_step(2, "clamp") / 2 == pytest.approx((2 / torch.pi) ** 0.5, abs=1e-3)


def test_levels_are_symmetric_and_half_integers_when_even() -> None:
    assert centred_levels(3).tolist() == [-1, 0, 1]
    assert centred_levels(4).tolist() == [-1.5, -0.5, 0.5, 1.5]


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
@pytest.mark.parametrize("levels", [2, 3, 8])
def test_closed_form_error_is_what_a_sample_shows(bound: str, levels: int) -> None:
    thresholds, values = thresholds_and_values(levels, bound)
    x_N = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (x_N - values[torch.bucketize(x_N, thresholds)]).square().mean()
    assert normal_mse(thresholds, values) == pytest.approx(float(error), rel=0.02)
