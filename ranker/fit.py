"""Fit one arm: build the model, find the number of epochs if a validation window decides it, train, resume."""

import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import NamedTuple

from sidestack.infra.checkpoint import Checkpoint, Checkpoints
from sidestack.infra.distributed import World, raise_on_all_ranks
from sidestack.infra.lanes import LaneReader
from sidestack.infra.stage import StageRun
from sidestack.ranker.budget import DecidedConfig, DecidedTraining, with_epochs, without_window
from sidestack.ranker.config import Dates, RankerConfig, iso_dates
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.planner import Traffic
from sidestack.ranker.reader import Split
from sidestack.ranker.sharding import build_sharded
from sidestack.ranker.step_runner import StepRunner
from sidestack.ranker.trainer import Model, Trainer
from sidestack.ranker.validation import EpochSearch, Validation
from sidestack.ranker.warm_start import WarmStart


class SearchRows(NamedTuple):
    """The training rows before the validation window, the window's rows, and its first and last date."""

    before: LaneReader
    window: LaneReader
    dates: Dates


class Readers(NamedTuple):
    """The rows of a stage.

    Attributes:
        training: all rows to train on. held_out: the rows to measure on.
        search: the rows of the search for the number of epochs; None: there is no validation window.
    """

    training: LaneReader
    held_out: LaneReader
    search: SearchRows | None


def open_readers(fitting: Split, held_out: Split, training: DecidedTraining, world: World) -> Readers:
    """Open the rows of all splits; every rank must call.

    Raises:
        ConfigError, DataError: see `Split.open`; or the validation window would leave no date to train on.
    """
    search = None
    if dates := without_window(fitting.dates, training):
        before, window = (replace(fitting, dates=each) for each in dates)
        rows = before.open(training, world, is_training=True), window.open(training, world, is_training=False)
        search = SearchRows(*rows, window.dates)
    return Readers(fitting.open(training, world, True), held_out.open(training, world, False), search)


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
    runner = StepRunner(sharded, features, world, NewestEntries(config.model.history))

    def restart_tables() -> None:
        sharded.restart_tables(config.training.seed)
        if start is not None:
            with raise_on_all_ranks(world, "reading the tables to start from"):
                start.load_tables(sharded, features)

    return Model(runner, restart_tables)


def load_checkpoint(checkpoints: Checkpoints | None, model: Model) -> Checkpoint | None:
    """Return a stage's last checkpoint, with its shards loaded into a model; None if there is none.

    Raises:
        CommitError: it belongs to other work.
    """
    return None if checkpoints is None else checkpoints.load(model.sharded.shards(model.runner.features))


class Fitted(NamedTuple):
    """A trained model.

    Attributes:
        trainer: of the finished training. config: with the number of epochs that it was trained for.
        validation: the window's results; None: there was no window.
    """

    model: Model
    trainer: Trainer
    config: DecidedConfig
    validation: Validation | None


def fit(run: StageRun[RankerConfig], config: DecidedConfig, readers: Readers, start: Callable[[], Model]) -> Fitted:
    """Train for the configured epochs or those that a window decides; resume from the last checkpoint if any.

    Args:
        run: the stage's. config: with epochs, or with a window and the maximum of epochs. readers: the rows.
        start: builds the model.
    """
    model = start()
    checkpoint = load_checkpoint(run.checkpoints, model)
    validation: Validation | None = None
    if readers.search is not None:
        if checkpoint is not None and checkpoint.values["phase"] == "train":
            validation = Validation(**checkpoint.values["validation"])
        else:
            validation = search_epochs(run, config, model, readers.search, checkpoint)
            del model, checkpoint
            gc.collect()  # the next model takes as much memory
            with run.world.state.finishing():  # the next training's first checkpoint has the window's results
                model, checkpoint = start(), None
        config = with_epochs(config, validation.best)
    before = 0 if validation is None else validation.steps
    trainer = Trainer(model, readers.training, config.training, run, steps_before=before)
    trainer.validation_state = lambda: None if validation is None else asdict(validation)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    progress = run.log.progress(trainer.num_steps * config.training.batch_size, f"train {config.arm}")
    with trainer.saved_before_stop(), progress as advance:
        trainer.run(advance)
    return Fitted(model, trainer, config, validation)


def search_epochs(
    run: StageRun[RankerConfig],
    config: DecidedConfig,
    model: Model,
    rows: SearchRows,
    checkpoint: Checkpoint | None,
) -> Validation:
    """Train without the validation window, and return and log its results; see `ranker.validation`."""
    trainer = Trainer(model, rows.before, config.training, run, "search")
    search = EpochSearch(trainer, rows.window, iso_dates(rows.dates))
    if checkpoint is not None:
        search.resume(checkpoint)
    progress = run.log.progress(trainer.num_steps * config.training.batch_size, f"search {config.arm}")
    with trainer.saved_before_stop(), progress as advance:
        found = search.run(advance)
    by_epoch = ", ".join(f"{mean:.4f}" for mean in found.means)
    run.log.info(
        f"ranker: epochs={found.best}, of at most {config.training.epochs}: mean NE on the validation window, epoch by"
        f" epoch: {by_epoch}; {found.seconds:.0f} s"
    )
    return found
