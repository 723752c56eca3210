"""Start-up of the lane reader: seconds and footers until the first batch of a rank, from an epoch's begin and middle.

`python -m benchmarks.startup [--quick] [--out DIR]`. The files are links to a few small ones: their footers are as
large as real ones, their values are not.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.record import Row, results_folder
from sidestack.benchmarks.timing import Spread, peak_bytes
from sidestack.infra.lanes import LaneReader
from sidestack.infra.parquet import RowGroup
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.rows import OPENING_THREADS, CountedFile, FileRows

RANK, RANKS, BATCH = 3, 8, 1024
NUM_COLUMNS, REQUEST_ROWS, KEEP_ROWS = 40, 20, 64
GOAL_SECONDS = 60
LINKS_A_FILE = 10_000
"""Fewer than a file system allows (ext4: 65,000)."""

WORDS = f"""
Seconds until rank {RANK} of {RANKS} has its first batch of {BATCH:,} rows, eight lanes, shuffled by requests of
{REQUEST_ROWS} rows: opening the reader, reading the footers it needs, reading the first buffer. "mid-epoch" starts at
the middle batch, as a resumed training does. Files have {NUM_COLUMNS} columns and row groups of 8,192 rows at most;
their numbers of rows are known, as from a manifest. All files are links to a few, so footers come from the page cache:
a network file system adds its latency for each footer, divided by the {OPENING_THREADS} that are read at once. Row
groups include those that are read ahead. Processor seconds are those of all threads; where they are few beside the
seconds, the machine had other work. Memory is what is taken beyond what the process held before, so the second line of
a log tells less.
"""
COLUMNS = {
    "log": "", "files": ",d", "rows": ",d", "start": "", "seconds": ".2f", "cpu_seconds": ".2f", "footers": ",d",
    "row_groups": ",d", "peak_mib": ",.0f",
}  # fmt: skip


@dataclass(frozen=True)
class Log:
    """Files of equal size.

    Attributes:
        name: what it stands for. files: how many. file_rows: of each.
    """

    name: str
    files: int
    file_rows: int


FULL = (Log("a day in large files", 100, 1_000_000), Log("a log in small files", 100_000, 1000))
QUICK = (Log("a day in large files", 4, 20_000), Log("a log in small files", 100, 1000))


class RequestRows(FileRows):
    """Rows of requests that begin every `REQUEST_ROWS` rows; counts the row groups that are read."""

    num_read = 0

    def table(self, group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of a row group."""
        self.num_read += 1
        return super().table(group, columns)

    def starts(self, group: RowGroup) -> npt.NDArray[np.int64]:  # type: ignore[override]
        """Return where requests begin."""
        return np.arange(-group.start % REQUEST_ROWS, group.rows, REQUEST_ROWS)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few files, to see that it runs")
    parser.add_argument("--out", type=Path, help="where startup.json and startup.md go")
    arguments = parser.parse_args()
    rows = [row for log in (QUICK if arguments.quick else FULL) for row in measured(log)]
    goals = [_goal(row) for row in rows]
    out = results_folder(arguments.out, quick=arguments.quick)
    publish("startup", "Start-up", WORDS, [*rows, *goals], COLUMNS, packages=["pyarrow"], out=out)


def measured(log: Log) -> list[Row]:
    """Write a log, and start at an epoch's begin and in its middle."""
    with tempfile.TemporaryDirectory(prefix="sidestack-startup-") as folder:
        files = write_log(Path(folder), log)
        return [start(files, log, is_resumed=is_resumed) for is_resumed in (False, True)]


def write_log(folder: Path, log: Log) -> list[Path]:
    """Write the files of a log, nearly all as links, and return them in order."""
    names = [f"x{number}" for number in range(NUM_COLUMNS)]
    values_N = np.arange(log.file_rows) % 100
    table = pa.table([values_N] * NUM_COLUMNS, names=names)
    files = [folder / f"part-{number:06d}.parquet" for number in range(log.files)]
    for number, file in enumerate(files):
        if number % LINKS_A_FILE:
            os.link(files[number // LINKS_A_FILE * LINKS_A_FILE], file)
        else:
            with TableWriter(file, table.schema, row_group_rows=8192) as writer:
                writer.write(table)
    return files


def start(files: list[Path], log: Log, *, is_resumed: bool) -> Row:
    """Open the reader of one rank, take its first batch, and say what that took."""
    counted = [CountedFile(file, log.file_rows) for file in files]
    opened: list[RequestRows] = []
    began, cpu_began = time.perf_counter(), time.process_time()

    def take_first_batch() -> None:
        source = RequestRows(counted, [f"x{number}" for number in range(NUM_COLUMNS)])
        opened.append(source)
        reader = LaneReader(
            source, batch_size=BATCH, lanes=RANKS, rank=RANK, world_size=RANKS, seed=0, keep_rows=KEEP_ROWS
        )
        batches = reader.batches(range(1), reader.num_batches // 2 if is_resumed else 0)
        next(batches)

    peak = peak_bytes(take_first_batch)
    (source,) = opened
    return {
        "log": log.name,
        "files": log.files,
        "rows": source.num_rows,
        "start": "mid-epoch" if is_resumed else "begin",
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "footers": source.num_opened,
        "row_groups": source.num_read,
        "peak_mib": None if peak is None else peak / 2**20,
    }


def _goal(row: Row) -> Row:
    times = GOAL_SECONDS / row["seconds"]
    return goal(f"{GOAL_SECONDS} s / seconds, {row['log']}, {row['start']}", Spread(times, times, times), 1)


if __name__ == "__main__":
    main()
