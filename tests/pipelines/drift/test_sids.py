"""Changed SIDs, use of codes and shared SIDs, against a slow count over digits."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sidestack.encoder import sid_map
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL, SidMap, SidMaps
from sidestack.pipelines.drift import sids
from sidestack.pipelines.drift.sids import SidTable, code_use, compare_sids, difference

SPEC = SidSpec(
    quantizer="structured", levels=3, digits=6, depth=3, groups=2, prefix_lengths=(1, 4), fingerprint="0" * 64
)
LONG = SPEC.model_copy(update={"digits": 42, "depth": 21})  # two columns

Digits = list[tuple[int, ...] | None]


def made(folder: Path, spec: SidSpec, digits: Digits) -> SidTable:
    """Write a map of SIDs in two parts."""
    packed = [
        [NULL] * len(spec.chunk_sizes) if row is None else spec.pack(torch.tensor(row)).tolist() for row in digits
    ]
    parts = []
    for first, end in ((0, 30), (30, len(digits))):
        part = SidMap(folder / f"part-{first}", end - first, len(spec.chunk_sizes))
        part.create()
        part.write(0, np.array(packed[first:end], np.int64))
        parts.append((first, end - first, part.path))
    return SidTable(spec, SidMaps(parts, len(spec.chunk_sizes)))


def drawn(spec: SidSpec, rows: int, seed: int) -> Digits:
    """Draw digits with few values, so that items share SIDs; every seventh row has no SID."""
    digits_ND = np.random.default_rng(seed).integers(0, spec.radix, (rows, spec.digits))
    digits_ND[::2, 3:] = 0
    return [None if i % 7 == seed else tuple(row) for i, row in enumerate(digits_ND.tolist())]


@pytest.mark.parametrize("spec", [SPEC, LONG])
def test_changed_shares_and_hamming_match_a_slow_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: SidSpec
) -> None:
    monkeypatch.setattr(sids, "_IDS_AT_A_TIME", 17)
    now, before = drawn(spec, 100, 0), drawn(spec, 80, 1)
    before[40:60] = now[40:60]
    change = compare_sids(made(tmp_path / "now", spec, now), made(tmp_path / "before", spec, before))
    assert change is not None
    both = [(a, b) for a, b in zip(now, before, strict=False) if a is not None and b is not None]
    assert change.compared == len(both)
    differing = [[x != y for x, y in zip(a, b, strict=True)] for a, b in both]
    assert change.hamming == pytest.approx(sum(map(sum, differing)) / len(both))
    assert [*change.changed_share] == sorted({1, 4, *range(2, spec.digits + 1, 2)})
    for length, share in change.changed_share.items():
        assert share == sum(any(row[:length]) for row in differing) / len(both)
    pairs = [(a is None, b is None) for a, b in zip(now, before, strict=False)]
    found = (change.null_now, change.null_before, change.null_both)
    assert found == tuple(pairs.count(pair) for pair in ((True, False), (False, True), (True, True)))


def test_changed_share_is_zero_or_the_exact_share_of_the_changed_item(tmp_path: Path) -> None:
    """Item 5 gets another fourth digit: one SID of 100 changes, in prefixes of four digits or more."""
    digits: Digits = [(i % 3, 1, 2, 0, i // 3 % 3, 1) for i in range(100)]
    before = made(tmp_path / "before", SPEC, digits)
    same = compare_sids(made(tmp_path / "same", SPEC, digits), before)
    assert same is not None and same.hamming == 0 and set(same.changed_share.values()) == {0}
    digits[5] = (2, 1, 2, 2, 1, 1)
    change = compare_sids(made(tmp_path / "now", SPEC, digits), before)
    assert change is not None and change.hamming == 0.01
    assert change.changed_share == {1: 0, 2: 0, 4: 0.01, 6: 0.01}


def test_use_of_codes_and_shared_sids_match_a_slow_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sid_map, "_ROWS_AT_A_TIME", 13)
    digits = drawn(SPEC, 100, 2)
    use = code_use(made(tmp_path / "maps", SPEC, digits), tmp_path)
    known = [row for row in digits if row is not None]
    assert (use.rows, use.null) == (len(known), 100 - len(known))
    times = Counter(known)
    assert use.collision_share == pytest.approx(sum(times[row] > 1 for row in known) / len(known))
    assert 0 < use.collision_share < 1
    for depth, layer in enumerate(use.layers):
        counts = [Counter(row[digit] for row in known) for digit in (2 * depth, 2 * depth + 1)]
        assert layer.in_use == pytest.approx(sum(len(one) / 3 for one in counts) / 2)
        entropies = [-sum(n / len(known) * math.log(n / len(known), 3) for n in one.values()) for one in counts]
        assert layer.entropy_share == pytest.approx(sum(entropies) / 2)
    assert [*tmp_path.iterdir()] == [tmp_path / "maps"]


def test_digits_are_compared_only_when_they_are_of_the_same_kind() -> None:
    renamed = SPEC.model_copy(update={"fingerprint": "1" * 64, "packing": "paper_eq5", "prefix_lengths": ()})
    assert difference(SPEC, renamed) == ""
    assert "before of items, depth 2 x groups 3, 1 x 3 values a digit" in difference(
        SPEC, SPEC.model_copy(update={"depth": 2, "groups": 3})
    )
    for change in ({"digits": 8, "depth": 4}, {"levels": 4}, {"lines": 2}, {"entity": "user"}):
        assert difference(SPEC, SPEC.model_copy(update=change))
