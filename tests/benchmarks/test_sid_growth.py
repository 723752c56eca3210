"""The benchmark of growing SID tables: counts equal those of sets, and SIDE's bytes are computed by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sidestack.benchmarks.sid_growth import SPEC, even_ids, features_of, growth, main, side_bytes, skewed_ids


@pytest.mark.parametrize("draw", [even_ids, skewed_ids])
def test_counts_equal_those_of_sets(draw: object) -> None:
    ids_N = draw(3000)  # type: ignore[operator]
    assert ids_N.min() >= 0
    assert ids_N.max() < 3**15
    rows = list(growth("x", ids_N, (1000, 3000), features_of("sid_ngram")))
    for row in rows:
        prefixes = {id // 3 ** (15 - row["digits"]) for id in ids_N[: row["items"]].tolist()}
        assert row["distinct"] == len(prefixes)
        assert row["mib"] * 2**20 == 2 * min(3 ** row["digits"], 2**18) * 32 * 4
        assert row["own_row_mib"] * 2**20 == 2 * len(prefixes) * 32 * 4
    assert [row["digits"] for row in rows] == [*SPEC.prefix_lengths] * 2


def test_skewed_codes_are_skewed_and_use_every_level_of_every_digit() -> None:
    ids_N = skewed_ids(20_000)
    digits_N15 = ids_N[:, None] // 3 ** np.arange(14, -1, -1) % 3
    assert {tuple(np.unique(column)) for column in digits_N15.T} == {(0, 1, 2)}
    assert len(np.unique(ids_N // 3**5)) < 0.7 * len(np.unique(even_ids(20_000) // 3**5))


def test_bytes_of_side_are_omega_and_the_ads_layers_and_the_lookup_tables() -> None:
    omega, layers = 15 * 32, (15 * 64 + 64) + (64 * 32 + 32)
    lookup = (2 * 3**8 + 1) * 8  # two numbers of eight digits each, and a row of zeros for unknown SIDs
    assert side_bytes() == 4 * (omega + layers + 2 * lookup)


def test_quick_run_writes_table_picture_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sid_growth", "--quick", "--out", str(tmp_path)])
    main()
    rows = json.loads((tmp_path / "sid_growth.json").read_text())["rows"]
    assert len(rows) == 2 * 3 * 3 + 1
    assert (tmp_path / "sid_growth.png").stat().st_size > 10_000
    assert "| even | 100,000 | 15 |" in (tmp_path / "sid_growth.md").read_text()
