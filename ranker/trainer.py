"""The ranker's training loop: steps, learning curve, checkpoints. `ranker.step_runner` runs a step's batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from sidestack.infra.checkpoint import Checkpoint
from sidestack.infra.errors import PreemptedError
from sidestack.infra.lanes import LaneReader
from sidestack.infra.learning_curve import is_point, point_every
from sidestack.infra.stage import StageRun
from sidestack.infra.state import fill
from sidestack.ranker.averaging import WeightAverage
from sidestack.ranker.budget import DecidedTraining, warmup_steps
from sidestack.ranker.config import RankerConfig, TrainingConfig
from sidestack.ranker.metrics import TrainingWindow
from sidestack.ranker.model import StepOutput
from sidestack.ranker.sharding import ShardedRanker
from sidestack.ranker.step_runner import StepRunner
from sidestack.ranker.throughput import Throughput

Phase = Literal["search", "train"]
"""A stage's trainings: the search for the number of epochs (`ranker.validation`), and the actual training."""


class Model(NamedTuple):
    """A model to train.

    Attributes:
        runner: runs its steps.
        restart_tables: resets the tables and their optimizers' states to those at the start of the training.
    """

    runner: StepRunner
    restart_tables: Callable[[], None]

    @property
    def sharded(self) -> ShardedRanker:
        """The sharded model itself."""
        return self.runner.sharded


class Trainer:
    """A training and its state. Its step determines its place in the data, for any number of ranks.

    Args of the constructor:
        model: the model to train. reader: the training rows. training: the settings.
        run: the stage's run, for its record, its checkpoints and its profile.
        phase: which of the stage's trainings this is; a prefix of the learning curve's names.
        steps_before: steps of the stage's earlier training; checkpoint numbers start after them.

    Attributes:
        validation_state: returns the stage's validation for checkpoints, JSON-ready; None: there is none.
    """

    def __init__(
        self,
        model: Model,
        reader: LaneReader,
        training: DecidedTraining,
        run: StageRun[RankerConfig],
        phase: Phase = "train",
        steps_before: int = 0,
    ) -> None:
        self.runner, self.restart_tables = model
        self.sharded = model.sharded
        self.reader = reader
        self.training = training
        self.log = run.log
        self.checkpoints = run.checkpoints
        self.profile = run.profile
        self.phase = phase
        self.steps_before = steps_before
        self.validation_state: Callable[[], dict[str, Any] | None] = lambda: None
        self.num_steps = max(round(training.steps_share * training.epochs * reader.num_batches), 1)
        self.point_every = point_every(self.num_steps, training.log_every)
        # A search may end after any epoch, so each epoch ends with a point.
        self.curve_end = reader.num_batches if phase == "search" else self.num_steps
        self.window = TrainingWindow(self.runner.features.tasks, phase)
        self.average = WeightAverage(self.sharded.dense_optimizer.params)
        self.throughput = Throughput(training.batch_size)
        self.step = 0
        self.resumed_from: int | None = None

    def run(self, advance: Callable[[int], None], is_enough: Callable[[], bool] = lambda: False) -> None:
        """Train the remaining steps, and write the learning curve.

        Args:
            advance: called with the number of rows trained on.
            is_enough: called after each whole epoch; True ends the training.
        """
        advance(self.step * self.training.batch_size)
        self.sharded.model.train()
        self._set_learning_rates()
        self.throughput.start(self.num_steps - self.step, self.runner.waited)
        for epoch, begin, end in self._epochs_left():
            if self.training.restart_tables and epoch and not begin:
                self.restart_tables()
            for _, output in self.runner.run(self.reader, epoch, begin, end):
                advance(self.training.batch_size)
                self._after_step(output)
                if self.step % self.reader.num_batches:
                    self._save_if_due()
                self.profile.step()
                self.throughput.skip(self.runner.waited)  # a profile's last step writes the trace
            if end == self.reader.num_batches:
                ends = is_enough()
                self.throughput.skip(self.runner.waited)
                self._save_if_due()  # after `is_enough`, whose result the checkpoint has
                if ends:
                    break
        self._finish()

    def summary(self) -> dict[str, Any]:
        """Return the steps and the throughput, for `summary.json`."""
        return {"steps": self.step, "resumed_from_step": self.resumed_from, **self.throughput.summary()}

    def _epochs_left(self) -> Iterator[tuple[int, int, int]]:
        """Yield each epoch that is left with its first step and the step at which it ends, counted in the epoch."""
        length = self.reader.num_batches
        first, start = divmod(self.step, length)
        for epoch in range(first, -(-self.num_steps // length)):
            # A checkpoint of an epoch's end holds the tables as that epoch left them, so `restart_tables` is due then.
            yield epoch, start if epoch == first else 0, min(self.num_steps - epoch * length, length)

    def _after_step(self, output: StepOutput) -> None:
        """Count a step: learning rates of the next one, averaged weights, learning curve, time."""
        self.step += 1
        self._set_learning_rates()
        if self.step > self.num_steps * (1 - self.training.average_share):
            self.average.add()
        self.window.add(output.totals_3T)
        if is_point((self.step - 1) % self.curve_end + 1, self.point_every, self.curve_end):
            self.log.metrics(self.step, self.window.take())
        self.throughput.add_step(self.runner.waited)

    def _finish(self) -> None:
        self.profile.close()
        if self.checkpoints is not None:
            self.checkpoints.finish()
        if self.step == self.num_steps:
            self.average.apply()

    def _set_learning_rates(self) -> None:
        self.sharded.set_learning_rates(*learning_rates(self.training, self.step, self.num_steps))

    def _save_if_due(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.keep(self.step, self.training.checkpoint_every, self.num_steps, self._checkpoint)
            self.throughput.add_checkpoint(self.runner.waited)

    @contextmanager
    def saved_before_stop(self) -> Iterator[None]:
        """Save a checkpoint of the last step if a request to stop ends the body.

        Raises:
            PreemptedError: naming the step.
        """
        try:
            yield
        except PreemptedError as stop:
            if self.checkpoints is None or not self.training.checkpoint_every:
                raise
            checkpoint = self._checkpoint()
            self.checkpoints.save_before_stop(checkpoint)
            raise PreemptedError(stop.signal, checkpoint.step) from stop

    def _checkpoint(self) -> Checkpoint:
        self.runner.check_last_loss()  # no checkpoint of weights updated by a non-finite loss
        values = {
            "phase": self.phase,
            "validation": self.validation_state(),
            **self.throughput.state(),
            "history": self.log.history(),
        }
        whole, shards = self.sharded.parted_state(self.runner.features)
        step = self.steps_before + self.step
        return Checkpoint(step, {**whole, **self.window.state(), **self.average.state()}, {}, values, shards)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint of this training, whose shards are already in the model (`load_checkpoint`)."""
        self.sharded.make_dense_state()
        whole, _ = self.sharded.parted_state(self.runner.features)
        fill(whole, checkpoint.shared)
        self.window.load_state(checkpoint.shared, self.runner.world.device)
        self.average.load_state(checkpoint.shared)
        self.throughput.load_state(checkpoint.values)
        self.step = self.resumed_from = checkpoint.step - self.steps_before
        self.log.resume(checkpoint.values["history"])
        self.log.info(checkpoint.resume_message("ranker", self.step, self.num_steps, "last bits"))


def learning_rates(training: TrainingConfig, step: int, total: int) -> tuple[float, float]:
    """Return the learning rates of tables and of the rest at a step (0 to total): linear warmup, then linear decay."""
    rise = (step + 1) / (warmup_steps(training, total) + 1)
    fall = 1.0 - (1.0 - training.final_learning_rate) * step / total
    share = min(rise, fall)
    return training.sparse_learning_rate * share, training.dense_learning_rate * share
