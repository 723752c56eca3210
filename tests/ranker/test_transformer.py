"""The history's transformer encoder equals a loop over rows, and pads nothing."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from sidestack.ranker.initial import fill_dense
from sidestack.ranker.transformer import EncoderLayer, HistoryEncoder
from tests.ranker.test_attention import LargestTensor, layout_of

DIM = 8


def encoder(heads: int = 2, layers: int = 2) -> HistoryEncoder:
    torch.manual_seed(0)
    module = HistoryEncoder(DIM, heads, layers)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def slow_layer(layer: EncoderLayer, x_LD: Tensor) -> Tensor:
    """Return the output of one pre-norm layer for one row, head by head."""
    q_LD, k_LD, v_LD = layer.project(layer_norm(x_LD, (DIM,))).chunk(3, dim=1)
    part = DIM // layer.heads
    heads = []
    for cut in (slice(at, at + part) for at in range(0, DIM, part)):
        weights_LL = torch.softmax(q_LD[:, cut] @ k_LD[:, cut].T / math.sqrt(part), dim=1)
        heads.append(weights_LL @ v_LD[:, cut])
    x_LD = x_LD + layer.attention_scale * layer.mix(torch.cat(heads, dim=1))
    return x_LD + layer.network_scale * layer.network(layer_norm(x_LD, (DIM,)))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("lengths", [[3, 1, 5, 3, 0, 1], [0, 4], [1], [300, 2, 300]])
def test_encoder_and_its_gradients_equal_a_loop_over_rows(lengths: list[int], heads: int) -> None:
    module, values_TD = encoder(heads), torch.randn(sum(lengths), DIM, requires_grad=True)
    rows = []
    for x_LD in values_TD.split(lengths):
        for layer in module.layers:
            assert isinstance(layer, EncoderLayer)
            x_LD = slow_layer(layer, x_LD)
        rows.append(x_LD)
    fast_TD, slow_TD = module(values_TD, layout_of(lengths)), torch.cat(rows)
    torch.testing.assert_close(fast_TD, slow_TD, rtol=1e-4, atol=1e-5)
    inputs, direction_TD = [values_TD, *module.parameters()], torch.randn_like(fast_TD)
    for one, two in zip(
        torch.autograd.grad(fast_TD, inputs, direction_TD),
        torch.autograd.grad(slow_TD, inputs, direction_TD),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_a_batch_without_any_history_stays_empty() -> None:
    values_TD = torch.empty(0, DIM, requires_grad=True)
    encoded_TD = encoder()(values_TD, layout_of([0, 0]))
    encoded_TD.sum().backward()
    assert encoded_TD.shape == (0, DIM)


def test_encoder_starts_as_the_identity() -> None:
    module, values_TD = encoder(), torch.randn(5, DIM)
    fill_dense(module, 0)
    assert torch.equal(module(values_TD, layout_of([3, 2])), values_TD)
    module(values_TD, layout_of([3, 2])).square().sum().backward()
    for layer in module.layers:  # but gradients reach its scales
        assert isinstance(layer, EncoderLayer)
        assert layer.attention_scale.grad.abs().min() > 0
        assert layer.network_scale.grad.abs().min() > 0


def test_long_row_stores_no_matrix_of_scores() -> None:
    lengths = [3000, *[2] * 500]
    values_TD = torch.randn(sum(lengths), DIM, requires_grad=True)
    with LargestTensor() as largest:
        encoder(heads=1, layers=1)(values_TD, layout_of(lengths)).sum().backward()
    assert largest.numbers == sum(lengths) * 4 * DIM  # the feed-forward part's hidden layer
    assert values_TD.grad is not None
    assert values_TD.grad.isfinite().all()
