"""Which dates of a log are kept: rows before them are not read, and what was known of them is carried on.

A date's key is a chain over all dates before it. So the totals of dates are recorded while their rows are there, and
those of dates that are no longer kept come from this record: later dates keep their keys, whether the raw files are
still there or not.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta

from sidestack.infra.files import write_whole
from sidestack.infra.store import Store
from sidestack.infra.tables import read_json

RECORD = "retention.json"
"""Says, in a store, before which date rows were deleted."""
RETAINED_SINCE = "retained_since"
"""The fact of a snapshot's manifest that says which date is the first that it keeps."""
Totals = dict[date, tuple[int, int]]
"""By date: rows, and a sum of their hashes."""


@dataclass(frozen=True)
class Retention:
    """How long rows are kept.

    Attributes:
        store: that they are kept in. days: before the log's end; None: all that was not deleted. as_of: the log's end,
            exclusive; None: its newest date is the last.
    """

    store: Store
    days: int | None
    as_of: date | None

    def first_kept(self, newest: Callable[[], date | None]) -> date:
        """Return the first date whose rows are kept: `date.min` where there is no limit.

        Args:
            newest: returns the newest date of all rows; it is called only if it decides.
        """
        deleted = deleted_before(self.store)
        last = None if self.days is None else (self.as_of - timedelta(days=1) if self.as_of else newest())
        if self.days is None or last is None:
            return deleted
        return max(deleted, last - timedelta(days=self.days - 1))


def deleted_before(store: Store) -> date:
    """Return the date before which rows were deleted; `date.min` where none were."""
    record = store.path / RECORD
    return date.fromisoformat(read_json(record)["deleted_before"]) if record.exists() else date.min


def record_deleted(store: Store, before: date) -> None:
    """Record that rows before a date are deleted; a later date stays."""
    latest = max(before, deleted_before(store))
    write_whole(store.path / RECORD, json.dumps({"deleted_before": latest.isoformat()}).encode())


def carried_totals(store: Store, of: str, found: Mapping[date, tuple[int, int]], since: date) -> Totals:
    """Return the totals of all dates, those of dates before the first kept one as they were recorded; and record them.

    Args:
        store: the record's. of: digest of what decides the rows beside the files. found: what the files say.
        since: the first date that is kept; `date.min`: nothing is recorded.
    """
    if since == date.min:
        return dict(found)
    record = store.path / "raw" / "totals" / f"{of[:16]}.json"
    known = read_json(record) if record.exists() else {}
    # Sums of hashes need more than the 64 bits that numbers of JSON files may have here: they are kept in hexadecimal.
    past = {date.fromisoformat(day): (rows, int(total, 16)) for day, (rows, total) in known.items()}
    totals = {day: past.get(day, found.get(day)) if day < since else found.get(day) for day in {*past, *found}}
    kept = {day: total for day, total in sorted(totals.items()) if total is not None}
    text = json.dumps({day.isoformat(): (rows, f"{total:x}") for day, (rows, total) in kept.items()})
    if text != json.dumps(known):
        write_whole(record, text.encode())
    return kept
