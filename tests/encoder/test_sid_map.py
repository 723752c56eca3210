"""The map on disk: disjoint writes, reading back, exact counts in one pass or many."""

from pathlib import Path

import numpy as np
import pytest

from encoder import sid_map
from encoder.sid_map import NULL, SidMap


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_written_in_any_order_read_back(tmp_path: Path, chunks: int) -> None:
    ids_NC = np.random.default_rng(0).integers(0, 2**62, (1000, chunks))
    sids = SidMap(tmp_path / "map" / "items", 1000, chunks)
    sids.create()
    for start in (700, 0, 300):
        sids.write(start, ids_NC[start : {700: 1000, 0: 300, 300: 700}[start]])
    assert np.array_equal(sids.opened(), ids_NC)
    assert sids.path.stat().st_size == 8000 * chunks


@pytest.mark.parametrize("at_a_time", [1 << 24, 64])
@pytest.mark.parametrize("chunks", [1, 2])
def test_counts_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int, chunks: int) -> None:
    monkeypatch.setattr(sid_map, "_DISTINCT_AT_A_TIME", at_a_time)
    monkeypatch.setattr(sid_map, "_ROWS_AT_A_TIME", 100)
    ids_NC = np.random.default_rng(0).integers(0, 20, (1000, chunks))
    ids_NC[::7] = NULL
    sids = SidMap(tmp_path / "map" / "items", 1000, chunks)
    sids.create()
    sids.write(0, ids_NC)
    present = [tuple(row) for row in ids_NC.tolist() if row[0] != NULL]
    assert sids.count() == (1000 - len(present), len(set(present)))
    assert list(sids.path.parent.iterdir()) == [sids.path]
