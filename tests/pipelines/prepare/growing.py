"""A user's own folder of tables that grows by the day, filled from a synthetic log."""

import json
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.tables import DatasetSpec, write_spec
from sidestack.pipelines.prepare.synthetic import Synthetic, SyntheticLog

FIRST = date(2024, 1, 1)
NUM_WARM = 48
"""Items that are shown from the first day on; the others only from the third day on."""
LOG = SyntheticLog(
    Synthetic(
        kind="synthetic", num_items=60, num_users=20, events_per_day=50, impressions_per_request=3, train_days=2,
        test_days=20, followup_days=1, user_embeddings={"activity": 4},
    )
)  # fmt: skip


def day_at(number: int) -> date:
    """Return the n-th day of the log, from 0."""
    return FIRST + timedelta(days=number)


def day_file(folder: Path, day: date, table: str = "events") -> Path:
    """Return the file of a date."""
    return folder / table / f"date={day}" / "part-00000.parquet"


def day_rows(day: date) -> pa.Table:
    """Return a date's joined impressions."""
    return pa.concat_tables(LOG.impressions(day)).combine_chunks()


def add_day(folder: Path, day: date) -> None:
    """Add a date's events, joined with their requests and labels."""
    rewrite(day_file(folder, day), day_rows(day))


def add_items(folder: Path, first: int, end: int, name: str = "part-00000.parquet") -> None:
    """Add a file of the items from `first` to `end`."""
    rewrite(folder / "items" / name, pa.concat_tables(LOG.items()).combine_chunks().slice(first, end - first))


def write_folder(folder: Path, days: int, items: int = 60) -> Path:
    """Write a folder of the first `days` days, two of them to train on, and of `items` items in one part."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(days):
        add_day(folder, day_at(number))
    add_items(folder, 0, items)
    rewrite(folder / "users" / "part-00000.parquet", pa.concat_tables(LOG.users()).combine_chunks())
    splits = {"train": (FIRST, day_at(1)), "test": (day_at(2), day_at(max(days - 1, 2)))}
    values = {**LOG.spec.model_dump(), "num_items": items, "followup_days": {}, **splits}
    write_spec(folder, DatasetSpec.model_validate(values))
    return folder


def without_counts(folder: Path) -> Path:
    """Remove the numbers of items and users from a folder's description, so that they are counted."""
    file = folder / "dataset.json"
    spec = {name: value for name, value in json.loads(file.read_text()).items() if not name.startswith("num_")}
    file.write_text(json.dumps(spec))
    return folder


def tables_config(path: Path, **settings: Any) -> dict[str, Any]:
    """Return the stage's settings for a folder; `as_of` is a setting of the stage, all others are of the source."""
    as_of = {"as_of": str(settings.pop("as_of"))} if "as_of" in settings else {}
    return {"source": {"kind": "tables", "path": str(path), **settings}, **as_of}


def read(path: Path) -> pa.Table:
    """Read all rows of a file."""
    return pa.concat_tables([read_row_group(group) for group in row_groups([path])]).combine_chunks()


def rewrite(path: Path, content: pa.Table, row_group_rows: int = 20) -> None:
    """Write a file, replacing any earlier content."""
    with TableWriter(path, content.schema, row_group_rows=row_group_rows) as writer:
        writer.write(content)


def labels_apart(folder: Path, day: date) -> None:
    """Move a date's labels from its events into `labels`."""
    rows = read(day_file(folder, day))
    rewrite(day_file(folder, day, "labels"), rows.select(list(LOG.spec.tasks)), row_group_rows=17)
    rewrite(day_file(folder, day), rows.drop_columns(list(LOG.spec.tasks)))


Change = Callable[[pa.Table], pa.Table]


def with_column(name: str, change: Callable[[list[Any]], Iterable[Any]], kind: pa.DataType | None = None) -> Change:
    """Return a change of one column's values, and of its type if one is named."""

    def changed(content: pa.Table) -> pa.Table:
        place = content.schema.get_field_index(name)
        values = pa.array(change(content[name].to_pylist()), kind or content.schema.field(place).type)
        return content.set_column(place, pa.field(name, values.type), values)

    return changed


def with_value(name: str, row: int, value: Any) -> Change:
    """Return a change of one value."""
    return with_column(name, lambda values: [*values[:row], value, *values[row + 1 :]])


def masked(labels: pa.ChunkedArray, is_known: list[bool]) -> pa.Array:
    """Return labels, null where they are not known."""
    return pc.if_else(pa.array(is_known), labels.combine_chunks(), pa.scalar(None, pa.int8()))
