"""Gradients averaged over ranks, in one message that can travel while the backward pass goes on."""

from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from sidestack.infra.distributed import World


class GradientMessage:
    """One sum over ranks of all gradients, under way from the construction on.

    One buffer in the parameters' order, not DistributedDataParallel's buckets: those are laid out anew after the first
    step, by the order in which gradients came, and a ring adds three or more ranks up in the order of the layout. A
    run that goes on from a checkpoint would then differ in last bits from one that was never stopped.

    Args of the constructor:
        world: the process group; the ranks must have gradients of the same parameters. gradients: to be averaged.
        sums: a few numbers that are added up over ranks in the same message, in float32, and replaced by their sums.
        group: the ranks' group that the message travels in; by default the world's.
    """

    def __init__(
        self, world: World, gradients: Sequence[Tensor], sums: Tensor | None, group: dist.ProcessGroup | None = None
    ) -> None:
        self._world, self._gradients, self._sums = world, gradients, sums
        further = [] if sums is None else [sums.float()]
        self._work: dist.Work | None = None
        if world.size > 1 and (gradients or further):
            self._total = nn.utils.parameters_to_vector([*gradients, *further]).detach()
            self._work = dist.all_reduce(self._total, group=group or world.group, async_op=True)

    def wait(self) -> None:
        """Wait until the message is here, and change nothing yet."""
        if self._work is not None:
            with self._world.state.waiting():
                self._work.wait()

    def finish(self) -> None:
        """Wait for the message, and replace every gradient by its mean over ranks."""
        self.wait()
        if self._work is None:
            return
        if self._sums is not None:
            self._sums.copy_(self._total[len(self._total) - self._sums.numel() :].view_as(self._sums))
        nn.utils.vector_to_parameters(self._total / self._world.size, self._gradients)


def average_gradients(world: World, parameters: Iterable[nn.Parameter], sums: Tensor | None = None) -> None:
    """Replace every gradient by its mean over ranks; see `GradientMessage`."""
    GradientMessage(world, _gradients(parameters), sums).finish()


class OverlappedAverage:
    """Averages a network's gradients while the backward pass goes on below it, in the embedding tables.

    The message leaves when as many parameters have their gradient as in the step before, which is before the gradients
    of looked-up vectors are exchanged and the tables updated. The first step's leaves at its end, and where more
    gradients came than in the step before, it is sent again. It travels in a group of its own: under nccl, messages of
    one group wait for each other.

    Args of the constructor:
        world: the process group; every rank constructs at the same point. parameters: of the network.
        sums: returns what is summed in the same message (`GradientMessage`), once the forward pass is over.
    """

    def __init__(
        self, world: World, parameters: Sequence[nn.Parameter], sums: Callable[[], Tensor | None] = lambda: None
    ) -> None:
        self._world, self._parameters, self._sums = world, parameters, sums
        self._message: GradientMessage | None = None
        self._told: Tensor | None = None
        self._arrived = self._expected = 0
        self._group: dist.ProcessGroup | None = None
        if world.size > 1:
            self._group = dist.new_group()
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Wait until every gradient is the mean over ranks; to be called after the backward pass."""
        if self._message is None:
            self._send()
        elif self._arrived > self._expected:
            self._message.wait()
            self._send()
        assert self._message is not None
        self._message.finish()
        self._message, self._told, self._expected, self._arrived = None, None, self._arrived, 0

    def _note(self, _: Tensor) -> None:
        self._arrived += 1
        if self._arrived == self._expected:
            self._send()

    def _send(self) -> None:
        self._told = self._sums() if self._told is None else self._told
        self._message = GradientMessage(self._world, _gradients(self._parameters), self._told, self._group)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
