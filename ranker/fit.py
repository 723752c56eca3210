"""The ranker's training loop: steps, learning curve, checkpoints. `ranker.progress` runs a step's batches."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from sidestack.infra.checkpoint import Checkpoint, Checkpoints
from sidestack.infra.distributed import World, raise_on_all_ranks
from sidestack.infra.errors import PreemptedError
from sidestack.infra.lanes import LaneReader
from sidestack.infra.learning_curve import is_point, point_every
from sidestack.infra.stage import StageRun
from sidestack.infra.state import fill
from sidestack.ranker.averaging import WeightAverage
from sidestack.ranker.budget import DecidedConfig, DecidedTraining, warmup_steps
from sidestack.ranker.config import RankerConfig, TrainingConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.metrics import TrainingWindow
from sidestack.ranker.model import StepOutput
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.planner import Traffic
from sidestack.ranker.progress import Progress
from sidestack.ranker.sharding import ShardedRanker, build_sharded
from sidestack.ranker.warm_start import WarmStart

Phase = Literal["search", "train"]
"""A stage's trainings: the search for the number of epochs (`ranker.validation`), and the actual training."""

UNTIMED_STEPS = 10
"""First steps of each start, excluded from throughput: tracing, allocation, the reader's first row groups."""


class Fit:
    """A training and its state. Its step determines its place in the data, for any number of ranks.

    Args of the constructor:
        progress: the pipeline. sharded: the trained model. restart_tables: see `Model`.
        reader: the training rows. training: the settings.
        run: the stage's run, for its record, its checkpoints and its profile.
        phase: which of the stage's trainings this is; a prefix of the learning curve's names.
        steps_before: steps of the stage's earlier training; checkpoint numbers start after them.

    Attributes:
        carried: returns the stage's validation state for checkpoints, JSON-ready; None: there is none.
    """

    def __init__(
        self,
        progress: Progress,
        sharded: ShardedRanker,
        restart_tables: Callable[[], None],
        reader: LaneReader,
        training: DecidedTraining,
        run: StageRun[RankerConfig],
        phase: Phase = "train",
        steps_before: int = 0,
    ) -> None:
        self.progress = progress
        self.sharded = sharded
        self.restart_tables = restart_tables
        self.reader = reader
        self.training = training
        self.log = run.log
        self.checkpoints = run.checkpoints
        self.profile = run.profile
        self.phase = phase
        self.steps_before = steps_before
        self.carried: Callable[[], dict[str, Any] | None] = lambda: None
        self.num_steps = max(round(training.steps_share * training.epochs * reader.num_batches), 1)
        self.point_every = point_every(self.num_steps, training.log_every)
        # A search may end after any epoch, so each epoch ends with a point.
        self.curve_end = reader.num_batches if phase == "search" else self.num_steps
        self.window = TrainingWindow(progress.features.tasks, phase)
        self.average = WeightAverage(sharded.dense_optimizer.params)
        self.step = 0
        self.resumed_from: int | None = None
        self.timed_steps, self.seconds, self.waited, self.checkpoint_seconds = 0, 0.0, 0.0, 0.0

    def run(self, advance: Callable[[int], None], is_enough: Callable[[], bool] = lambda: False) -> None:
        """Train the remaining steps, and write the learning curve.

        Args:
            advance: called with the number of rows trained on.
            is_enough: called after each epoch; True ends the training.
        """
        untimed = min(UNTIMED_STEPS, self.num_steps - self.step - 1) + self.step
        advance(self.step * self.training.batch_size)
        self.sharded.model.train()
        self._set_learning_rates()
        since, waited = time.monotonic(), self.progress.waited
        for output in self._outputs():
            self.step += 1
            self._set_learning_rates()
            if self.step > self.num_steps * (1 - self.training.average_share):
                self.average.add()
            self.window.add(output.totals_3T)
            advance(self.training.batch_size)
            if is_point((self.step - 1) % self.curve_end + 1, self.point_every, self.curve_end):
                self.log.metrics(self.step, self.window.take())
            if self.step > untimed:
                self.timed_steps += 1
                self.seconds += time.monotonic() - since
                self.waited += self.progress.waited - waited
            ends = self.step % self.reader.num_batches == 0 and is_enough()
            self._keep()  # last, so that the checkpoint holds all of the step
            self.profile.step()
            if ends:
                break
            since, waited = time.monotonic(), self.progress.waited
        self.profile.close()
        if self.checkpoints is not None:
            self.checkpoints.finish()
        if self.step == self.num_steps:
            self.average.apply()

    def summary(self) -> dict[str, Any]:
        """Return steps, train_seconds (without the untimed first steps) and samples_per_second over all ranks.

        data_wait_share is the part of train_seconds that this rank waited for its own batches.
        """
        return {
            "steps": self.step,
            "resumed_from_step": self.resumed_from,
            "train_seconds": self.seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            "data_wait_share": self.waited / self.seconds,
            "samples_per_second": self.timed_steps * self.training.batch_size / self.seconds,
        }

    def _outputs(self) -> Iterator[StepOutput]:
        first, start = divmod(self.step, self.reader.num_batches)
        length = self.reader.num_batches
        for epoch in range(first, -(-self.num_steps // length)):
            end = min(self.num_steps - epoch * length, length)
            begin = start if epoch == first else 0
            # Also after a resume at an epoch's end: that checkpoint holds the tables as the epoch left them.
            if self.training.restart_tables and epoch and not begin:
                self.restart_tables()
            for _, output in self.progress.over(self.reader, epoch, begin, end):
                yield output

    def _set_learning_rates(self) -> None:
        self.sharded.set_learning_rates(*learning_rates(self.training, self.step, self.num_steps))

    def _keep(self) -> None:
        if self.checkpoints is None:
            return
        began = time.monotonic()
        self.checkpoints.keep(self.step, self.training.checkpoint_every, self.num_steps, self._checkpoint)
        self.checkpoint_seconds += time.monotonic() - began

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
            self.progress.settle()
            checkpoint = self._checkpoint()
            self.checkpoints.save_before_stop(checkpoint)
            raise PreemptedError(stop.signal, checkpoint.step) from stop

    def _checkpoint(self) -> Checkpoint:
        self.progress.settle()  # no checkpoint of weights updated by a non-finite loss
        values = {
            "phase": self.phase,
            "validation": self.carried(),
            "timed_steps": self.timed_steps,
            "seconds": self.seconds,
            "waited": self.waited,
            "checkpoint_seconds": self.checkpoint_seconds,
            "history": self.log.history(),
        }
        whole, shards = self.sharded.parted_state(self.progress.features)
        step = self.steps_before + self.step
        return Checkpoint(step, {**whole, **self.window.state(), **self.average.state()}, {}, values, shards)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint of this training, whose shards are already loaded (`load_checkpoint`)."""
        self.sharded.make_dense_state()
        whole, _ = self.sharded.parted_state(self.progress.features)
        fill(whole, checkpoint.shared)
        self.window.load_state(checkpoint.shared, self.progress.world.device)
        self.average.load_state(checkpoint.shared)
        self.step = self.resumed_from = checkpoint.step - self.steps_before
        self.timed_steps, self.seconds = checkpoint.values["timed_steps"], checkpoint.values["seconds"]
        self.waited = checkpoint.values["waited"]
        self.checkpoint_seconds = checkpoint.values["checkpoint_seconds"]
        self.log.resume(checkpoint.values["history"])
        self.log.info(checkpoint.resume_message("ranker", self.step, self.num_steps, "last bits"))


class Model(NamedTuple):
    """The pipeline, and the sharded model that it runs batches through.

    Attributes:
        restart_tables: resets the tables and their optimizers' states to those at the start of the training.
    """

    progress: Progress
    sharded: ShardedRanker
    restart_tables: Callable[[], None]


def start_model(
    features: ArmFeatures,
    config: DecidedConfig,
    world: World,
    constants: ModelConstants,
    traffic: Traffic,
    start: WarmStart | None = None,
) -> Model:
    """Build a model with initial weights, or with an earlier ranker's (warm start); deterministic."""
    sharded = build_sharded(features, config, world, constants, traffic)
    if start is not None:
        with raise_on_all_ranks(world, "reading the ranker to start from"):
            start.load(sharded, features)
    progress = Progress(sharded, features, world, NewestEntries(config.model.history))

    def restart_tables() -> None:
        sharded.restart_tables(config.training.seed)
        if start is not None:
            with raise_on_all_ranks(world, "reading the tables to start from"):
                start.load_tables(sharded, features)

    return Model(progress, sharded, restart_tables)


def load_checkpoint(
    checkpoints: Checkpoints | None, sharded: ShardedRanker, features: ArmFeatures
) -> Checkpoint | None:
    """Return a stage's last checkpoint, with its shards loaded into a model; None if there is none.

    Raises:
        CommitError: it belongs to other work.
    """
    return None if checkpoints is None else checkpoints.load(sharded.shards(features))


def learning_rates(training: TrainingConfig, step: int, total: int) -> tuple[float, float]:
    """Return the learning rates of tables and of the rest at a step (0 to total): linear warmup, then linear decay."""
    rise = (step + 1) / (warmup_steps(training, total) + 1)
    fall = 1.0 - (1.0 - training.final_learning_rate) * step / total
    share = min(rise, fall)
    return training.sparse_learning_rate * share, training.dense_learning_rate * share
