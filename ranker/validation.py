"""Choice of the number of epochs on a validation window: the newest training dates, held out.

A first training leaves the window's dates out and is measured on them after each epoch, until the mean of the tasks'
normalized entropies rises. The arm is then trained afresh, on all training dates, for the number of epochs before the
rise, exactly as if the configuration had set it. It does not continue from the first training's best weights: these
have not seen the newest dates, which matter most for the following days, and their learning rates have not decayed. The
summary has the cost: the first training's steps and seconds.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from sidestack.infra.checkpoint import Checkpoint
from sidestack.infra.distributed import sum_over_ranks
from sidestack.infra.errors import DataError
from sidestack.infra.lanes import LaneReader
from sidestack.infra.tables import TaskSpec
from sidestack.ranker.convert import as_numpy, known, without_nulls
from sidestack.ranker.metrics import judged_label, normalized_entropy
from sidestack.ranker.statistics import log_loss
from sidestack.ranker.step_runner import StepRunner
from sidestack.ranker.trainer import Trainer


@dataclass
class Validation:
    """A window's results after each epoch, as JSON-ready fields.

    Attributes:
        dates: the window's first and last.
        ne: for each epoch the normalized entropy of every task that has both labels in the window.
        steps: number of steps of the first training. seconds: its duration, with measuring.
        resumed_from_step: of the first training; None: it was not resumed.
    """

    dates: list[str]
    ne: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    resumed_from_step: int | None = None

    @property
    def means(self) -> list[float]:
        """The mean normalized entropy over tasks, by epoch."""
        return [sum(by_task.values()) / len(by_task) for by_task in self.ne]

    @property
    def best(self) -> int:
        """The number of epochs after which the mean was lowest."""
        return self.means.index(min(self.means)) + 1

    @property
    def is_over(self) -> bool:
        """Whether the mean has risen."""
        return len(self.ne) > 1 and self.means[-1] > self.means[-2]


class EpochSearch:
    """The first training, with the window held out.

    Args of the constructor:
        trainer: of that training, before its first step. window: the rows it is measured on, in order.
        dates: the window's first and last.

    Attributes:
        validation: the window's results so far.
    """

    def __init__(self, trainer: Trainer, window: LaneReader, dates: list[str]) -> None:
        self.trainer = trainer
        self.window = window
        self.validation = Validation(dates)
        self._began = time.monotonic()
        trainer.validation_state = self._state

    def resume(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint of this training."""
        self.trainer.restore(checkpoint)
        self.validation = Validation(**checkpoint.values["validation"])
        self.validation.resumed_from_step = checkpoint.step
        self._began -= self.validation.seconds

    def run(self, advance: Callable[[int], None]) -> Validation:
        """Train until the mean rises, or for the maximum of epochs.

        Args:
            advance: called with the number of rows trained on.

        Raises:
            DataError: no task has both labels in the window.
        """
        epochs = self.trainer.step // self.trainer.reader.num_batches
        if len(self.validation.ne) < epochs:  # stopped after the epoch's last step, before its measurement
            self._is_enough()
        if not self.validation.is_over:
            self.trainer.run(advance, self._is_enough)
        return Validation(**self._state())

    def _state(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._began
        return asdict(self.validation) | {"steps": self.trainer.step, "seconds": seconds}

    def _is_enough(self) -> bool:
        measured = measure_ne(self.trainer.runner, self.window)
        if not measured:
            raise DataError("ranker.training.validation_days: no task has both labels in the validation window")
        # Not validation_<task>_ne: that is the name of held-out metrics on validation dates.
        values = {f"search_validation_{task}_ne": value for task, value in measured.items()}
        self.trainer.log.metrics(self.trainer.step, values)
        self.validation.ne.append(measured)
        return self.validation.is_over


@torch.no_grad()
def measure_ne(runner: StepRunner, reader: LaneReader) -> dict[str, float]:
    """Return the normalized entropy of each task on all rows of a reader; the model is left in training mode.

    The rows judged are those that the held-out metrics judge. A task without both labels is left out.
    """
    tasks, world = runner.features.tasks, runner.world
    totals_3T = np.zeros((3, len(tasks)))
    runner.sharded.model.eval()
    for batch, output in runner.run(reader, epoch=0):
        probabilities_BT = output.probabilities_BT.cpu().numpy()
        for place, task in enumerate(tasks):
            label = judged_label(batch.table, tasks, task)
            judged_B = known(label) & batch.valid_N
            labels_M = as_numpy(without_nulls(label))[judged_B]
            losses_M = log_loss(labels_M, probabilities_BT[judged_B, place])
            totals_3T[:, place] += losses_M.sum(), len(labels_M), labels_M.sum()
    runner.sharded.model.train()
    summed_3T = sum_over_ranks(world, torch.from_numpy(totals_3T).to(world.device)).cpu().numpy()
    return _defined(tasks, summed_3T.T)


def _defined(tasks: Mapping[str, TaskSpec], totals_T3: Iterable[Iterable[float]]) -> dict[str, float]:
    values = {task: normalized_entropy(*totals) for task, totals in zip(tasks, totals_T3, strict=True)}
    return {task: value for task, value in values.items() if np.isfinite(value)}
