"""Measured costs of an arm: bytes of its columns in the Parquet files, floating-point operations, peak memory."""

import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow.parquet as pq
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from sidestack.infra.distributed import World, gather
from sidestack.infra.footer import read_footer
from sidestack.infra.impressions import columns_by_table
from sidestack.infra.rows import CountedFile
from sidestack.infra.snapshot import Dataset
from sidestack.ranker.config import Dates, TrainingConfig
from sidestack.ranker.features import HISTORY_IDS, ArmFeatures
from sidestack.ranker.planner import Traffic

MAX_FILES = 256
"""The most files of a table whose metadata is read to measure column sizes; of more, evenly spaced ones."""


class ColumnCost(NamedTuple):
    """Bytes per row that some columns take, as stored and before compression."""

    compressed: float
    uncompressed: float


def count_flops() -> FlopCounterMode:
    """Return a context manager that counts the FLOPs of matrix products, including those that add in place."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _product_flops})
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(ModuleTracker):
    """A tracker that tracks no module, in place of torch's.

    Torch's tracker sets hooks on gradients. They fail if no gradients are computed and a rank holds no table of a
    collection.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return None


def _product_flops(
    added: Sequence[int], left: Sequence[int], right: Sequence[int], out_shape: object = None, **_: object
) -> int:
    """Return the operations of a matrix product from the shapes, as torch counts them."""
    return 2 * left[0] * left[1] * right[1]


def column_cost(dataset: Dataset, dates: Dates, columns: Sequence[str]) -> ColumnCost:
    """Add up the bytes of columns in a snapshot's files, from the files' own metadata.

    Bytes stored once per request are divided among the request's impressions.

    Args:
        dataset: the snapshot. dates: the first and last date to measure. columns: the columns to count.

    Returns:
        Bytes per impression.
    """
    compressed = uncompressed = 0.0
    for table, own in _columns_by_table(dataset, columns).items():
        files = _sample_files(dataset.files(table, *dates))
        chunks = list(_chunks([file.path for file in files], own))
        impressions = _impressions(dataset, table, dates) * sum(file.rows for file in files)
        compressed += sum(chunk.total_compressed_size for chunk in chunks) / max(impressions, 1)
        uncompressed += sum(chunk.total_uncompressed_size for chunk in chunks) / max(impressions, 1)
    return ColumnCost(compressed, uncompressed)


def _columns_by_table(dataset: Dataset, columns: Sequence[str]) -> dict[str, list[str]]:
    of_events, of_requests = columns_by_table(dataset, columns)
    tables = {**of_events, **of_requests}
    return {table: [name for name in own if name in columns] for table, own in tables.items() if {*own} & {*columns}}


def _impressions(dataset: Dataset, table: str, dates: Dates) -> float:
    """Return how many impressions share a row of a table, on average."""
    events, rows = (sum(entry.rows for entry in dataset.partitions(name, *dates)) for name in ("events", table))
    return events / max(rows, 1)


def _sample_files(files: Sequence[CountedFile]) -> Sequence[CountedFile]:
    """Return all files, or `MAX_FILES` evenly spaced ones."""
    return files[:: max(1, -(-len(files) // MAX_FILES))]


def mean_entries(dataset: Dataset, dates: Dates, column: str) -> float:
    """Return the mean entries per request of a list column, from metadata; an empty list counts as one entry."""
    files = _sample_files(dataset.files("requests", *dates))
    entries: int = sum(chunk.num_values for chunk in _chunks([file.path for file in files], (column,)))
    return entries / max(1, sum(file.rows for file in files))


def expected_traffic(dataset: Dataset, dates: Dates, training: TrainingConfig) -> Traffic:
    """Return a training's average lookups; a request that is split counts once for each piece."""
    impressions = _impressions(dataset, "requests", dates)
    pieces = impressions if training.rows_per_request is None else min(impressions, training.rows_per_request)
    return Traffic(mean_entries(dataset, dates, HISTORY_IDS), 1.0 / max(pieces, 1.0))


def embedding_bytes(features: ArmFeatures, dataset: Dataset, dates: Dates) -> float:
    """Return the bytes per impression of raw embeddings, for arms with them as content.

    The ranker looks them up by id. The log of a recurring training carries them; those of user and history once per
    request.
    """
    an_item, an_entry, a_user = (content.embedding_bytes for content in features.contents)
    of_request = a_user + (an_entry * mean_entries(dataset, dates, HISTORY_IDS) if an_entry else 0.0)
    return an_item + of_request / _impressions(dataset, "requests", dates)


def _chunks(files: Sequence[Path], columns: Sequence[str]) -> Iterator[pq.ColumnChunkMetaData]:
    for path in files:
        metadata = read_footer(path)
        for group in range(metadata.num_row_groups):
            for leaf in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(leaf)
                if chunk.path_in_schema.split(".")[0] in columns:
                    yield chunk


def peak_memory_bytes(world: World) -> int:
    """Return the peak memory of any rank's process: resident on the host, plus allocated on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if world.device.type == "cuda":
        peak += torch.cuda.max_memory_allocated(world.device)
    return max(gather(world, int(peak)))
