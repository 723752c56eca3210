"""Throughput of a training: the time of its steps, without the first ones and without checkpoints."""

import time
from dataclasses import dataclass
from typing import Any

UNTIMED_STEPS = 10
"""First steps of each start, excluded: tracing, allocation, the reader's first row groups."""


@dataclass
class Throughput:
    """The time of a training's steps, over all its starts.

    Attributes:
        batch_size: rows of a step, over all ranks.
        steps: timed steps. seconds: their duration. waited: seconds of it that this rank waited for its own batches.
        checkpoint_seconds: duration of saving checkpoints, not in `seconds`.
    """

    batch_size: int
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    checkpoint_seconds: float = 0.0
    _untimed: int = 0
    _since: float = 0.0
    _waited_since: float = 0.0

    def start(self, steps_left: int, waited: float) -> None:
        """Begin a start of the training; at least its last step is timed.

        Args:
            steps_left: steps of this start. waited: seconds that this rank has waited for batches so far.
        """
        self._untimed = min(UNTIMED_STEPS, steps_left - 1)
        self.skip(waited)

    def add_step(self, waited: float) -> None:
        """Count the time since the last call of any method as a step."""
        if self._untimed > 0:
            self._untimed -= 1
        else:
            self.steps += 1
            self.seconds += time.monotonic() - self._since
            self.waited += waited - self._waited_since
        self.skip(waited)

    def skip(self, waited: float) -> None:
        """Leave out the time since the last call of any method."""
        self._since, self._waited_since = time.monotonic(), waited

    def add_checkpoint(self, waited: float) -> None:
        """Count the time since the last call of any method as a checkpoint's."""
        self.checkpoint_seconds += time.monotonic() - self._since
        self.skip(waited)

    def summary(self) -> dict[str, Any]:
        """Return train_seconds, checkpoint_seconds, data_wait_share and samples_per_second, for `summary.json`."""
        return {
            "train_seconds": self.seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            "data_wait_share": self.waited / self.seconds,
            "samples_per_second": self.steps * self.batch_size / self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """Return the totals for a checkpoint, JSON-ready."""
        return {
            "timed_steps": self.steps,
            "seconds": self.seconds,
            "waited": self.waited,
            "checkpoint_seconds": self.checkpoint_seconds,
        }

    def load_state(self, values: dict[str, Any]) -> None:
        """Continue from the totals of a checkpoint."""
        self.steps, self.seconds = values["timed_steps"], values["seconds"]
        self.waited, self.checkpoint_seconds = values["waited"], values["checkpoint_seconds"]
