"""Gradients are averaged in one all-reduce, which starts as soon as the last gradient is computed."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidestack.infra.distributed import World
from sidestack.infra.gradients import GradientMessage, OverlappedAverage, average_gradients
from tests.distributed import run_distributed


def gradients_with_sums(world: World, has_gradients: bool) -> tuple[list[float], list[float] | None]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    if has_gradients:
        parameter.grad = torch.tensor([1.0, 3.0]) * world.rank
    sums_2 = torch.tensor([[0.5], [world.rank]], dtype=torch.float64)
    gradients = [] if parameter.grad is None else [parameter.grad]
    GradientMessage(world, gradients, sums_2[0]).finish()
    return sums_2.flatten().tolist(), None if parameter.grad is None else parameter.grad.tolist()


def test_numbers_are_summed_in_the_message_of_the_gradients() -> None:
    assert run_distributed(gradients_with_sums, True) == [([1.0, rank], [0.5, 1.5]) for rank in range(2)]
    assert run_distributed(gradients_with_sums, False) == [([1.0, rank], None) for rank in range(2)]


def gradients_of_some(world: World) -> list[list[float] | None]:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (world.rank + 1)
    parameters[2].grad = torch.tensor([4.0, -8.0]) * world.rank
    average_gradients(world, parameters)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


def test_gradients_are_averaged_and_missing_ones_stay_missing() -> None:
    assert run_distributed(gradients_of_some) == [[[1.5, 3.0], None, [2.0, -4.0]]] * 2


class Recording(torch.autograd.Function):
    """The identity in place of the embedding lookups, which records when its backward pass runs."""

    events: list[str] = []

    @staticmethod
    def forward(ctx: object, x_B: Tensor) -> Tensor:
        return x_B.clone()

    @staticmethod
    def backward(ctx: object, gradient_B: Tensor) -> Tensor:
        Recording.events.append("tables")
        return gradient_B


def overlapped(world: World) -> tuple[list[list[str]], list[list[float]], list[float]]:
    """Take steps with two, two, three and two weights; return the order of events, the gradients and summed numbers."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    looked_up_B = torch.ones(2, requires_grad=True)
    extra = torch.zeros(1)
    average = OverlappedAverage(world, weights, lambda: extra)
    real, order, gradients, sums = dist.all_reduce, [], [], []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        Recording.events.append("message")
        return real(*args, **kwargs)

    dist.all_reduce = recorded
    for number in (2, 2, 3, 2):
        Recording.events = []
        extra.fill_(world.rank + 1)
        for weight in weights:
            weight.grad = None
        x_B = Recording.apply(looked_up_B)
        (sum(weight * x_B for weight in weights[:number]).sum() * (world.rank + 1)).backward()
        average.finish()
        order.append(Recording.events)
        gradients.append([0.0 if weight.grad is None else weight.grad[0].item() for weight in weights])
        sums.append(extra.item())
    dist.all_reduce = real
    return order, gradients, sums


def test_all_reduce_overlaps_the_backward_pass_of_the_tables() -> None:
    first, second = run_distributed(overlapped)
    assert first == second
    order, gradients, sums = first
    at_the_end, early = ["tables", "message"], ["message", "tables"]
    assert order[:2] == [at_the_end, early]
    assert sorted(order[2]) == ["message", "message", "tables"], "a third gradient needs a second message"
    assert order[3] == at_the_end
    assert gradients == [[1.5, 1.5, number == 3 and 1.5] for number in (2, 2, 3, 2)]
    assert sums == [3.0] * 4


def group_timeouts(world: World) -> list[float]:
    """Return the timeouts of the default group and of the average's own group in seconds."""
    gloo = dist.group.WORLD._get_backend(world.device)
    gloo._set_default_timeout(timedelta(hours=5))  # as the watchdog sets it
    own = OverlappedAverage(world, [])._group._get_backend(world.device)
    return [backend.options._timeout.total_seconds() for backend in (gloo, own)]


def test_group_of_the_average_has_the_timeout_of_the_default_group() -> None:
    assert run_distributed(group_timeouts) == [[5 * 3600.0] * 2] * 2
