"""Prediction of rows: every rank writes the rows that it read."""

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import pyarrow as pa
import torch

from sidestack.infra.distributed import gather, raise_on_all_ranks
from sidestack.infra.errors import TrainingError
from sidestack.infra.lane import Batch
from sidestack.infra.lanes import LaneReader
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.tables import TaskSpec
from sidestack.infra.tracking import RunLog
from sidestack.ranker.cost import count_flops
from sidestack.ranker.metrics import prediction_rows, prediction_schema
from sidestack.ranker.model import StepOutput
from sidestack.ranker.step_runner import StepRunner


@torch.no_grad()
def predict(runner: StepRunner, reader: LaneReader, arm: str, out: Path, log: RunLog, first_row: int = 0) -> float:
    """Predict every row of a reader; each rank writes the rows it read as `part-<rank>.parquet`.

    Args:
        runner: of the model's steps. reader: the rows. arm: the name in the progress bar.
        out: the folder to write. log: shows progress. first_row: the row number of the first row.

    Returns:
        the floating-point operations of one row's forward pass, counted on this rank's first batch: two for each
        multiply-add of a matrix product. Lookups, jagged attention and elementwise operations are not counted.

    Raises:
        TrainingError: on every rank; the total number of rows written differs from the reader's.
    """
    tasks, world = runner.features.tasks, runner.world
    runner.sharded.model.eval()
    path = out / f"part-{world.rank:05d}.parquet"
    steps = runner.run(reader, epoch=0)
    with count_flops() as counter:
        first = next(steps)
    with log.progress(reader.num_rows, f"predict {arm}") as advance, ExitStack() as stack:
        with raise_on_all_ranks(world, "opening predictions"):
            writer = stack.enter_context(TableWriter(path, prediction_schema(tasks)))
        for batch, output in chain([first], steps):
            with raise_on_all_ranks(world, "writing predictions"):
                writer.write(prediction_table(batch, output, tasks, first_row))
            # Only the last batches have padding, so this rank's number of rows approximates every rank's.
            advance(int(batch.valid_N.sum()) * world.size)
        with raise_on_all_ranks(world, "closing predictions"):
            stack.close()
    predicted = sum(gather(world, writer.rows))
    if predicted != reader.num_rows:
        raise TrainingError(f"{out}: {predicted:,} rows were predicted, the held-out dates have {reader.num_rows:,}")
    return float(counter.get_total_flops() / len(first[0].rows_N))


def prediction_table(batch: Batch, output: StepOutput, tasks: Mapping[str, TaskSpec], first_row: int = 0) -> pa.Table:
    """Return a batch's predictions as rows of `prediction_schema`, without the padding."""
    p_TB = output.probabilities_BT.t().contiguous().cpu().numpy()
    table = prediction_rows(batch.rows, first_row + batch.rows_N, p_TB, tasks)
    return table if batch.valid_N.all() else table.filter(pa.array(batch.valid_N))
