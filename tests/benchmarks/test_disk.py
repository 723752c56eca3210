"""The benchmark of bytes on disk counts every byte, and its two flat layouts have the same rows."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sidestack.benchmarks.disk import LAYOUTS, disk
from sidestack.infra.snapshot import read_dataset
from tests.ranker.dataset import write_dataset


def test_every_byte_of_every_layout_is_counted(tmp_path: Path) -> None:
    dataset = read_dataset(write_dataset(tmp_path / "dataset", impressions=8))
    table, goals = disk(dataset, tmp_path)
    *columns, all_columns, with_footers = table.rows
    files = {name: sorted((tmp_path / "flat").glob(f"*.{name}")) for name in ("parquet", "version-1")}
    for flat, version_1 in zip(files["parquet"], files["version-1"], strict=True):
        assert pq.read_table(flat).equals(pq.read_table(version_1))
    rows = sum(pq.read_metadata(file).num_rows for file in files["parquet"])
    assert rows == 6 * 512
    for name, of_layout in zip(LAYOUTS, ("version-1", "parquet"), strict=False):
        assert with_footers[name] == pytest.approx(sum(file.stat().st_size for file in files[of_layout]) / rows)
    for name in LAYOUTS:
        assert sum(row[name] for row in columns) == pytest.approx(all_columns[name])
        assert all_columns[name] < with_footers[name]
    assert {row["column"] for row in columns if not row["flat"]} == {"request_id"}
    assert [goal["ratio"] for goal in goals] == [with_footers[name] / with_footers["now"] for name in LAYOUTS[:2]]
