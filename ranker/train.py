"""The `ranker` stage: one arm, trained on some dates and measured on later ones (`HoldoutConfig`).

    python -m ranker.train --config FILE --set ranker.arm=side --input dataset=DIR [--input start=DIR] --out DIR

With `start`, the output of an earlier such stage, the training is a warm start from that ranker (`ranker.warm_start`).

`train` is the stage, in reading order: open what the arm reads and decide what the configuration leaves to a rule
(`ranker.preparation`), train (`ranker.fit`), predict every held-out row, write predictions, model and summary.
"""

from functools import partial

import torch

from sidestack.infra.distributed import barrier, raise_on_all_ranks
from sidestack.infra.stage import StageRun, run_stage
from sidestack.infra.tracking import RunLog
from sidestack.ranker.admission import Turnover
from sidestack.ranker.budget import decisions_message
from sidestack.ranker.bundle import describe, save_bundle
from sidestack.ranker.config import AdmissionConfig, RankerConfig
from sidestack.ranker.fit import fit, open_readers, start_model
from sidestack.ranker.predict import predict
from sidestack.ranker.predictions import FOLDER as PREDICTIONS
from sidestack.ranker.preparation import PreparedTraining, prepare_training
from sidestack.ranker.saved_batch import saved_if_not_finite
from sidestack.ranker.summary import write_summary


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
    prepared = prepare_training(run)
    features, config, spec = prepared.features, prepared.config, prepared.dataset.spec
    _log_decisions(run, prepared)
    # All before the training, so that an error in one is raised early.
    readers = open_readers(prepared.fitting, prepared.held_out, config.training, world)
    if run.checkpoints is not None:
        run.checkpoints.keeps = config.training.checkpoints_kept
    start = partial(start_model, features, config, world, prepared.constants, prepared.traffic, prepared.start)
    with saved_if_not_finite(run, describe(features, config, spec)):
        fitted = fit(run, config, readers, start)
    with fitted.trainer.saved_before_stop():
        flops = predict(fitted.model.runner, readers.held_out, config.arm, run.out / PREDICTIONS, run.log)
        with raise_on_all_ranks(world, "saving the model"):
            save_bundle(run.out, fitted.model.sharded, features, fitted.config, spec, world.rank)
    write_summary(run, prepared, fitted, readers.held_out.num_rows, flops)
    run.facts["arm"] = config.arm
    run.facts["sid_fingerprints"] = {name: sid.fingerprint for name, sid in features.sids.items()}
    barrier(world)


def _log_decisions(run: StageRun[RankerConfig], prepared: PreparedTraining) -> None:
    """Log what rules decided, which ids got rows, and which settings have no effect."""
    config, features = prepared.config, prepared.features
    if prepared.start is not None:
        prepared.start.log(run.log, features)
    for column, turnover in prepared.turnover.items():
        run.log.info(f"ranker: {column}: {_turnover_line(turnover, config.model.admission[column])}")
    hashed = [feature.rows for feature in features.tables if feature.is_sid and feature.is_hashed]
    if words := decisions_message(run.config, config, prepared.days, max(hashed, default=0)):
        run.log.info(words)
    if config.training.children == "entire_space" and all(task.given is None for task in features.tasks.values()):
        run.log.warn("ranker.training.children=entire_space changes nothing: no task of the dataset has a parent")
    if config.training.restart_tables and config.training.epochs == 1:
        run.log.warn("ranker.training.restart_tables=true changes nothing: there is one epoch")


def _turnover_line(turnover: Turnover, admission: AdmissionConfig) -> str:
    own = admission.max_rows - admission.fallback_rows
    return (
        f"{turnover.own_rows:,} of {own:,} rows belong to ids: {turnover.admitted:,} admitted, {turnover.evicted:,}"
        f" evicted, {turnover.waiting:,} without room"
    )


def use_tf32(device: torch.device, log: RunLog) -> None:
    """Enable TF32 for this process's float32 matrix products on CUDA; elsewhere log that it has no effect."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        log.warn(f"ranker.training.precision=tf32 changes nothing on a {device.type.upper()}: float32 is used")


def main() -> None:
    """Run the stage from the command line."""
    run_stage("ranker", "ranker", RankerConfig, ["dataset"], train, optional=["start"], is_training=True)


if __name__ == "__main__":
    main()
