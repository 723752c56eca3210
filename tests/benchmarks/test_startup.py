"""The start-up benchmark: its log of hard links, and the footers and row groups that a rank opens."""

import json
import sys
from pathlib import Path

import pytest

from sidestack.benchmarks import startup
from sidestack.benchmarks.startup import Log, main, start, write_log


def test_log_consists_of_links_to_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "LINKS_A_FILE", 4)
    files = write_log(tmp_path, Log("a log", 10, 50))
    assert len({file.stat().st_ino for file in files}) == 3
    assert len(files) == 10


def test_rank_opens_the_footers_of_its_lane_and_of_lane_bounds(tmp_path: Path) -> None:
    log = Log("a log", 80, 200)
    files = write_log(tmp_path, log)
    row = start(files, log, is_resumed=True)
    assert row["rows"] == 16_000
    assert row["footers"] == 10 + 7 - 1  # files of its lane, and bounds, one of them in its own lane
    assert 3 <= row["row_groups"] <= 6  # of ten: the second of three buffers, and what is prefetched of the third


def test_quick_run_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["startup", "--quick", "--out", str(tmp_path)])
    main()
    rows = json.loads((tmp_path / "startup.json").read_text())["rows"]
    assert [row["footers"] for row in rows if "footers" in row] == [4, 4, 19, 19]
    assert "| a day in large files | 4 | 80,000 | mid-epoch |" in (tmp_path / "startup.md").read_text()
