"""What an arm costs, measured: bytes of its columns in the Parquet files, floating-point operations, peak memory."""

import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow.parquet as pq
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from infra.distributed import World, gather
from infra.parquet import open_parquet, row_groups
from ranker.features import HISTORY_IDS, ArmFeatures


class ColumnCost(NamedTuple):
    """Bytes a row that some columns take, as stored and before compression."""

    compressed: float
    uncompressed: float


def count_flops() -> FlopCounterMode:
    """Return a counter of the matrix products of what runs under it, those that add in place included."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _product_flops})
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(ModuleTracker):
    """A tracker that tracks no module, in place of torch's.

    Torch's sets hooks on gradients, which fails where none are computed and a rank holds no table of a collection.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return None


def _product_flops(
    added: Sequence[int], left: Sequence[int], right: Sequence[int], out_shape: object = None, **_: object
) -> int:
    """Give the operations of a product of two matrices by their shapes, as torch counts them."""
    return 2 * left[0] * left[1] * right[1]


def column_cost(files: Sequence[Path], columns: Sequence[str]) -> ColumnCost:
    """Add up what columns take in Parquet files, from the files' own metadata.

    Args:
        files: the files. columns: their top-level columns to count.

    Returns:
        Bytes a row.
    """
    chunks = list(_chunks(files, columns))
    rows = _rows(files)
    compressed = sum(chunk.total_compressed_size for chunk in chunks)
    return ColumnCost(compressed / rows, sum(chunk.total_uncompressed_size for chunk in chunks) / rows)


def mean_entries(files: Sequence[Path], column: str) -> float:
    """Give how many entries a list column has a row, from the files' metadata (an empty list counts as one)."""
    entries: int = sum(chunk.num_values for chunk in _chunks(files, (column,)))
    return entries / _rows(files)


def embedding_bytes(features: ArmFeatures, files: Sequence[Path]) -> float:
    """Give the bytes a row that raw embeddings take where they are the content: 2 a dimension, for each item and user.

    The ranker looks them up by id; a log of impressions, as a recurring training reads it, carries them.
    """
    an_item, an_entry, a_user = (2.0 * sum((content.embeddings or {}).values()) for content in features.contents)
    return an_item + a_user + (an_entry * mean_entries(files, HISTORY_IDS) if an_entry else 0.0)


def _rows(files: Sequence[Path]) -> int:
    return max(1, sum(group.rows for group in row_groups(files)))


def _chunks(files: Sequence[Path], columns: Sequence[str]) -> Iterator[pq.ColumnChunkMetaData]:
    for path in files:
        with open_parquet(path) as file:
            metadata = file.metadata
        for group in range(metadata.num_row_groups):
            for leaf in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(leaf)
                if chunk.path_in_schema.split(".")[0] in columns:
                    yield chunk


def peak_memory_bytes(world: World) -> int:
    """Give the largest memory any rank's process has held: resident on the host, plus allocated on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if world.device.type == "cuda":
        peak += torch.cuda.max_memory_allocated(world.device)
    return max(gather(world, int(peak)))
