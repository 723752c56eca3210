"""The recursion on one number per digit, compared with the paper's loop over residual vectors."""

import pytest
import torch

from sidestack.encoder.quantizers.recursion import Layers, encode_by_recursion
from sidestack.encoder.quantizers.structured import Structured, StructuredConfig


def of_structured(quantizer: Structured, h_BH: torch.Tensor) -> torch.Tensor:
    layers = Layers(*(part.squeeze(2) for part in quantizer.codebook()))
    even = quantizer.config.bound == "clamp"
    return encode_by_recursion(h_BH, layers, quantizer.thresholds, quantizer.values_L, even=even)


def generic(**settings: object) -> tuple[Structured, torch.Tensor]:
    """Return a quantizer with randomly perturbed parameters, and vectors that reach all of its levels."""
    generator = torch.Generator().manual_seed(0)
    quantizer = StructuredConfig.model_validate(settings).build().double()
    mix = torch.randn(quantizer.latent_dim, quantizer.latent_dim, generator=generator, dtype=torch.float64)
    h_BH = torch.randn(700, quantizer.latent_dim, generator=generator, dtype=torch.float64) @ mix
    quantizer.start(h_BH, generator)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return quantizer, h_BH


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
@pytest.mark.parametrize("levels", [2, 3, 4, 8])
@pytest.mark.parametrize(("groups", "depth"), [(1, 1), (3, 5), (1, 15)])
def test_recursion_equals_the_loop_over_residuals(bound: str, levels: int, groups: int, depth: int) -> None:
    quantizer, h_BH = generic(bound=bound, levels=levels, groups=groups, depth=depth, group_dim=8)
    digits_BN = of_structured(quantizer, h_BH)
    assert digits_BN.dtype == torch.int64
    assert torch.equal(digits_BN, quantizer.encode_by_residuals(h_BH))
    assert len(digits_BN.unique()) == levels


@pytest.mark.parametrize(("levels", "expected"), [(2, [0, 0, 1, 1]), (3, [0, 1, 1, 2])])
def test_ties_take_the_lower_level_and_outliers_the_outermost_level(levels: int, expected: list[int]) -> None:
    u_DPM, b_DPM, a_DP = torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.full((1, 1), 2.0)
    even = torch.arange(levels) - (levels - 1) / 2
    thresholds = (even[1:] + even[:-1]) / 2
    x = [-9.0, 0.0, 1.0, 9.0]  # with steps of 2, 0 is the threshold of two levels and 1 the upper one of three
    for is_even in (True, False):
        layers = Layers(u_DPM, b_DPM, a_DP)
        digits_BN = encode_by_recursion(torch.tensor(x)[:, None], layers, thresholds, even, even=is_even)
        assert digits_BN.squeeze(1).tolist() == expected
