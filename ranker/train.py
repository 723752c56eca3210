"""The `ranker` stage: one arm, trained on the train dates, measured on the test dates.

    python -m ranker.train --config FILE --set ranker.arm=side --input dataset=DIR --out DIR

In reading order: lay out what the arm reads, shard the model, stream the training events through torchrec's
pipeline, predict every test row, write predictions, checkpoint and summary.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.distributed.checkpoint import state_dict_saver
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from infra.distributed import World, barrier, lockstep, together
from infra.parquet import Batch, LaneReader, RowGroup, TableWriter
from infra.stage import StageRun, run_stage
from infra.tables import Dataset, DatasetSpec, read_dataset
from infra.tracking import RunLog
from ranker.batch import RankerBatch
from ranker.config import RankerConfig, TrainingConfig
from ranker.cost import column_cost, mean_entries, peak_memory_bytes
from ranker.features import HISTORY_IDS, ArmFeatures, arm_features, dataset_sid, require_sids
from ranker.id_tables import describe_tables
from ranker.metrics import PREDICTION_SCHEMA, TrainingWindow, prediction_metrics
from ranker.model import NonFiniteLossError, StepOutput
from ranker.reader import open_events, ranker_batches
from ranker.sharding import ShardedRanker, build_sharded, plan_facts, real_bytes, table_bytes

UNTIMED_STEPS = 10
"""First steps, which the throughput leaves out: tracing, allocation, the reader's first row groups."""


@dataclass(frozen=True)
class Split:
    """One split's event files and what reads them."""

    files: tuple[Path, ...]
    spec: DatasetSpec
    features: ArmFeatures

    def open(self, training: TrainingConfig, world: World, is_training: bool) -> LaneReader:
        """Open the files on every rank, or raise on every rank; see `ranker.reader.open_events`."""
        with together(world, "opening the events"):
            return open_events(self.files, self.features, self.spec, training, world, is_training)


@dataclass
class Progress:
    """torchrec's pipeline over one reader at a time, remembering the rows that are on their way through it.

    Attributes:
        pipeline: copies, exchanges ids, and trains or predicts, three batches in flight.
        features: what the arm reads. world: the process group.
    """

    pipeline: TrainPipelineSparseDist[RankerBatch, StepOutput]
    features: ArmFeatures
    world: World
    _under_way: deque[Batch] = field(default_factory=deque)

    def over(self, reader: LaneReader, epoch: int) -> Iterator[tuple[Batch, StepOutput]]:
        """Run all batches of one epoch, giving each with its output.

        Raises:
            DataError: rows break the contract; the message names file, row group and column.
            NonFiniteLossError: the message names the batch's files and row groups.
        """
        source = ranker_batches(reader.epoch(epoch), self.features, self.world, self._under_way.append)
        # A new iterator object each time: the pipeline never asks an exhausted one again.
        batches = lockstep(self.world, source, "reading events")
        for step in range(reader.num_batches):
            try:
                output = self.pipeline.progress(batches)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error}; {_place(reader, step, self._under_way[0])}") from error
            yield self._under_way.popleft(), output


def _place(reader: LaneReader, step: int, batch: Batch) -> str:
    touched = [group for group in reader.groups if _holds(group, batch.rows_N)]
    named = "; ".join(str(group) for group in touched[:4])
    more = f" and {len(touched) - 4} more" if len(touched) > 4 else ""
    return f"batch {step}, this rank's {len(batch.rows_N)} rows are in {named}{more}"


def _holds(group: RowGroup, rows_N: npt.NDArray[np.int64]) -> bool:
    return bool(((rows_N >= group.start) & (rows_N < group.start + group.rows)).any())


def train(run: StageRun[RankerConfig]) -> None:
    """Train and measure one arm; the body of the stage.

    Raises:
        ConfigError: sizes that do not divide, or tables that no plan fits. DataError: rows that break the contract.
        SpecError: SIDs that are missing or of mixed codebooks.
    """
    config, world = run.config.resolved(), run.world
    with together(world, "opening the dataset"):
        dataset = read_dataset(run.inputs["dataset"])
        fitting, testing = open_splits(dataset, config)
    features = fitting.features
    sharded = build_sharded(features, config, world, mean_entries(fitting.files, HISTORY_IDS))
    pipeline = TrainPipelineSparseDist(sharded.model, sharded.optimizer, world.device)
    progress = Progress(pipeline, features, world)
    speed = fit(progress, sharded, fitting, config, run.log)
    predict(progress, sharded, testing, config, run.out / "predictions", run.log)
    save(sharded, run.out / "checkpoint")
    peak, taken = peak_memory_bytes(world), real_bytes(sharded, world)
    if world.is_main:
        measured = prediction_metrics(sorted((run.out / "predictions").glob("*.parquet")))
        cost = _cost(sharded, fitting.files + testing.files, features, config) | {"peak_memory_bytes": peak}
        plan = {**sharded.plan.described(), "real_bytes": taken}
        (run.out / "plan.json").write_text(json.dumps(plan, indent=1))
        run.log.metrics(speed["steps"], _flat(measured))
        cost |= {"world_size": world.size, "plan": plan_facts(sharded.plan, taken)}
        tables = describe_tables(features, fitting.files, config.model.embedding_dim)
        run.log.summary({"arm": config.arm, "tasks": measured, **cost, **speed, **tables})
        run.log.say(_closing_line(config.arm, measured, speed))
    run.facts["arm"] = config.arm
    run.facts["sid_fingerprint"] = features.sid.fingerprint if features.sid else None
    barrier(world)


def open_splits(dataset: Dataset, config: RankerConfig) -> tuple[Split, Split]:
    """Lay out the arm over the dataset, and give the training and the test split.

    Raises:
        SpecError: the arm's SIDs are missing, or some file's are of another spec or codebook.
        DataError: a split has no files.
    """
    spec = dataset.spec
    features = arm_features(spec, config.content, dataset_sid(dataset))
    splits = tuple(Split(dataset.event_files(*dates), spec, features) for dates in (spec.train, spec.test))
    for split in splits:
        require_sids(features, split.files)
    return splits[0], splits[1]


def fit(progress: Progress, sharded: ShardedRanker, split: Split, config: RankerConfig, log: RunLog) -> dict[str, Any]:
    """Train for the configured epochs, writing the learning curve.

    Returns:
        steps, train_seconds (after the untimed first steps) and samples_per_second over all ranks.
    """
    training = config.training
    reader = split.open(training, progress.world, is_training=True)
    window, step, started = TrainingWindow(), 0, time.monotonic()
    untimed = min(UNTIMED_STEPS, reader.num_batches * training.epochs - 1)
    sharded.model.train()
    total = reader.num_batches * training.epochs
    sharded.set_learning_rates(*learning_rates(training, 0, total))
    with log.progress(total * training.batch_size, f"train {config.arm}") as advance:
        for epoch in range(training.epochs):
            for _, output in progress.over(reader, epoch):
                step += 1
                sharded.set_learning_rates(*learning_rates(training, step, total))
                window.add(output.totals_3T)
                advance(training.batch_size)
                if step == untimed:
                    started = time.monotonic()
                # Whole windows only: the few last steps alone would look like a jump of the curve.
                if step % training.log_every == 0 or step == total < training.log_every:
                    log.metrics(step, window.take())
    seconds = time.monotonic() - started
    rate = (total - untimed) * training.batch_size / seconds
    return {"steps": step, "train_seconds": seconds, "samples_per_second": rate}


def learning_rates(training: TrainingConfig, step: int, total: int) -> tuple[float, float]:
    """Give the learning rates of tables and of the rest for a step (from 0 to total): up, then down linearly."""
    rise = (step + 1) / (training.warmup_steps + 1)
    fall = 1.0 - (1.0 - training.final_learning_rate) * step / total
    share = min(rise, fall)
    return training.sparse_learning_rate * share, training.dense_learning_rate * share


@torch.no_grad()
def predict(
    progress: Progress, sharded: ShardedRanker, split: Split, config: RankerConfig, out: Path, log: RunLog
) -> None:
    """Predict every row of a split; each rank writes the rows it read as `part-<rank>.parquet`."""
    reader = split.open(config.training, progress.world, is_training=False)
    sharded.model.eval()
    path = out / f"part-{progress.world.rank:05d}.parquet"
    with TableWriter(path, PREDICTION_SCHEMA) as writer, log.progress(reader.num_rows, "test") as advance:
        for batch, output in progress.over(reader, epoch=0):
            with together(progress.world, "writing predictions"):
                writer.write(prediction_table(batch, output))
            # Padding is at most the last batches' share, so this rank's rows stand for every rank's.
            advance(int(batch.valid_N.sum()) * progress.world.size)
    barrier(progress.world)


def prediction_table(batch: Batch, output: StepOutput) -> pa.Table:
    """Give a batch's predictions as rows of `PREDICTION_SCHEMA`, without the padding."""
    p_click_B, p_conversion_B = output.probabilities_BT.t().contiguous().cpu().numpy()
    conversion = pc.if_else(pc.equal(batch.table["click"], 1), batch.table["conversion"], None)
    columns = [
        pa.array(batch.rows_N),
        *(batch.table[name] for name in ("user_id", "item_id", "event_time", "click")),
        conversion,
        pa.array(p_click_B),
        pa.array(p_conversion_B),
    ]
    table = pa.table(columns, schema=PREDICTION_SCHEMA)
    return table if batch.valid_N.all() else table.filter(pa.array(batch.valid_N))


def save(sharded: ShardedRanker, path: Path) -> None:
    """Save model and optimizer by torch's distributed checkpoint: every rank its shards, loadable by any number."""
    state = {"model": sharded.model.state_dict(), "optimizer": sharded.optimizer.state_dict()}
    state_dict_saver.save(state, checkpoint_id=path)


def _cost(
    sharded: ShardedRanker, files: tuple[Path, ...], features: ArmFeatures, config: RankerConfig
) -> dict[str, Any]:
    content = column_cost(files, tuple(features.sid_columns))
    dim = config.model.embedding_dim
    tables = table_bytes(features, dim)
    dense = sum(parameter.numel() for parameter in sharded.dense_optimizer.params.values())
    return {
        "sid_table_bytes": table_bytes(features, dim, only_sids=True),
        "table_bytes": tables,
        "feature_bytes_per_row": content.compressed,
        "feature_bytes_per_row_uncompressed": content.uncompressed,
        "parameters": dense + tables // 4,
    }


def _flat(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
    kinds = ("ne", "auc", "calibration")
    return {
        f"test_{task}_{kind}": values[kind]
        for task, values in measured.items()
        for kind in kinds
        if values[kind] is not None
    }


def _closing_line(arm: str, measured: dict[str, dict[str, Any]], speed: dict[str, Any]) -> str:
    parts = [f"{name} {value:.4f}" for name, value in _flat(measured).items() if "calibration" not in name]
    return f"{arm}: {', '.join(parts)}, {speed['samples_per_second']:,.0f} samples/s"


def main() -> None:
    """Run the stage from the command line."""
    run_stage("ranker", "ranker", RankerConfig, ["dataset"], train)


if __name__ == "__main__":
    main()
