"""Gradients averaged over ranks, in one all-reduce that can overlap with the backward pass."""

from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from sidestack.infra.distributed import World


class GradientMessage:
    """One asynchronous all-reduce of all gradients, started by the constructor.

    It uses one buffer in the parameters' order, not DistributedDataParallel's buckets. Those are rebuilt after the
    first step, in the order in which gradients arrived, and a ring all-reduce over three or more ranks adds up in the
    order of the layout. A resumed run would then differ in its last bits from one that was never stopped.

    Args of the constructor:
        world: the process group; the ranks must have gradients of the same parameters. gradients: to be averaged.
        sums: a few numbers that are added up over ranks in the same all-reduce, in float32, and replaced by their sums.
        group: the process group of the all-reduce; by default the world's.
    """

    def __init__(
        self,
        world: World,
        gradients: Sequence[Tensor],
        sums: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._world, self._gradients, self._sums = world, gradients, sums
        further = [] if sums is None else [sums.float()]
        self._work: dist.Work | None = None
        if world.size > 1 and (gradients or further):
            self._total = nn.utils.parameters_to_vector([*gradients, *further]).detach()
            self._work = dist.all_reduce(self._total, group=group or world.group, async_op=True)

    def wait(self) -> None:
        """Wait for the all-reduce without changing the gradients."""
        if self._work is not None:
            with self._world.state.waiting():
                self._work.wait()

    def finish(self) -> None:
        """Wait for the all-reduce, and replace every gradient by its mean over ranks."""
        self.wait()
        if self._work is None:
            return
        if self._sums is not None:
            self._sums.copy_(self._total[len(self._total) - self._sums.numel() :].view_as(self._sums))
        nn.utils.vector_to_parameters(self._total / self._world.size, self._gradients)


def average_gradients(world: World, parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks; see `GradientMessage`."""
    GradientMessage(world, _gradients(parameters)).finish()


class OverlappedAverage:
    """The average of a network's gradients, overlapped with the backward pass of the embedding tables below it.

    The all-reduce starts when as many parameters have their gradient as in the step before. That is before the
    gradients of looked-up vectors are exchanged and the tables updated. In the first step it starts at the end. If more
    gradients arrive than in the step before, it is repeated. It uses a process group of its own: under nccl,
    collectives of one group wait for each other.

    Args of the constructor:
        world: the process group; every rank constructs at the same point. parameters: of the network.
        sums: returns the numbers to sum in the same all-reduce (`GradientMessage`); called after the forward pass.
    """

    def __init__(
        self, world: World, parameters: Sequence[nn.Parameter], sums: Callable[[], Tensor | None] = lambda: None
    ) -> None:
        self._world, self._parameters, self._sums = world, parameters, sums
        self._message: GradientMessage | None = None
        self._summed: Tensor | None = None
        self._arrived = self._expected = 0
        self._group: dist.ProcessGroup | None = None
        if world.size > 1:
            self._group = _new_group(world)
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Wait until every gradient is the mean over ranks; call it after the backward pass."""
        if self._message is None:
            self._send()
        elif self._arrived > self._expected:
            self._message.wait()
            self._send()
        assert self._message is not None
        self._message.finish()
        self._message, self._summed, self._expected, self._arrived = None, None, self._arrived, 0

    def _note(self, _: Tensor) -> None:
        self._arrived += 1
        if self._arrived == self._expected:
            self._send()

    def _send(self) -> None:
        self._summed = self._sums() if self._summed is None else self._summed
        self._message = GradientMessage(self._world, _gradients(self._parameters), self._summed, self._group)


def _new_group(world: World) -> dist.ProcessGroup:
    """Return a new group of all ranks that waits as long as the default group does now (`infra.watchdog.watching`).

    By itself, `new_group` would wait for torch's own 10 or 30 minutes, and end a training whose ranks wait for work.
    """
    backend = dist.group.WORLD._get_backend(world.device)  # type: ignore[union-attr]
    group: dist.ProcessGroup = dist.new_group(timeout=backend.options._timeout)
    return group


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
