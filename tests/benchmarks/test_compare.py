"""The benchmark of the comparison: rows in lane order, and a quick run."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from sidestack.benchmarks.compare import LANES, batches, main


def test_rows_are_in_lane_order_with_equal_labels_for_every_arm() -> None:
    one, other = (pa.concat_tables(batches(LANES * 1500, seed)) for seed in (0, 1))
    rows = one["row"].to_pylist()
    assert sorted(rows) == list(range(LANES * 1500)) and rows[1024] == 1500
    for name in ("row", "user_id", "click", "conversion"):
        assert one[name].equals(other[name])
    assert not one["p_click"].equals(other["p_click"])


@pytest.mark.long
def test_quick_run_writes_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "--quick", "--out", str(tmp_path)])
    main()
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["rows"] for row in rows[:2]] == [20_000 // LANES * LANES, 40_000 // LANES * LANES]
    assert all(row["peak_mib"] > 100 and row["seconds"] > 0 for row in rows[:2])
    assert "| 19,968 | 4 |" in (tmp_path / "compare.md").read_text()
