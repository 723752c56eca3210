"""The files of a user's own folder, and a check that the folder is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import SidestackError
from sidestack.infra.impressions import all_columns
from sidestack.infra.snapshot import read_dataset
from tests.datasets import joined
from tests.pipelines.prepare.growing import Change, read, rewrite, tables_config, with_column
from tests.pipelines.prepare.running import leftovers, run_prepare

EVENTS = "events/date=2024-01-02/part-00000.parquet"
ITEMS = "items/part-00000.parquet"
USERS = "users/part-00000.parquet"


def rows_of(out: Path) -> pa.Table:
    return joined(out, all_columns(read_dataset(out)))


def assert_refused(folder: Path, message: str, **settings: Any) -> str:
    """Check that a folder is refused and that nothing of the snapshot is left; return the error's message."""
    out = folder.parent / "out"
    with pytest.raises(SidestackError, match=message) as caught:
        run_prepare(ALONE, tables_config(folder, **settings), out)
    assert not out.exists() and leftovers(folder.parent) == []
    return str(caught.value)


def change_rows(folder: Path, name: str, change: Change) -> None:
    """Rewrite a file of the folder with changed rows."""
    rewrite(folder / name, change(read(folder / name)))


def change_description(path: Path, **changes: Any) -> None:
    """Change keys of `dataset.json`; `path` is any file of the folder's events."""
    file = path.parents[2] / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def second_file(folder: Path, change: Change) -> Path:
    """Add a changed copy of a date's file to the date, with new ids of its requests."""
    file = (folder / EVENTS).with_name("part-00001.parquet")
    renumbered = with_column("request_id", lambda ids: [one + 1000 for one in ids])
    rewrite(file, change(renumbered(read(folder / EVENTS))))
    return file
