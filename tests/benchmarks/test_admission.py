"""The benchmark of id tables with admission: its shares equal a slow count, and a quick run writes a page."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sidestack.benchmarks.admission import QUICK, Log, best_share, main, modulo_share, own_row_share, table
from sidestack.ranker.admission import IdRows


def test_shares_equal_a_slow_count() -> None:
    settings = table(32, 1, 1)
    shown_I = np.random.default_rng(0).integers(0, 9, 200)
    row_I = np.arange(200) % settings.fallback_rows
    row_I[[3, 50, 77]] = [2, 3, 4]
    ids = IdRows(row_I.astype(np.int32), *np.zeros((2, 200), np.int32))
    total = shown_I.sum()
    assert own_row_share(ids, settings, shown_I) == pytest.approx((shown_I[3] + shown_I[50] + shown_I[77]) / total)
    assert best_share(settings, shown_I) == pytest.approx(sum(sorted(shown_I.tolist())[-30:]) / total)
    seen = np.array([1, 33, 34, 66, 90])  # 1 and 33 share a row, and so do 34 and 66
    assert modulo_share(seen, 32, shown_I) == pytest.approx(shown_I[90] / total)


def test_new_items_arrive_each_night_and_lose_impressions_with_age() -> None:
    log = Log(QUICK)
    first, last = log.counts(0), log.counts(QUICK.nights)
    assert (len(first), len(last)) == (QUICK.first, QUICK.first + QUICK.nights * QUICK.new)
    assert first.sum() == last.sum() == QUICK.impressions
    assert np.array_equal(last, Log(QUICK).counts(QUICK.nights))
    assert last[: QUICK.first].mean() < 0.6 * last[-QUICK.new :].mean()


def test_quick_run_writes_table_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["admission", "--quick", "--out", str(tmp_path)])
    main()
    rows = json.loads((tmp_path / "admission.json").read_text())["rows"]
    nights, goals = [row for row in rows if "goal" not in row], [row for row in rows if "goal" in row]
    assert len(nights) == len(QUICK.tables) * len(QUICK.shown)
    assert [row["met"] for row in goals if "bound" in row["goal"]] == ["yes", "yes"]
    for row in nights:
        assert 0 < row["own_row_share"] <= row["best_share"] < 1
    assert "| 512 rows, 3 times, 1 d | 20 |" in (tmp_path / "admission.md").read_text()
