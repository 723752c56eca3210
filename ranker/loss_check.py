"""A check that a step's loss is finite, made when the device has had time to compute it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sidestack.infra.errors import DataError
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.model import StepOutput


class NonFiniteLossError(DataError):
    """The loss of a global batch is NaN or infinite.

    Attributes:
        batch: rebuilds this rank's part of the batch, in host memory.
        is_own: whether this rank's own probabilities are non-finite.
    """

    def __init__(self, message: str, batch: Callable[[], RankerBatch], is_own: bool) -> None:
        super().__init__(message)
        self.batch = batch
        self.is_own = is_own


class LossCheck:
    """An asynchronous copy of a step's totals to the host, and their check there.

    Args of the constructor:
        output: of the step; the copy of its totals is enqueued at once, behind the step's own work.
        tasks: the tasks' names. place: returns where the batch's rows are. batch: rebuilds the batch.
    """

    def __init__(
        self, output: StepOutput, tasks: Sequence[str], place: Callable[[], str], batch: Callable[[], RankerBatch]
    ) -> None:
        self._output, self._tasks, self._place, self._batch = output, tasks, place, batch
        self._arrived: torch.cuda.Event | None = None
        self._totals_3T: Tensor = output.totals_3T
        if self._totals_3T.device.type == "cuda":
            self._totals_3T = torch.empty_like(output.totals_3T, device="cpu", pin_memory=True)
            self._totals_3T.copy_(output.totals_3T, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def require_finite(self) -> None:
        """Wait for the totals and check them. They are over all ranks, so every rank finds the same.

        Raises:
            NonFiniteLossError: with the losses by task, and the rows.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        if not self._totals_3T.isfinite().all():
            losses = zip(self._tasks, self._totals_3T[0].tolist(), strict=True)
            by_task = ", ".join(f"{task} {loss}" for task, loss in losses)
            message = f"the loss of the global batch is not finite: {by_task}; {self._place()}"
            is_own = not bool(self._output.probabilities_BT.isfinite().all())
            raise NonFiniteLossError(message, self._batch, is_own)
