"""Bytes per impression on disk, compared with flat tables in which each impression repeats its request's columns.

`python -m benchmarks.disk [--quick] [--dataset DIR] [--out DIR]`.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from sidestack.benchmarks.events import NUM_ITEMS, write_events
from sidestack.benchmarks.goals import PageTable, goal, publish_tables
from sidestack.benchmarks.record import Row, results_folder
from sidestack.benchmarks.timing import Spread
from sidestack.infra.impressions import all_columns, read_impressions
from sidestack.infra.parquet_writer import TableWriter, dictionary_columns
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import quiet

REQUEST_ID = "request_id"
WORDS = """
The same impressions, all columns of all dates, zstd level 3, row groups of 8 MiB, a file a date. "version 1" repeats
on each impression what its request has, with a dictionary for every column, as tables of version 1 were; "flat" does
so in the encodings of today. "now" is what the tables take: requests, events, labels and SIDs. Compressed bytes an
impression.
"""
LAYOUTS = ("version 1", "flat", "now")


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small log, to see that it runs")
    parser.add_argument("--dataset", type=Path, help="measure this one in place of a synthetic log")
    parser.add_argument("--out", type=Path, help="where disk.json and disk.md go")
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory(prefix="sidestack-disk-") as folder:
        path = Path(folder)
        days, items = (2, 2000) if arguments.quick else (12, NUM_ITEMS)
        dataset = read_dataset(arguments.dataset) if arguments.dataset else write_events(path, days, items)
        table, goals = disk(dataset, path)
    out = results_folder(arguments.out, quick=arguments.quick)
    publish_tables("disk", "Bytes an impression", WORDS, [table], goals, packages=["pyarrow"], out=out)


def disk(dataset: Dataset, folder: Path) -> tuple[PageTable, Sequence[Row]]:
    """Write a dataset's impressions as flat tables into a folder, and count bytes by column."""
    tables = ["requests", "events", "labels"]
    tables += [one.table(name, base) for name, one in dataset.snapshot.sids.items() for base in one.columns]
    now = [file.path for table in tables for file in dataset.files(table, date.min, date.max) if "items" not in table]
    rows = sum(file.rows for file in dataset.files("events", date.min, date.max))
    flat = write_flat(dataset, folder / "flat")
    version_1 = [with_dictionaries(file, file.with_suffix(".version-1")) for file in flat]
    files = dict(zip(LAYOUTS, (version_1, flat, now), strict=True))
    by_column = {name: column_bytes(each) for name, each in files.items()}
    sums = {name: sum(file.stat().st_size for file in each) for name, each in files.items()}
    found: list[Row] = [
        {"column": column, **{name: by_column[name][column] / rows for name in LAYOUTS}}
        for column, _ in (by_column["flat"] + by_column["now"]).most_common()
    ]
    found.append({"column": "all columns", **{name: by_column[name].total() / rows for name in LAYOUTS}})
    found.append({"column": "with footers", **{name: sums[name] / rows for name in LAYOUTS}})
    of_version_1, of_flat = (sums[name] / sums["now"] for name in LAYOUTS[:2])
    goals = [
        goal("version 1 / now, bytes an impression", Spread(*[of_version_1] * 3), 1 / 0.6),
        goal("flat / now, bytes an impression", Spread(*[of_flat] * 3), 1 / 0.6),
    ]
    return PageTable("On disk", WORDS, found, {"column": "", **dict.fromkeys(LAYOUTS, ",.2f")}), goals


def write_flat(dataset: Dataset, folder: Path) -> list[Path]:
    """Write all impressions, joined, one file per date, and return the files."""
    columns = [name for name in all_columns(dataset) if name != REQUEST_ID]
    files = []
    for day in sorted({entry.date for entry in dataset.partitions("events")}):
        groups = read_impressions(dataset, columns, day, day)
        first = next(groups)
        with TableWriter(folder / f"{day}.parquet", first.schema) as writer:
            for group in chain([first], groups):
                writer.write(group)
        files.append(writer.path)
    return files


def with_dictionaries(flat: Path, path: Path) -> Path:
    """Rewrite a file, row group by row group, with a dictionary for every column that may benefit from one."""
    with pq.ParquetFile(flat) as file:
        schema = file.schema_arrow
        with pq.ParquetWriter(
            path, schema, compression="zstd", compression_level=3, use_dictionary=dictionary_columns(schema)
        ) as writer:
            for index in range(file.num_row_groups):
                rows = file.read_row_group(index)
                writer.write_table(rows, row_group_size=len(rows))
    return path


def column_bytes(files: Sequence[Path]) -> Counter[str]:
    """Return the compressed bytes of each column, over all files."""
    found: Counter[str] = Counter()
    for path in files:
        footer = pq.read_metadata(path)
        for index in range(footer.num_row_groups):
            group = footer.row_group(index)
            for place in range(group.num_columns):
                column = group.column(place)
                found[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    return found


if __name__ == "__main__":
    main()
