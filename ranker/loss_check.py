"""Whether a step's loss is finite, asked when the device has had time to compute it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infra.errors import DataError


class NonFiniteLossError(DataError):
    """The loss of a global batch is NaN or infinite."""


class LossCheck:
    """A step's totals on their way to the host, where they are checked.

    Args of the constructor:
        totals_3T: of `ranker.model.StepOutput`; their copy to the host begins at once, behind the step's own work.
        tasks: the tasks' names. place: tells where the batch's rows are.
    """

    def __init__(self, totals_3T: Tensor, tasks: Sequence[str], place: Callable[[], str]) -> None:
        self._tasks, self._place = tasks, place
        self._arrived: torch.cuda.Event | None = None
        self._totals_3T = totals_3T
        if totals_3T.device.type == "cuda":
            self._totals_3T = torch.empty_like(totals_3T, device="cpu", pin_memory=True)
            self._totals_3T.copy_(totals_3T, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def require_finite(self) -> None:
        """Wait for the totals and check them: those over all ranks, so that every rank finds the same.

        Raises:
            NonFiniteLossError: naming the losses by task, and the rows.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        if not self._totals_3T.isfinite().all():
            losses = zip(self._tasks, self._totals_3T[0].tolist(), strict=True)
            by_task = ", ".join(f"{task} {loss}" for task, loss in losses)
            raise NonFiniteLossError(f"the loss of the global batch is not finite: {by_task}; {self._place()}")
