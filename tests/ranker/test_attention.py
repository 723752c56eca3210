"""Attention to shared histories: values and gradients of a loop over rows, and memory proportional to the entries."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sidestack.ranker.attention import attend
from sidestack.ranker.layout import HistoryLayout, history_layout


def layout_of(lengths: list[int], rows: list[int] | None = None) -> HistoryLayout:
    """Lay out histories of these lengths, each of one row unless `rows` has other numbers."""
    return history_layout(np.array(lengths), np.array(rows or [1] * len(lengths)))


def slow_reference(probes_BND: Tensor, values_TD: Tensor, lengths: list[int], rows: list[int]) -> Tensor:
    """Attend row by row; a row without history gets zeros."""
    histories = [history for history, n in zip(values_TD.split(lengths), rows, strict=True) for _ in range(n)]
    return torch.stack([
        (probes_ND @ values_LD.T).softmax(1) @ values_LD if len(values_LD) else probes_ND * 0
        for probes_ND, values_LD in zip(probes_BND, histories, strict=True)
    ])  # fmt: skip


SIZES = [
    ([3, 1, 7], [1, 1, 1]),
    ([0, 4, 0, 0, 9, 0], [2, 3, 1, 1, 22, 5]),
    ([0, 0], [1, 4]),
    ([1], [1]),
    ([40, 33, 20, 5], [9, 1, 30, 2]),
    ([10_000, *[3] * 200], [3, *[1, 2] * 100]),
]


@pytest.mark.parametrize(("lengths", "rows"), SIZES)
@pytest.mark.parametrize("vectors", [1, 3])
def test_attention_and_its_gradients_equal_a_loop_over_rows(lengths: list[int], rows: list[int], vectors: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(sum(rows), vectors, 4), torch.randn(sum(lengths), 4)]
    direction_BND = torch.randn_like(inputs[0])

    def gradients(means_BND: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(means_BND, inputs, direction_BND.to(means_BND.dtype), materialize_grads=True)

    fast = [value.clone().requires_grad_() for value in inputs]
    slow = [value.double().requires_grad_() for value in inputs]
    fast_BND = attend(fast[0], fast[1], layout_of(lengths, rows))
    slow_BND = slow_reference(slow[0], slow[1], lengths, rows)
    for one, two in zip([fast_BND, *gradients(fast_BND, fast)], [slow_BND, *gradients(slow_BND, slow)], strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=3e-5)


def test_large_scores_do_not_overflow() -> None:
    values_TD = torch.tensor([[1e3, 0.0], [0.0, 1e3], [-1e3, 0.0]])
    means_BND = attend(torch.tensor([[[1e3, 0.0]]]), values_TD, layout_of([3]))
    assert means_BND.flatten().tolist() == [1e3, 0.0]


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        parts = out if isinstance(out, tuple | list) else [out]
        self.numbers = max(self.numbers, *(part.numel() for part in parts if isinstance(part, Tensor)), 0)
        return out


def test_memory_of_a_long_history_is_proportional_to_its_length() -> None:
    dim, vectors, requests, rows = 8, 4, 1000, 3
    lengths = [10_000, *[2] * (requests - 1)]
    probes_BND = torch.randn(requests * rows, vectors, dim, requires_grad=True)
    values_TD = torch.randn(sum(lengths), dim, requires_grad=True)
    with LargestTensor() as largest:
        attend(probes_BND, values_TD, layout_of(lengths, [rows] * requests)).sum().backward()
    assert largest.numbers == max(sum(lengths), (requests * rows + 1) * vectors) * dim  # padded: 3,000 * 10,000 * dim
