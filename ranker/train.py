"""The `ranker` stage: one arm, trained on some dates and measured on later ones (`HoldoutConfig`).

    python -m ranker.train --config FILE --set ranker.arm=side --input dataset=DIR [--input start=DIR] --out DIR

With `start`, the output of an earlier such stage, the training is a warm start from that ranker (`ranker.warm_start`).

In reading order: decide what the configuration leaves to a rule, lay out what the arm reads, find the number of epochs
if a validation window decides it, shard the model, stream the training events through torchrec's pipeline, predict
every held-out row, write predictions, model and summary.
"""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from sidestack.infra.checkpoint import Checkpoint
from sidestack.infra.distributed import World, barrier, gather, raise_on_all_ranks
from sidestack.infra.lanes import LaneReader
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import StageRun, run_stage
from sidestack.infra.tracking import RunLog
from sidestack.ranker.admission import Turnover
from sidestack.ranker.budget import (
    Day,
    DecidedConfig,
    DecidedTraining,
    decide,
    decisions_message,
    describe_decisions,
    training_days,
    with_epochs,
    without_window,
)
from sidestack.ranker.bundle import FOLDER as MODEL
from sidestack.ranker.bundle import describe, save_bundle
from sidestack.ranker.config import AdmissionConfig, Dates, RankerConfig
from sidestack.ranker.constants import read_constants
from sidestack.ranker.cost import column_cost, embedding_bytes, expected_traffic, peak_memory_bytes
from sidestack.ranker.features import ArmFeatures, arm_features, dataset_sids
from sidestack.ranker.fit import Fit, Model, load_checkpoint, start_model
from sidestack.ranker.id_counts import admit_ids
from sidestack.ranker.id_tables import describe_tables
from sidestack.ranker.metric_registry import all_metrics, compared_metrics
from sidestack.ranker.metrics import named_metrics, prediction_metrics
from sidestack.ranker.predict import predict
from sidestack.ranker.predictions import FOLDER as PREDICTIONS
from sidestack.ranker.reader import Split, content_read
from sidestack.ranker.row_maps import with_row_maps
from sidestack.ranker.saved_batch import saved_if_not_finite
from sidestack.ranker.scaling import dense_moments
from sidestack.ranker.sharding import ShardedRanker, plan_facts, real_bytes, table_bytes
from sidestack.ranker.validation import EpochSearch, Validation
from sidestack.ranker.warm_start import WarmStart, open_start


class Opened(NamedTuple):
    """The opened inputs of a stage.

    Attributes:
        fitting: the rows to train on. held_out: those to measure on. days: the training dates.
        start: the earlier ranker of a warm start; None: initial weights.
        config: with every rule decided.
    """

    dataset: Dataset
    fitting: Split
    held_out: Split
    days: list[Day]
    start: WarmStart | None
    config: DecidedConfig


def open_inputs(run: StageRun[RankerConfig]) -> Opened:
    """Open the dataset and the earlier ranker, and return them with the arm's splits and decided configuration.

    Raises:
        ConfigError, SpecError, DataError: see `train`.
    """
    dataset = read_dataset(run.inputs["dataset"])
    fitting, held_out = open_splits(dataset, run.config)
    start = None
    if "start" in run.inputs:
        start = open_start(run.inputs["start"], run.config, dataset.spec, fitting.features)
        features = start.features(fitting.features)
        fitting, held_out = (replace(split, features=features) for split in (fitting, held_out))
    days = training_days(dataset, *(span.dates for span in fitting.spans))
    return Opened(dataset, fitting, held_out, days, start, decide(run.config, days))


def train(run: StageRun[RankerConfig]) -> None:
    """Train and measure one arm; the body of the stage.

    Raises:
        ConfigError: sizes do not divide, tables fit no plan, or the start is of another arm.
        DataError: rows break the contract. SpecError: SIDs are missing or of mixed codebooks.
        CommitError: there is a checkpoint of other work.
    """
    world = run.world
    if run.config.training.precision == "tf32":
        use_tf32(world.device, run.log)
    with raise_on_all_ranks(world, "opening the dataset"):
        dataset, fitting, held_out, days, start, config = open_inputs(run)
    read = content_read(dataset, fitting.features)
    dataset.verify(world, [*read, *fitting.partitions, *held_out.partitions])
    earlier = None if start is None else start.bundle.path
    changed = admit_ids(run.out / MODEL, fitting, config.model.admission, earlier, world)
    with raise_on_all_ranks(world, "reading the rows of ids"):
        features = with_row_maps(fitting.features, run.out / MODEL)
    fitting, held_out = (replace(split, features=features) for split in (fitting, held_out))
    with raise_on_all_ranks(world, "reading what content needs"):
        constants = read_constants(dataset, features.constants)
        traffic = expected_traffic(dataset, fitting.dates, config.training)
    if start is None:
        constants = replace(constants, dense_2F=dense_moments(fitting, world))
    else:
        start.log(run.log, features)
    _log_decisions(run, config, days, features, changed)
    # All before the training, so that an error in one is raised early.
    readers = open_readers(fitting, held_out, config.training, world)
    if run.checkpoints is not None:
        run.checkpoints.keeps = config.training.checkpoints_kept
    with saved_if_not_finite(run, describe(features, config, dataset.spec)):
        fitted = fit(run, config, readers, partial(start_model, features, config, world, constants, traffic, start))
    config, sharded, progress = fitted.config, fitted.model.sharded, fitted.model.progress
    with fitted.training.saved_before_stop():
        flops = predict(progress, sharded, readers.held_out, config.arm, run.out / PREDICTIONS, run.log)
        with raise_on_all_ranks(world, "saving the model"):
            save_bundle(run.out, sharded, features, config, dataset.spec, world.rank)
    entries, entries_cut = np.sum(gather(world, progress.newest.counts), axis=0).tolist()
    facts = {
        "budget": describe_decisions(run.config, config, days, fitted.summary["steps"])
        | {"validation": fitted.validation},
        "dates": {"train": _iso(fitting.dates), "held_out": _iso(held_out.dates)},
        "labels": {name: _by_task(split) for name, split in (("train", fitting), ("held_out", held_out))},
        "world_size": world.size,
        "held_out_rows": readers.held_out.num_rows,
        "flops_per_sample": flops,
        "history_entries_cut": entries_cut,
        "admission": {column: turnover._asdict() for column, turnover in changed.items()},
        "starts_from": None if start is None else {"path": str(run.inputs["start"]), "sids_anew": start.sids_anew},
        "peak_memory_bytes": peak_memory_bytes(world),
    }
    taken = real_bytes(sharded, world)
    if world.is_main:
        if entries_cut:
            run.log.info(f"histories were cut to their newest entries: {entries_cut:,} of {entries:,} were left out")
        _close(run, config, sharded, (fitting, held_out), taken, {**fitted.summary, **facts})
    run.facts["arm"] = config.arm
    run.facts["sid_fingerprints"] = {name: sid.fingerprint for name, sid in features.sids.items()}
    barrier(world)


def _log_decisions(
    run: StageRun[RankerConfig],
    config: DecidedConfig,
    days: Sequence[Day],
    features: ArmFeatures,
    changed: Mapping[str, Turnover],
) -> None:
    """Log what rules decided, which ids got rows, and which settings have no effect."""
    for column, turnover in changed.items():
        run.log.info(f"ranker: {column}: {_turnover_line(turnover, config.model.admission[column])}")
    hashed = [feature.rows for feature in features.tables if feature.is_sid and feature.is_hashed]
    if words := decisions_message(run.config, config, days, max(hashed, default=0)):
        run.log.info(words)
    if config.training.children == "entire_space" and all(task.given is None for task in features.tasks.values()):
        run.log.warn("ranker.training.children=entire_space changes nothing: no task of the dataset has a parent")
    if config.training.restart_tables and config.training.epochs == 1:
        run.log.warn("ranker.training.restart_tables=true changes nothing: there is one epoch")


def use_tf32(device: torch.device, log: RunLog) -> None:
    """Enable TF32 for this process's float32 matrix products on CUDA; elsewhere log that it has no effect."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        log.warn(f"ranker.training.precision=tf32 changes nothing on a {device.type.upper()}: float32 is used")


def _close(
    run: StageRun[RankerConfig],
    config: RankerConfig,
    sharded: ShardedRanker,
    splits: tuple[Split, Split],
    taken: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Measure the predictions, and write the plan and the summary."""
    fitting, held_out = splits
    measured = prediction_metrics(run.out, tuple(fitting.features.tasks))
    plan = {**sharded.plan.describe(), "real_bytes": taken}
    (run.out / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
    summary = {
        "arm": config.arm,
        "tasks": measured,
        **_cost(sharded, fitting, config),
        **facts,
        "plan": plan_facts(sharded.plan, taken),
        **describe_tables(fitting, held_out, config.model.embedding_dim),
    }
    run.log.metrics(facts["steps"], named_metrics(config.holdout.kind, measured, all_metrics()))
    run.log.summary(summary)
    run.log.info(_closing_line(config, measured, facts))


def open_splits(dataset: Dataset, config: RankerConfig) -> tuple[Split, Split]:
    """Return the arm's training and held-out splits of the dataset.

    Raises:
        SpecError: the arm's SIDs are missing. DataError: a split has no events. ConfigError: a task is unknown.
    """
    holdout = config.holdout
    holdout.require_tasks(dataset.spec.tasks)
    features = arm_features(dataset.spec, config, dataset_sids(dataset))
    dates, held_out_dates = holdout.windows(dataset.spec)
    fitting = Split(dates, dataset, features, holdout.learned_labels, config.model.history.max_length)
    held_out = Split(held_out_dates, dataset, features, holdout.measured_labels)
    for split in (fitting, held_out):
        split.rows()
    return fitting, held_out


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


class Fitted(NamedTuple):
    """A trained model.

    Attributes:
        training: the finished training. config: with the number of epochs that it was trained for.
        summary: see `Fit.summary`.
        validation: the window's results, JSON-ready; None: there was no window.
    """

    model: Model
    training: Fit
    config: DecidedConfig
    summary: dict[str, Any]
    validation: dict[str, Any] | None


def fit(run: StageRun[RankerConfig], config: DecidedConfig, readers: Readers, start: Callable[[], Model]) -> Fitted:
    """Train for the configured epochs or those that a window decides; resume from the last checkpoint if any.

    Args:
        run: the stage's. config: with epochs, or with a window and the maximum of epochs. readers: the rows.
        start: builds the model.
    """
    model = start()
    checkpoint = load_checkpoint(run.checkpoints, model.sharded, model.progress.features)
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
    training = Fit(*model, readers.training, config.training, run, steps_before=before)
    found = None if validation is None else asdict(validation)
    training.carried = lambda: found
    if checkpoint is not None:
        training.restore(checkpoint)
    progress = run.log.progress(training.num_steps * config.training.batch_size, f"train {config.arm}")
    with training.saved_before_stop(), progress as advance:
        training.run(advance)
    return Fitted(model, training, config, training.summary(), found)


def search_epochs(
    run: StageRun[RankerConfig],
    config: DecidedConfig,
    model: Model,
    rows: SearchRows,
    checkpoint: Checkpoint | None,
) -> Validation:
    """Train without the validation window, and return and log its results; see `ranker.validation`."""
    training = Fit(*model, rows.before, config.training, run, "search")
    search = EpochSearch(training, rows.window, _iso(rows.dates))
    if checkpoint is not None:
        search.resume(checkpoint)
    progress = run.log.progress(training.num_steps * config.training.batch_size, f"search {config.arm}")
    with training.saved_before_stop(), progress as advance:
        found = search.run(advance)
    by_epoch = ", ".join(f"{mean:.4f}" for mean in found.means)
    run.log.info(
        f"ranker: epochs={found.best}, of at most {config.training.epochs}: mean NE on the validation window, epoch by"
        f" epoch: {by_epoch}; {found.seconds:.0f} s"
    )
    return found


def _cost(sharded: ShardedRanker, split: Split, config: RankerConfig) -> dict[str, Any]:
    features = split.features
    content = column_cost(split.dataset, split.dates, tuple(features.sid_columns))
    raw = embedding_bytes(features, split.dataset, split.dates)
    dim = config.model.embedding_dim
    tables = table_bytes(features, dim)
    dense = sum(parameter.numel() for parameter in sharded.dense_optimizer.params.values())
    return {
        "sid_table_bytes": table_bytes(features, dim, only_sids=True),
        "table_bytes": tables,
        "feature_bytes_per_row": content.compressed + raw,
        "feature_bytes_per_row_uncompressed": content.uncompressed + raw,
        "parameters": dense + tables // 4,
    }


def _by_task(split: Split) -> dict[str, list[str]] | None:
    return None if split.labels is None else {task: _iso(dates) for task, dates in split.labels.items()}


def _turnover_line(turnover: Turnover, admission: AdmissionConfig) -> str:
    own = admission.max_rows - admission.fallback_rows
    return (
        f"{turnover.own_rows:,} of {own:,} rows belong to ids: {turnover.admitted:,} admitted, {turnover.evicted:,}"
        f" evicted, {turnover.waiting:,} without room"
    )


def _iso(dates: Dates) -> list[str]:
    return [day.isoformat() for day in dates]


def _closing_line(config: RankerConfig, measured: dict[str, dict[str, Any]], speed: dict[str, Any]) -> str:
    shown = [metric.name for metric in compared_metrics()]
    parts = [f"{name} {value:.4f}" for name, value in named_metrics(config.holdout.kind, measured, shown).items()]
    return f"{config.arm}: {', '.join(parts)}, {speed['samples_per_second']:,.0f} samples/s"


def main() -> None:
    """Run the stage from the command line."""
    run_stage("ranker", "ranker", RankerConfig, ["dataset"], train, optional=["start"], is_training=True)


if __name__ == "__main__":
    main()
