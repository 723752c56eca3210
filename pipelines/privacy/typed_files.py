"""Rows that are taken out of a typed file of a raw log, and nothing else of it: its manifest tells them as before."""

from datetime import date, datetime, time
from pathlib import Path

import pyarrow.compute as pc

from sidestack.infra.files import write_whole
from sidestack.infra.manifest import MANIFEST, FileEntry, read_manifest
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.sealed import sealed
from sidestack.infra.store import FILE
from sidestack.pipelines.prepare.log.ingest import row_dates

_SINCE = "since"
"""Of a manifest's numbers: the first date (its ordinal) whose rows are left."""


def take_out_rows(path: Path, before: date) -> int | None:
    """Take the rows before a date out of an ingested file, and return how many are left; None: it had no such row.

    Args:
        path: its partition, whose manifest goes on to say what rows each date had. before: the first date that stays.
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
    write_whole(path / MANIFEST, sealed(changed))
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
