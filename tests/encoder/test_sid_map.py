"""SID maps on disk: disjoint writes, parts read as one map, exact counts in one pass or several."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sidestack.encoder import sid_map
from sidestack.encoder.sid_map import NULL, SidMap, SidMaps


def maps_of(folder: Path, ids_NC: np.ndarray, *firsts: int) -> SidMaps:
    """Write one map per part, and open all of them."""
    parts: list[tuple[int, int, Path]] = []
    for first, end in zip(firsts, [*firsts[1:], len(ids_NC)], strict=True):
        part = SidMap(folder / f"part-{first}-{len(parts)}", end - first, ids_NC.shape[1])
        part.create()
        part.write(0, ids_NC[first:end])
        parts.append((first, end - first, part.path))
    return SidMaps(parts, ids_NC.shape[1])


@pytest.mark.parametrize("chunks", [1, 3])
def test_slices_written_in_any_order_are_read_back(tmp_path: Path, chunks: int) -> None:
    ids_NC = np.random.default_rng(0).integers(0, 2**62, (1000, chunks))
    sids = SidMap(tmp_path / "map" / "items", 1000, chunks)
    sids.create()
    for start in (700, 0, 300):
        sids.write(start, ids_NC[start : {700: 1000, 0: 300, 300: 700}[start]])
    assert np.array_equal(SidMaps([(0, 1000, sids.path)], chunks).of(np.arange(1000)), ids_NC)
    assert sids.path.stat().st_size == 8000 * chunks


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("firsts", [(0,), (0, 1), (0, 400, 400, 401, 999), (0, 0, 1000)])
def test_parts_are_read_as_one_map(tmp_path: Path, firsts: tuple[int, ...], chunks: int) -> None:
    """Some of the cases have parts that add no item."""
    ids_NC = np.random.default_rng(0).integers(0, 2**62, (1000, chunks))
    maps = maps_of(tmp_path, ids_NC, *firsts)
    asked_N = np.random.default_rng(1).integers(0, 1000, 500)
    for ids_N in (asked_N, np.arange(1000), np.array([999]), np.empty(0, np.int64)):
        assert np.array_equal(maps.of(ids_N), ids_NC[ids_N])
    assert maps.rows == 1000


@pytest.mark.parametrize("at_a_time", [1 << 24, 64])
@pytest.mark.parametrize(("chunks", "values"), [(1, 20), (1, 2000), (2, 20)])
def test_counts_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int, chunks: int, values: int
) -> None:
    monkeypatch.setattr(sid_map, "_DISTINCT_AT_A_TIME", at_a_time)
    monkeypatch.setattr(sid_map, "_ROWS_AT_A_TIME", 100)
    ids_NC = np.random.default_rng(0).integers(0, values, (1000, chunks))
    ids_NC[::7] = NULL
    present = [tuple(row) for row in ids_NC.tolist() if row[0] != NULL]
    alone = sum(number == 1 for number in Counter(present).values())
    (tmp_path / "counting").mkdir()
    for firsts in ((0,), (0, 130, 600)):
        found = maps_of(tmp_path, ids_NC, *firsts).count(tmp_path / "counting")
        assert found == (1000 - len(present), len(set(present)), alone)
        assert list((tmp_path / "counting").iterdir()) == []
