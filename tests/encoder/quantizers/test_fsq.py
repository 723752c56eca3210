"""FSQ: rounding with odd and even numbers of levels, reachability of every level, and bounds."""

import pytest
import torch

from sidestack.encoder.quantizers.fsq import FsqConfig
from sidestack.encoder.sid.spec import Bound


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
@pytest.mark.parametrize("levels", [2, 3, 4, 8, 64])
def test_every_level_is_reached_and_decodes_to_its_value(levels: int, bound: Bound) -> None:
    fsq = FsqConfig(levels=levels, digits=1, bound=bound).build()
    h_B1 = torch.linspace(-6, 6, 100_001)[:, None]
    digits_B1 = fsq.encode(h_B1)
    assert digits_B1.unique().tolist() == list(range(levels))
    assert bool((digits_B1.diff(dim=0) >= 0).all())
    expected = (digits_B1 - (levels - 1) / 2) / ((levels - 1) / 2)
    assert torch.allclose(fsq.decode(digits_B1), expected)
    assert torch.equal(fsq.encode(-h_B1[:49_000]), (levels - 1) - digits_B1[:49_000])


def test_codes_match_hand_computed_examples() -> None:
    fsq = FsqConfig(levels=3, digits=4).build()
    assert fsq.encode(torch.tensor([[-9.0, -0.4, 0.6, 2.0]])).tolist() == [[0, 1, 2, 2]]
    assert FsqConfig(levels=2, digits=2).build().encode(torch.tensor([[-0.1, 0.1]])).tolist() == [[0, 1]]


def test_training_step_passes_the_gradient_of_the_bound() -> None:
    fsq = FsqConfig(levels=3, digits=5, bound="tanh").build()
    h_BH = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantized = fsq(h_BH)
    assert torch.allclose(quantized.straight_through, quantized.h_hat, atol=1e-6)
    quantized.straight_through.sum().backward()
    assert torch.allclose(h_BH.grad, 1 - h_BH.tanh().square(), atol=1e-6)
    assert float(quantized.commitment_loss().detach().max()) <= 0.25 + 1e-5


def test_sid_spec_has_one_layer_and_even_steps() -> None:
    spec = FsqConfig(levels=8, digits=7).build().sid_spec("ab")
    assert (spec.depth, spec.groups, spec.digits, spec.quantizer) == (1, 7, 7, "fsq")
    assert spec.steps[0] * spec.centre == 1
