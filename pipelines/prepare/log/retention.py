"""Retention of a log's dates: earlier rows are not read, and their recorded totals are carried over.

A date's key is a hash chain over all dates before it. So the totals of dates are recorded while their rows exist, and
the totals of expired dates come from this record: later dates keep their keys, even if the raw files are gone.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta

from sidestack.infra.files import write_whole
from sidestack.infra.store import Store
from sidestack.infra.tables import read_json

RECORD = "retention.json"
"""File in a store that records the date before which rows were deleted."""
RETAINED_SINCE = "retained_since"
"""The fact in a snapshot's manifest with the first date that it keeps."""
Totals = dict[date, tuple[int, int]]
"""By date: number of rows, and a sum of their hashes."""


@dataclass(frozen=True)
class Retention:
    """Retention rule for rows.

    Attributes:
        store: of the rows. days: before the log's end; None: all that was not deleted. as_of: the log's end, exclusive;
            None: after its newest date.
    """

    store: Store
    days: int | None
    as_of: date | None

    def first_kept(self, newest: Callable[[], date | None]) -> date:
        """Return the first date whose rows are kept; `date.min` without a limit.

        Args:
            newest: returns the newest date of all rows; called only if needed.
        """
        deleted = deleted_before(self.store)
        last = None if self.days is None else (self.as_of - timedelta(days=1) if self.as_of else newest())
        if self.days is None or last is None:
            return deleted
        return max(deleted, last - timedelta(days=self.days - 1))


def deleted_before(store: Store) -> date:
    """Return the date before which rows were deleted; `date.min` if none were."""
    record = store.path / RECORD
    return date.fromisoformat(read_json(record)["deleted_before"]) if record.exists() else date.min


def record_deleted(store: Store, before: date) -> None:
    """Record that rows before a date are deleted; a later recorded date is kept."""
    latest = max(before, deleted_before(store))
    write_whole(store.path / RECORD, json.dumps({"deleted_before": latest.isoformat()}).encode())


def carried_totals(store: Store, of: str, found: Mapping[date, tuple[int, int]], since: date) -> Totals:
    """Return and record the totals of all dates; those before the first kept date come from the record.

    Args:
        store: of the record. of: digest of what decides the rows besides the files. found: totals from the files.
        since: the first kept date; `date.min`: nothing is recorded.
    """
    if since == date.min:
        return dict(found)
    record = store.path / "raw" / "totals" / f"{of[:16]}.json"
    known = read_json(record) if record.exists() else {}
    # Sums of hashes need more than the 64 bits of numbers in our JSON files, so they are stored in hexadecimal.
    past = {date.fromisoformat(day): (rows, int(total, 16)) for day, (rows, total) in known.items()}
    totals = {day: past.get(day, found.get(day)) if day < since else found.get(day) for day in {*past, *found}}
    kept = {day: total for day, total in sorted(totals.items()) if total is not None}
    text = json.dumps({day.isoformat(): (rows, f"{total:x}") for day, (rows, total) in kept.items()})
    if text != json.dumps(known):
        write_whole(record, text.encode())
    return kept
