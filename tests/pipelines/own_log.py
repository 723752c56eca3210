"""A growing folder of a user's own log, in the form that `prepare.source.kind=tables` reads."""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from sidestack.infra.config import parse
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.tables import write_spec
from sidestack.pipelines.prepare.synthetic import Synthetic, SyntheticLog

FIRST = date(2024, 1, 1)


class OwnLog:
    """A synthetic log written day by day, with its items part by part.

    Args:
        path: the folder. days: number of dates at the start; the last is the test date. items: number of items at the
            start. changes: settings of the synthetic log, which has at most `num_items` items and 30 days.
    """

    def __init__(self, path: Path, days: int, items: int, **changes: Any) -> None:
        settings = {"num_items": 260, "num_users": 40, "events_per_day": 300, "impressions_per_request": 3}
        values = {"kind": "synthetic", "train_days": 29, "test_days": 1, "cold_share": 0.0, **settings, **changes}
        self.path = path
        self._log = SyntheticLog(parse(Synthetic, values, "test"))
        self._items = pa.concat_tables(list(self._log.items()))
        self._parts = self._num_items = self._num_days = 0
        test = FIRST + timedelta(days=days - 1)
        spec = self._log.spec.model_copy(
            update={
                "num_items": items,
                "followup_days": {},
                "train": (FIRST, test - timedelta(days=1)),
                "test": (test, test),
            }
        )
        path.mkdir(parents=True)
        write_spec(path, spec)
        text = (path / "dataset.json").read_text()
        self._write_spec_without_numbers(text)
        _write(path / "users/part-00000.parquet", pa.concat_tables(list(self._log.users())))
        self.add_items(items)
        for _ in range(days):
            self.add_day()

    def _write_spec_without_numbers(self, text: str) -> None:
        lines = [line for line in text.splitlines() if '"num_items"' not in line and '"num_users"' not in line]
        (self.path / "dataset.json").write_text("\n".join(lines))

    def add_items(self, number: int) -> Path:
        """Append a part of `number` items, and return its file."""
        file = self.path / f"items/part-{self._parts:05d}.parquet"
        _write(file, self._items.slice(self._num_items, number))
        self._parts, self._num_items = self._parts + 1, self._num_items + number
        return file

    def add_day(self) -> date:
        """Append a date of events on the items written so far, and return the date."""
        day = FIRST + timedelta(days=self._num_days)
        _write(self.file(day), self._rows(day))
        self._num_days += 1
        return day

    def add_empty_day(self) -> date:
        """Append a date whose file has no row, and return the date."""
        day = FIRST + timedelta(days=self._num_days)
        _write(self.file(day), self._rows(day).slice(0, 0))
        self._num_days += 1
        return day

    def revise(self, day: date) -> None:
        """Rewrite a date without the second half of its rows."""
        rows = self._rows(day)
        _write(self.file(day), rows.slice(0, rows.num_rows // 2))

    def file(self, day: date) -> Path:
        """Return the file of a date's events."""
        return self.path / f"events/date={day}/part-00000.parquet"

    def _rows(self, day: date) -> pa.Table:
        rows = pa.concat_tables(list(self._log.impressions(day)))
        for name in ("item_id", "history_item_ids"):
            rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), self._known(rows[name]))
        return rows

    def _known(self, ids: pa.ChunkedArray) -> pa.Array:
        """Map ids onto those of the items written so far."""
        whole = ids.combine_chunks()
        if not pa.types.is_list(whole.type):
            return pa.array(whole.to_numpy() % self._num_items)
        values = pa.array(whole.flatten().to_numpy() % self._num_items)
        return pa.ListArray.from_arrays(whole.offsets, values)


def _write(file: Path, rows: pa.Table) -> None:
    with TableWriter(file, rows.schema) as writer:
        writer.write(rows)
