"""Jagged attention: the numbers and gradients of a loop over rows, in memory that follows the entries."""

from typing import Any

import pytest
import torch
from ranker.jagged import attend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def slow_reference(probes_NBD: Tensor, values_TD: Tensor, lengths: list[int]) -> Tensor:
    """Attend row by row; an empty row gives zeros."""
    rows = []
    for probes_ND, values_LD in zip(probes_NBD.unbind(1), values_TD.split(lengths), strict=True):
        rows.append((probes_ND @ values_LD.T).softmax(1) @ values_LD if len(values_LD) else probes_ND * 0)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("lengths", [[3, 1, 7], [0, 4, 0, 0, 9, 0], [0, 0], [1], [10_000, *[3] * 200]])
@pytest.mark.parametrize("vectors", [1, 3])
def test_equals_a_loop_over_rows_and_so_do_its_gradients(lengths: list[int], vectors: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(vectors, len(lengths), 4), torch.randn(sum(lengths), 4)]
    direction_NBD = torch.randn_like(inputs[0])

    def gradients(means_NBD: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return torch.autograd.grad(means_NBD, inputs, direction_NBD.to(means_NBD.dtype), materialize_grads=True)

    fast = [value.clone().requires_grad_() for value in inputs]
    slow = [value.double().requires_grad_() for value in inputs]
    fast_NBD = attend(*fast, offsets_of(lengths), max(lengths))
    slow_NBD = slow_reference(*slow, lengths)
    for one, two in zip([fast_NBD, *gradients(fast_NBD, fast)], [slow_NBD, *gradients(slow_NBD, slow)], strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=3e-5)


def test_large_scores_do_not_overflow() -> None:
    values_TD = torch.tensor([[1e3, 0.0], [0.0, 1e3], [-1e3, 0.0]])
    means_NBD = attend(torch.tensor([[[1e3, 0.0]]]), values_TD, offsets_of([3]), 3)
    assert means_NBD.flatten().tolist() == [1e3, 0.0]


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that any operator gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        parts = out if isinstance(out, tuple | list) else [out]
        self.numbers = max(self.numbers, *(part.numel() for part in parts if isinstance(part, Tensor)), 0)
        return out


def test_one_long_row_costs_its_own_length_and_no_more() -> None:
    dim, vectors, rows = 8, 4, 1000
    lengths = [10_000, *[2] * (rows - 1)]
    probes_NBD = torch.randn(vectors, rows, dim, requires_grad=True)
    values_TD = torch.randn(sum(lengths), dim, requires_grad=True)
    with LargestTensor() as largest:
        attend(probes_NBD, values_TD, offsets_of(lengths), max(lengths)).sum().backward()
    assert largest.numbers == sum(lengths) * dim  # padded: rows * 10,000 * dim
