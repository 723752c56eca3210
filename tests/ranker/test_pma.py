"""The history block's attention, compared with the paper's formula row by row."""

import math

import pytest
import torch
from torch import Tensor

from sidestack.ranker.pma import HistoryAttention
from tests.ranker.test_attention import layout_of

DIM, QUERIES, FEATURES = 4, 3, 5


def attention(heads: int = 1) -> HistoryAttention:
    torch.manual_seed(0)
    block = HistoryAttention(DIM, QUERIES, FEATURES, heads)
    torch.nn.init.normal_(block.theta)
    return block


def slow_reference(block: HistoryAttention, features_BF: Tensor, histories: list[Tensor]) -> Tensor:
    """Return U = softmax(Q K^T / sqrt(d)) V with K = V Theta, row by row; zeros without history."""
    rows = []
    for features_F, v_LD in zip(features_BF, histories, strict=True):
        q_KD = block.query(features_F).view(QUERIES, DIM)
        weights_KL = torch.softmax(q_KD @ (v_LD @ block.theta).T / math.sqrt(DIM), dim=1)
        rows.append(weights_KL @ v_LD if len(v_LD) else torch.zeros(QUERIES, DIM))
    return torch.stack(rows)


def run(block: HistoryAttention, features_BF: Tensor, histories: list[Tensor]) -> Tensor:
    return block(features_BF, torch.cat(histories), layout_of([len(history) for history in histories]))


def test_attention_equals_the_formula_of_the_paper_for_ragged_histories() -> None:
    block, features_BF = attention(), torch.randn(4, FEATURES)
    histories = [torch.randn(n, DIM) for n in (3, 0, 7, 1)]
    torch.testing.assert_close(run(block, features_BF, histories), slow_reference(block, features_BF, histories))


@pytest.mark.parametrize("heads", [2, 4])
def test_each_head_attends_in_its_own_part_of_the_dimensions(heads: int) -> None:
    block, features_BF = attention(heads), torch.randn(3, FEATURES)
    histories = [torch.randn(n, DIM) for n in (3, 0, 7)]
    part = DIM // heads
    rows = []
    for features_F, v_LD in zip(features_BF, histories, strict=True):
        q_KD, k_LD = block.query(features_F).view(QUERIES, DIM), v_LD @ block.theta
        cuts = [slice(h * part, (h + 1) * part) for h in range(heads)]
        heads_KP = [torch.softmax(q_KD[:, cut] @ k_LD[:, cut].T / math.sqrt(part), 1) @ v_LD[:, cut] for cut in cuts]
        rows.append(torch.cat(heads_KP, dim=1))
    torch.testing.assert_close(run(block, features_BF, histories), torch.stack(rows))


def test_an_empty_history_gives_zeros_and_finite_gradients() -> None:
    block = attention()
    values = torch.randn(2, DIM, requires_grad=True)
    out_BKD = run(block, torch.randn(3, FEATURES), [values[:0], values, values[:0]])
    out_BKD.sum().backward()
    assert out_BKD[[0, 2]].abs().max() == 0
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_a_batch_without_any_history_gives_zeros() -> None:
    out_BKD = run(attention(), torch.randn(2, FEATURES), [torch.empty(0, DIM)] * 2)
    assert out_BKD.shape == (2, QUERIES, DIM)
    assert out_BKD.abs().max() == 0


def test_output_of_a_row_does_not_depend_on_other_rows() -> None:
    block, features_BF = attention(), torch.randn(2, FEATURES)
    first, second = torch.randn(2, DIM), torch.randn(5, DIM)
    alone = run(block, features_BF[:1], [first])
    beside = run(block, features_BF, [first, second * 1e3])
    torch.testing.assert_close(beside[:1], alone)
