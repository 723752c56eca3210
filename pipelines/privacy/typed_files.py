"""Removal of rows from a typed file of a raw log; its manifest still records them."""

from datetime import date, datetime, time
from pathlib import Path

import pyarrow.compute as pc

from sidestack.infra.files import write_whole
from sidestack.infra.manifest import MANIFEST, FileEntry, read_manifest
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.sealed import seal
from sidestack.infra.store import FILE
from sidestack.pipelines.prepare.log.ingest import row_dates

_SINCE = "since"
"""Name of the number in a manifest: ordinal of the first date whose rows are left."""


def remove_rows_before(path: Path, before: date) -> int | None:
    """Remove rows before a date from an ingested file; return how many are left, None if it had no such row.

    Args:
        path: its partition; the manifest still records the rows of each date. before: the first date to keep.
    """
    manifest = read_manifest(path)
    numbers = manifest.facts["numbers"]
    days = row_dates(numbers)
    if not days or min(days) >= before or numbers.get(_SINCE, 0) >= before.toordinal():
        return None
    left = None if max(days) < before else _shorten(path / FILE, before)
    if left is None:
        (path / FILE).unlink(missing_ok=True)
    facts = {**manifest.facts, "numbers": {**numbers, _SINCE: before.toordinal()}}
    changed = manifest.model_copy(update={"facts": facts, "files": {} if left is None else {FILE: left}})
    write_whole(path / MANIFEST, seal(changed))
    return 0 if left is None else left.rows


def _shorten(file: Path, before: date) -> FileEntry:
    groups = row_groups([file])
    shortened = file.with_name(f".{file.name}.tmp")
    with TableWriter(shortened, read_row_group(groups[0]).schema) as writer:
        for group in groups:
            rows = read_row_group(group)
            writer.write(rows.filter(pc.greater_equal(rows["event_time"], datetime.combine(before, time()))))
    shortened.replace(file)
    return FileEntry(sha256=writer.digest, bytes=writer.bytes, rows=writer.rows)
