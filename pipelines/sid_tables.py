"""Each set of SIDs as one Parquet file for other tools: ids, keys if the table has them, and SIDs.

The output is `sids/<set>/items.parquet` (or `users.parquet`), a row for each item in the order of ids, and next to it
`sids/<set>/sid.json`, which defines how to split a SID into digits (`encoder.sid_file`).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_file import FOLDER, write_sid_file
from sidestack.infra.commit import commit_alone
from sidestack.infra.config import parse
from sidestack.infra.errors import DataError
from sidestack.infra.parquet import open_parquet, read_row_group, row_groups
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.snapshot import CONTENT, Dataset, SidSet


def write_sid_tables(dataset: Dataset, out: Path) -> dict[str, int]:
    """Write a file for each set of SIDs, and return the number of rows by file.

    Args:
        dataset: the snapshot. out: the directory to commit; it must be free.

    Raises:
        DataError: the snapshot has no SIDs. CommitError: a partition was altered, or `out` is taken.
    """
    if not dataset.snapshot.sids:
        raise DataError(f"{dataset.path}: the snapshot has no SIDs; take the output of materialize")
    rows = {}
    with commit_alone(out, stage="sids") as staging:
        for name, listed in dataset.snapshot.sids.items():
            spec = parse(SidSpec, listed.spec, f"{dataset.path}: SIDs {name!r}")
            file = Path(FOLDER) / name / f"{CONTENT[spec.entity]}.parquet"
            write_sid_file(staging, spec, listed.columns)
            rows[str(file)] = _write(dataset, spec, listed, staging / file)
    return rows


def _write(dataset: Dataset, spec: SidSpec, listed: SidSet, file: Path) -> int:
    rows = 0
    with contextlib.ExitStack() as stack:
        writer: TableWriter | None = None
        for table in _published(dataset, spec, listed):
            writer = writer or stack.enter_context(TableWriter(file, table.schema))
            writer.write(table)
            rows += table.num_rows
    return rows


def _published(dataset: Dataset, spec: SidSpec, listed: SidSet) -> Iterator[pa.Table]:
    """Yield ids, keys and SIDs a row group at a time, each id from the part that introduced it."""
    base = CONTENT[spec.entity]
    parts = zip(dataset.partitions(base), dataset.partitions(listed.table(spec.name, base)), strict=True)
    for entry, of_sids in parts:
        dataset.verify_partition(entry)
        dataset.verify_partition(of_sids)
        files, sid_files = (_files(dataset, one) for one in (entry, of_sids))
        columns = _columns(files[0], spec.entity)
        for group, of_group in zip(row_groups(files), row_groups(sid_files), strict=True):
            rows, sids = read_row_group(group, columns), read_row_group(of_group)
            for field in sids.schema:
                rows = rows.append_column(field, sids[field.name])
            yield rows.filter(pc.greater_equal(rows[columns[0]], entry.facts["first"]))


def _files(dataset: Dataset, entry: PartitionEntry) -> list[Path]:
    return [dataset.store / entry.path / file.name for file in entry.files]


def _columns(file: Path, entity: str) -> list[str]:
    """Return the id column, and the key column if the table has one."""
    key = f"{entity}_key"
    with open_parquet(file) as opened:
        return [f"{entity}_id", *([key] if key in opened.schema_arrow.names else [])]
