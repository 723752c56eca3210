"""The path of a batch from Parquet to its loss, the same in training and in evaluation.

`StepRunner.run` takes the steps; `StepRunner.batches` lists what happens to a batch before its step. A batch carries
the rows that it was made from (`RankerBatch.source`), and the step's output returns them, for callers that need more
than tensors, such as ids.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from sidestack.infra.distributed import World, lockstep_sums
from sidestack.infra.lane import Batch
from sidestack.infra.lanes import LaneReader
from sidestack.infra.prefetch import prefetched
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.loss_check import LossCheck
from sidestack.ranker.model import StepOutput
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.pipeline import RankerPipeline
from sidestack.ranker.reader import ranker_batches, to_ranker_batch
from sidestack.ranker.sharding import ShardedRanker


@dataclass
class StepRunner:
    """A model with its pipeline, run over the batches of one reader after another.

    Attributes:
        sharded: the model. features: what the arm reads. world: the process group.
        newest: cuts histories to the configured bound, and counts the entries cut since this start.
        pipeline: copies, exchanges ids, and trains or predicts, three batches in flight.
        waited: seconds since this start that this rank waited for its own batches, not for other ranks.
    """

    sharded: ShardedRanker
    features: ArmFeatures
    world: World
    newest: NewestEntries
    pipeline: RankerPipeline = field(init=False)
    waited: float = 0.0
    _unchecked: LossCheck | None = None

    def __post_init__(self) -> None:
        """Build the pipeline."""
        self.pipeline = RankerPipeline(self.sharded.model, self.sharded.optimizer, self.world.device)

    def run(
        self, reader: LaneReader, epoch: int, start: int = 0, end: int | None = None
    ) -> Iterator[tuple[Batch, StepOutput]]:
        """Run the batches [start, end) of one epoch, and yield each with its output; `end` defaults to the epoch's.

        The pipeline is empty after the last, so another reader's batches can follow. A step's loss is checked after the
        next step was launched, or by `check_last_loss`, so that the host does not wait for the GPU.

        Raises:
            DataError: rows break the contract; the message names file, row group and column.
            NonFiniteLossError: the message names the batch's files and row groups.
            PreemptedError: a rank was asked to stop; on every rank, after the caller has processed the batch.
        """
        end = reader.num_batches if end is None else end
        state = self.world.state
        assert self._unchecked is None, "the steps of another reader are still running"
        batches = self.batches(reader, epoch, start, end)
        for number in range(start, end):
            state.move(f"batch {number} of epoch {epoch}")
            output = self.pipeline.progress(batches)
            rows = output.source
            assert rows is not None
            place, again = partial(_place, reader, number, rows), partial(self._converted, reader, rows)
            check = LossCheck(output, tuple(self.features.tasks), place, again)
            self.check_last_loss()
            self._unchecked = check
            yield rows, output
            state.stop_if_agreed()
        self.check_last_loss()

    def batches(self, reader: LaneReader, epoch: int, start: int, end: int) -> Iterator[RankerBatch]:
        """Yield the batches [start, end) of an epoch for the pipeline: read, converted, synchronized over ranks.

        Each call of `run` needs a new iterator: the pipeline never calls an exhausted one again.
        """
        converted = ranker_batches(reader, range(epoch, epoch + 1), start, self.features, self.newest, self.world)
        return self.in_lockstep(self._timed(self.prefetched(islice(converted, end - start))))

    def prefetched(self, batches: Iterator[RankerBatch]) -> Iterator[RankerBatch]:
        """Prefetch batches: read and convert them in a thread, ahead of the pipeline."""
        return prefetched(batches, depth=3)

    def in_lockstep(self, batches: Iterator[RankerBatch]) -> Iterator[RankerBatch]:
        """Yield batches in step with the other ranks, each with the counts of the global batch; see `lockstep_sums`."""
        loss, shape_2T = self.sharded.model.module.loss, (2, len(self.features.tasks))
        counted = lockstep_sums(
            self.world, batches, "reading events", lambda batch: loss.counts(batch).flatten(), math.prod(shape_2T)
        )
        for batch, counts in counted:
            batch.counts_2T = counts.view(shape_2T)
            yield batch

    def check_last_loss(self) -> None:
        """Wait for the loss of the last step and check it.

        Raises:
            NonFiniteLossError: see `run`.
        """
        check, self._unchecked = self._unchecked, None
        if check is not None:
            check.require_finite()

    def _timed(self, batches: Iterator[RankerBatch]) -> Iterator[RankerBatch]:
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def _converted(self, reader: LaneReader, rows: Batch) -> RankerBatch:
        kept = self.newest.of(rows, self.features, reader.lane_batch, reader.lanes)
        return to_ranker_batch(kept, self.features)


def _place(reader: LaneReader, number: int, rows: Batch) -> str:
    touched = reader.groups_of(rows.rows_N)
    named = "; ".join(str(group) for group in touched[:4])
    more = f" and {len(touched) - 4} more" if len(touched) > 4 else ""
    return f"batch {number}, this rank's {len(rows.rows_N)} rows are in {named}{more}"
