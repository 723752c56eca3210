"""Parquet to batches: only the columns an arm needs, checked when read, without a Python loop over rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from sidestack.encoder.sid.columns import require_spec
from sidestack.infra.checks import check_events
from sidestack.infra.distributed import World, raise_on_all_ranks
from sidestack.infra.errors import DataError
from sidestack.infra.impressions import ImpressionRows, columns_by_table
from sidestack.infra.lane import Batch
from sidestack.infra.lanes import LaneReader
from sidestack.infra.parquet import RowGroup
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.rows import Check, Rows
from sidestack.infra.snapshot import CONTENT, Dataset
from sidestack.infra.tables import DatasetSpec
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.budget import DecidedTraining
from sidestack.ranker.config import Dates
from sidestack.ranker.convert import (
    JaggedIds,
    as_array,
    as_numpy,
    bag_ids,
    known,
    model_inputs,
    sequence_ids,
    without_nulls,
)
from sidestack.ranker.features import HISTORY_IDS, ArmFeatures
from sidestack.ranker.id_feature import IdFeature
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.spans import Span, SpannedRows, mask_uncounted, open_impressions, spans_of

Integers = npt.NDArray[np.int64]

WHOLE = 2**62
"""A bound above the rows of any request and the entries of any history."""


@dataclass(frozen=True)
class Split:
    """The dates of a training or held-out split, and the features that an arm reads on them.

    Attributes:
        dates: first and last. dataset: the snapshot. features: what the arm reads.
        labels: by task, the first and last date whose labels count; None: those of all tasks, on all dates.
        max_length: the most entries that the arm keeps of a history; None: all.
    """

    dates: Dates
    dataset: Dataset
    features: ArmFeatures
    labels: Mapping[str, Dates] | None = None
    max_length: int | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The dates whose rows are read, in order."""
        tasks = self.dataset.spec.tasks
        return spans_of(self.dates, dict.fromkeys(tasks, self.dates) if self.labels is None else self.labels)

    def rows(self) -> ImpressionRows | SpannedRows:
        """Return the split's impressions with the columns that the arm reads, checked when read.

        Raises:
            DataError: there are no events on these dates.
        """
        return self.read(self.features.columns, partial(check_rows, features=self.features, spec=self.dataset.spec))

    def read(self, columns: Sequence[str], check: Check | None = None) -> ImpressionRows | SpannedRows:
        """Return the split's impressions with some columns.

        Raises:
            DataError: there are no events on these dates.
        """
        return open_impressions(self.dataset, self.dates, self.labels, columns, check)

    def entries(self, table: str) -> list[PartitionEntry]:
        """Return a table's partitions on the split's dates, in order."""
        if self.labels is None:
            return list(self.dataset.partitions(table, *self.dates))
        return [entry for span in self.spans for entry in self.dataset.partitions(table, *span.dates)]

    @property
    def partitions(self) -> list[PartitionEntry]:
        """The partitions of everything that the arm reads."""
        tables = columns_by_table(self.dataset, self.features.columns)
        return [entry for of_kind in tables for table in of_kind for entry in self.entries(table)]

    def open(self, training: DecidedTraining, world: World, is_training: bool) -> LaneReader:
        """Open the rows for training (shuffled by the seed, whole batches) or evaluation (in order, every row).

        Every rank must call; an error on one rank is raised on all.

        Raises:
            ConfigError: ranks, lanes and batch size do not divide. DataError: too few rows.
        """
        with raise_on_all_ranks(world, "opening the events"):
            return LaneReader(
                self.rows(),
                batch_size=training.batch_size if is_training else training.eval_batch_size,
                lanes=training.lanes,
                rank=world.rank,
                world_size=world.size,
                seed=training.seed if is_training else None,
                windows=self.windows(training.window_days) if is_training else (0,),
                keep_rows=(training.rows_per_request or WHOLE) if is_training else 1,
                weigh=partial(history_entries, max_length=self.max_length),
            )

    def windows(self, days: int | None) -> tuple[int, ...]:
        """Return the row numbers at which windows of `days` days begin; None: all dates are one window."""
        if days is None:
            return (0,)
        first, starts, rows = self.dates[0], {0: 0}, 0
        for entry in self.entries("events"):
            starts.setdefault((entry.date - first).days // days, rows)
            rows += entry.rows
        return tuple(sorted({start for start in starts.values() if start < max(rows, 1)}))


def history_entries(rows: Rows, max_length: int | None = None) -> Integers:
    """Return how many entries of each row's history are kept, at most the newest `max_length`: int64 [N]."""
    assert rows.shared is not None
    lengths_R: Integers = pc.list_value_length(rows.shared[HISTORY_IDS]).to_numpy().astype(np.int64)
    return np.minimum(lengths_R, max_length or WHOLE)[rows.run_N]


def content_read(dataset: Dataset, features: ArmFeatures) -> list[PartitionEntry]:
    """Return the partitions of the raw embeddings that an arm uses."""
    entities = sorted(features.constants.embeddings)
    return [entry for entity in entities for entry in dataset.partitions(CONTENT[entity])]


def check_rows(table: pa.Table, where: RowGroup, *, features: ArmFeatures, spec: DatasetSpec) -> None:
    """Check rows of one table against its contract, and every SID against its spec and its range of ids.

    fbgemm turns an id outside its table into a silent zero; here it is an error.

    Raises:
        DataError: names file, row group, column and rule. SpecError: a column has SIDs of another spec or codebook.
    """
    check_events(table, spec, where)
    for column, sid in features.sid_columns.items():
        if column not in table.column_names:
            continue
        require_spec(table.schema, column, sid, where.path)
        first = 1 if sid.packing == "paper_eq5" else 0
        number = sid.radix ** (sid.chunk_sizes[sid.chunk] + first)
        _check_sids(table[column], column, number, where)


def _check_sids(column: pa.ChunkedArray, name: str, number: int, where: RowGroup) -> None:
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    if values.type != pa.int64():
        raise DataError(f"{where}: column {name!r} has type {column.type}, must hold int64")
    bounds = pc.min_max(values)
    low, high = bounds["min"].as_py(), bounds["max"].as_py()
    if low is not None and (low < 0 or high >= number):
        wrong = low if low < 0 else high
        raise DataError(f"{where}: column {name!r}: id {wrong} is outside [0, {number}), what its digits spell")


def to_ranker_batch(batch: Batch, features: ArmFeatures) -> RankerBatch:
    """Convert one rank's rows to the model's batch."""
    return next(_block(batch, features).split(len(batch.rows_N)))


def _block(batch: Batch, features: ArmFeatures) -> RankerBatch:
    """Convert the rows of several batches to one batch, to be split."""
    own, requests = batch.rows.own, batch.rows.shared
    assert requests is not None
    labels_BT, weights_BT = _labels(batch, tuple(features.tasks))
    return RankerBatch(
        **vars(model_inputs(batch.rows, features, is_laid_out=False)),
        bags=_keyed(features.row_bags, bag_ids(own, features.row_bags)),
        request_bags=_keyed(features.request_bags, bag_ids(requests, features.request_bags)),
        sequences=_keyed(features.sequences, sequence_ids(requests, features.sequences)),
        labels_BT=labels_BT,
        weights_BT=weights_BT,
    )


def _keyed(features: tuple[IdFeature, ...], found: JaggedIds) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=[feature.column for feature in features],
        values=torch.from_numpy(np.concatenate(found.ids)),
        lengths=torch.from_numpy(np.concatenate(found.lengths)),
    )


def _labels(batch: Batch, tasks: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    labels_BT, weights_BT = np.empty((2, batch.table.num_rows, len(tasks)), np.float32)
    for place, task in enumerate(tasks):
        column = as_array(batch.table, task)
        labels_BT[:, place] = as_numpy(without_nulls(column))
        weights_BT[:, place] = batch.valid_N & known(mask_uncounted(batch.table, task, column))
    return torch.from_numpy(labels_BT), torch.from_numpy(weights_BT)


def ranker_batches(
    reader: LaneReader, epochs: range, start: int, features: ArmFeatures, newest: NewestEntries, world: World
) -> Iterator[RankerBatch]:
    """Yield converted batches, in pinned memory for a GPU, each with the rows it was made from.

    Args:
        reader: the rows. epochs: the epochs to read, in order. start: the first batch of the first epoch.
        features: what the arm reads. newest: cuts long histories. world: the process group.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # a prefetch thread starts on the first GPU
    size = reader.batch_rows
    for block in reader.blocks(epochs, start):
        whole = _block(newest.of(block, features, reader.lane_batch, reader.lanes), features)
        for rows, batch in zip(block.split(size), whole.split(size), strict=True):
            batch.source = rows
            yield batch.pin_memory() if world.device.type == "cuda" else batch
