"""`python -m pipelines.join --dataset DIR --out DIR`: join a snapshot's impressions into one table.

The output is `impressions/date=YYYY-MM-DD/part-00000.parquet`, one row an impression with its request's columns, its
labels and its SIDs, as Hive-partitioned Parquet (docs/data.md). With `--sids` it is only the items' (and users') SIDs,
a file for each set (`pipelines.sid_tables`).
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from sidestack.infra.checks import check_events
from sidestack.infra.commit import commit_alone
from sidestack.infra.errors import DataError, SidestackError
from sidestack.infra.impressions import all_columns, read_impressions
from sidestack.infra.manifest import fetched
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.partitions import date_slice
from sidestack.infra.remote.urls import address, path_argument
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.store import FILE
from sidestack.pipelines.sid_tables import write_sid_tables

FOLDER = "impressions"
"""The folder for other tools to read."""


def join(dataset: Dataset, out: Path, first: date, last: date, columns: Sequence[str] = ()) -> int:
    """Write the joined impressions of some dates, and return their number.

    Args:
        dataset: the snapshot. out: the directory to commit; it must be free.
        first, last: the dates, inclusive. columns: which columns; empty: all.

    Raises:
        DataError: there are no events on these dates, or no table has a column. CommitError: a partition was altered,
            or `out` is taken.
    """
    wanted = list(columns) or all_columns(dataset)
    days, rows = dataset.dates(first, last), 0
    if not days:
        raise DataError(f"{dataset.path}: the snapshot has no events from {first} to {last}")
    with commit_alone(out, stage="join", facts={"columns": wanted}) as staging:
        for day in days:
            for entry in dataset.on_date(day):
                dataset.verify_partition(entry)
            rows += _write_date(dataset, day, wanted, staging / FOLDER / date_slice(day) / FILE)
    return rows


def _write_date(dataset: Dataset, day: date, columns: Sequence[str], file: Path) -> int:
    rows = 0
    with contextlib.ExitStack() as stack:
        writer: TableWriter | None = None
        for table in read_impressions(
            dataset, columns, day, day, lambda rows, where: check_events(rows, dataset.spec, where)
        ):
            writer = writer or stack.enter_context(TableWriter(file, table.schema))
            writer.write(table)
            rows += table.num_rows
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 if the snapshot or an argument breaks a rule, 2 if arguments exclude each other.
    """
    parser = argparse.ArgumentParser(prog="python -m pipelines.join", description="Join a snapshot's impressions.")
    parser.add_argument(
        "--dataset", type=path_argument, required=True, help="a snapshot, such as the output of materialize"
    )
    parser.add_argument("--out", type=path_argument, required=True, help="the directory to commit; must be free")
    parser.add_argument("--from", dest="first", type=date.fromisoformat, default=date.min, help="first date")
    parser.add_argument("--to", dest="last", type=date.fromisoformat, default=date.max, help="last date")
    parser.add_argument("--columns", nargs="+", default=[], help="which columns; by default all")
    parser.add_argument("--sids", action="store_true", help="write ids, keys and SIDs of items and users instead")
    arguments = parser.parse_args(argv)
    dates = (arguments.first, arguments.last)
    if arguments.sids and (arguments.columns or dates != (date.min, date.max)):
        parser.error("--sids writes the SIDs of all items: --from, --to and --columns are of the impressions")
    try:
        dataset = read_dataset(fetched(arguments.dataset))
        if arguments.sids:
            written = write_sid_tables(dataset, arguments.out)
        else:
            written = {FOLDER: join(dataset, arguments.out, *dates, arguments.columns)}
    except SidestackError as error:
        print(f"join: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    for name, rows in written.items():
        print(f"{rows:,} rows: {address(arguments.out / name)}")


if __name__ == "__main__":
    main()
