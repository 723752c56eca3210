"""Stage `encoder`: train the VQ-fusion auto-encoder on the items table, on any number of ranks.

    python -m encoder.train --config FILE --input dataset=DIR [--input start=DIR] --out DIR

With `start`, the output of an earlier such stage, the training is warm-started from that encoder with its codebook
frozen (`encoder.refresh`).

`train` is the stage; its training loop is in `encoder.trainer`.
"""

import torch

from sidestack.encoder.budget import DecidedConfig, DecidedTraining, decide, decisions_message, describe_decisions
from sidestack.encoder.bundle import EncoderBundle, codebook_digest, save_bundle
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.holdout import collect_held_out
from sidestack.encoder.refresh import load_start, open_start
from sidestack.encoder.signals import SignalBatch, SignalSpec, chosen_signals, signal_check
from sidestack.encoder.trainer import Trainer
from sidestack.encoder.training_state import seed_rank
from sidestack.infra.distributed import World, gather, raise_on_all_ranks
from sidestack.infra.errors import ConfigError
from sidestack.infra.lanes import LaneReader
from sidestack.infra.revisions import Revisions, read_revisions
from sidestack.infra.rows import FileRows
from sidestack.infra.snapshot import CONTENT, Dataset, content_digest, read_dataset
from sidestack.infra.stage import StageRun, run_stage


def train(run: StageRun[EncoderConfig]) -> None:
    """Train, evaluate on held-out items, and write the encoder bundle to `run.out`.

    Raises:
        ConfigError, DataError: a setting or a row breaks a rule, `start` does not fit, or the loss stops being finite.
        TrainingError: digits have collapsed and `collapse` is "stop", or ranks hold different weights.
        CommitError: a partition is missing or was altered, or there is a checkpoint of other work next to the output.
        PreemptedError: a rank was asked to stop; on every rank, after a step that was saved.
    """
    world, entity = run.world, run.config.entity
    with raise_on_all_ranks(world, "opening the dataset"):
        dataset = read_dataset(run.inputs["dataset"])
        signals = chosen_signals(run.config.signals, dataset.spec, entity)
        start = open_start(run.inputs["start"], run.config, signals) if "start" in run.inputs else None
    num_rows = dataset.spec.content(entity).rows
    config = decide(run.config, num_rows)
    if words := decisions_message(run.config, config, num_rows):
        run.log.info(words)
    dataset.verify(world, dataset.partitions(CONTENT[entity]))
    with raise_on_all_ranks(world, "opening the rows"):
        reader = signal_reader(dataset, signals, config.training, world, shuffled=True)
        revisions = read_revisions(dataset, entity)
    torch.manual_seed(config.training.seed)  # the same initial weights on every rank
    model = VQFusion(config, signals)
    if start is not None:
        load_start(model, start)
        run.log.info(f"encoder: starts from {run.inputs['start']}, revision {start.revision[:12]}; codebook frozen")
    model.to(world.device)
    if not world.is_main:  # rank 0's generator continues from the initial weights
        seed_rank(config.training.seed, world)
    holdout = _holdout(dataset, signals, config.training, world, revisions)
    trainer = Trainer(model, config.training, reader, revisions, holdout, run)
    trainer.resume()
    with run.log.progress(trainer.num_steps, "encoder: steps") as advance:
        trainer.run(advance)
    with world.state.finishing():  # the rest takes seconds
        _close(run, config, trainer, start, num_rows)


def _close(
    run: StageRun[EncoderConfig], config: DecidedConfig, trainer: "Trainer", start: EncoderBundle | None, num_rows: int
) -> None:
    """Write the encoder bundle and the summary."""
    world, model = run.world, trainer.model
    budget = describe_decisions(run.config, config, num_rows, trainer.point_every)
    lineage = [] if start is None else list(start.lineage)
    run.log.summary({**trainer.summary(), "budget": budget, "refreshed_from": lineage})
    assert start is None or codebook_digest(model) == codebook_digest(start.model), "a frozen codebook has changed"
    with raise_on_all_ranks(world, "writing the encoder bundle"):
        if world.is_main:
            saved = save_bundle(run.out, model, config, start)
            run.facts.update(fingerprint=saved.spec.fingerprint, revision=saved.lineage[-1])
    run.log.info(trainer.closing_line())


def signal_reader(
    dataset: Dataset, signals: SignalSpec, training: DecidedTraining, world: World, *, shuffled: bool
) -> LaneReader:
    """Return a reader of the signals, shuffled without a last partial batch, or in order."""
    return LaneReader(
        FileRows(dataset.content_files(signals.entity), signals.columns, signal_check(dataset.spec, signals.entity)),
        batch_size=training.batch_size,
        lanes=training.lanes,
        rank=world.rank,
        world_size=world.size,
        seed=training.seed if shuffled else None,
    )


def _holdout(
    dataset: Dataset, signals: SignalSpec, training: DecidedTraining, world: World, revisions: Revisions
) -> SignalBatch:
    with raise_on_all_ranks(world, "reading the held-out items"):
        reader = signal_reader(dataset, signals, training, world, shuffled=False)
        rows = training.holdout_rows // world.size
        holdout = collect_held_out(reader, signals, training.holdout_share, rows, revisions)
    if not sum(gather(world, len(holdout))):
        raise ConfigError(
            f"encoder.training.holdout_share={training.holdout_share}, holdout_rows={training.holdout_rows}: hold out"
            f" none of the {dataset.spec.content(signals.entity).rows} {signals.entity}s on {world.size} ranks"
        )
    return holdout.to(world.device)


def main() -> None:
    """Run the stage from the command line."""
    run_stage(
        "encoder", "encoder", EncoderConfig, ["dataset"], train,
        identify={"dataset": lambda config, path: content_digest(path, config.entity)}, optional=["start"],
        is_training=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
