"""Results of the speed benchmarks: rows and goals as JSON and Markdown."""

import json
from pathlib import Path

import pytest

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.timing import Spread


@pytest.mark.parametrize(("ratio", "met"), [(0.85, "yes"), (0.8499, "no")])
def test_goal_is_decided_by_the_median(ratio: float, met: str) -> None:
    row = goal("ours / theirs", Spread(ratio, 0.5, 0.9), 0.85, threads=2)
    assert (row["ratio"], row["low"], row["met"], row["threads"]) == (ratio, 0.5, met, 2)


def test_publish_writes_rows_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"what": "ours", "items_per_second": 12_345.6}, goal("ours / theirs", Spread(0.5, 0.4, 0.6), 0.8, 1)]
    publish("speed", "Speed", "Words.", rows, {"what": "", "items_per_second": ",.0f"}, out=tmp_path)
    assert "12,346" in capsys.readouterr().out
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == rows
    page = (tmp_path / "speed.md").read_text()
    assert page.startswith("# Speed\n\nWords.\n")
    assert "| ours | 12,346 |" in page
    assert "| ours / theirs | 1 | 0.50 | 0.40 | 0.60 | 0.80 | no |" in page
