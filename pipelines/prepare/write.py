"""Writing a dataset by days and ranks: what is written does not depend on how many ranks write it."""

from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import pyarrow as pa

from infra.distributed import World
from infra.parquet import TableWriter


def share(world: World, days: Sequence[date]) -> list[date]:
    """Give this rank's days: contiguous, so that a rank reads only its own weeks of the raw log."""
    first, last = (len(days) * rank // world.size for rank in (world.rank, world.rank + 1))
    return list(days[first:last])


def write_stream(path: Path, schema: pa.Schema, chunks: Iterable[pa.Table]) -> int:
    """Write chunks as one file; give the number of rows.

    Raises:
        DataError: the disk is full or the file cannot be written.
    """
    rows = 0
    with TableWriter(path, schema) as writer:
        for chunk in chunks:
            writer.write(chunk)
            rows += chunk.num_rows
    return rows
