"""Growth of SID tables with the number of items, compared with SIDE, which has none.

`python -m benchmarks.sid_growth [--quick] [--out DIR]`. From 10^4 to 10^7 synthetic items with SIDs of the default
spec: distinct prefixes, the share of them that collide in the default tables, and the bytes of tables.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidestack.benchmarks.items import items_spec
from sidestack.benchmarks.record import Row, markdown_table, print_table, results_folder, source, write_results
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.tables import TaskSpec
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures, arm_features
from sidestack.ranker.id_tables import collision_share
from sidestack.ranker.planner import unsharded_model

Ids = npt.NDArray[np.int64]

SPEC = SidSpec(
    quantizer="structured", levels=3, digits=15, depth=5, groups=3, prefix_lengths=(5, 10, 15), fingerprint="none"
)
"""The spec by the defaults of encoder and materialize."""
MAX_ROWS = 2**18
"""Rows of a table; a run's tables follow from its items (`ranker.budget`)."""
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
SKEW = (0.6, 0.3, 0.1)
"""Probabilities of a digit's levels where codes are used unevenly; a prefix's hash assigns them to levels."""
COLUMNS = {
    "codes": "",
    "items": ",d",
    "digits": "d",
    "distinct": ",d",
    "rows": ",d",
    "collision_share": ".2%",
    "mib": ",.1f",
    "own_row_mib": ",.1f",
}
WORDS = """
SIDs of 15 ternary digits, prefixes of 5, 10 and 15 digits, as `sid_ngram` takes them: for each length a table for the
ad and one for the history, {dim} wide, at most {rows:,} rows a table (ids by modulo). `collision_share`: of the
different prefixes, those that share their row with another. `mib`: both tables of that size, weights alone;
`own_row_mib`: both with a row for each different prefix, so that nothing collides. SIDE takes {side:,.2f} MiB for any
number of items: Omega, the layers of the ad's code, and the look-up tables of the unpacking.

The items are drawn, not encoded. "even": all codes are as likely, so different SIDs grow as fast as they can. "skewed":
the levels of a digit have chances {skew}, in an order that depends on the digits before. Which of the two an encoder's
codes are like is what its own use of codes says; the ranker's summary has the measured numbers of a run
(`tables` in `summary.json`).
"""


def main() -> None:
    """Count, print, draw and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sid_growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 items, to see that it runs")
    parser.add_argument("--out", type=Path, help="where sid_growth.json, .md and .png go")
    arguments = parser.parse_args()
    out = results_folder(arguments.out, quick=arguments.quick)
    sizes = SIZES[:3] if arguments.quick else SIZES
    ngram = features_of("sid_ngram")
    rows = [row for name, draw in DRAWS.items() for row in growth(name, draw(sizes[-1]), sizes, ngram)]
    rows.append({"codes": "SIDE", "mib": side_bytes() / 2**20})
    print_table("SID tables", rows, COLUMNS)
    write_results("sid_growth", rows, out=out)
    draw_growth(rows, out / "sid_growth.png")
    (out / "sid_growth.md").write_text(_page(rows), encoding="utf-8")


def features_of(arm: str) -> ArmFeatures:
    """Lay out a default arm over items with SIDs of `SPEC`."""
    # The SIDs' tables do not depend on task or number of users.
    spec = items_spec(1).model_copy(update={"tasks": {"click": TaskSpec()}, "num_users": 1})
    return arm_features(spec, config_of(arm), {SPEC.name: SPEC})


def config_of(arm: str) -> RankerConfig:
    """Return a default arm, with tables of a fixed size."""
    arms = {name: one.model_copy(update={"max_rows": MAX_ROWS}) for name, one in RankerConfig().arms.items()}
    return RankerConfig(arm=arm, arms=arms).resolved()


def even_ids(items: int) -> Ids:
    """Draw SIDs, all equally likely."""
    return np.random.default_rng(0).integers(SPEC.radix**SPEC.digits, size=items)


def skewed_ids(items: int) -> Ids:
    """Draw SIDs digit by digit, with level probabilities `SKEW` in an order that depends on the digits before."""
    rng = np.random.default_rng(0)
    bounds = np.cumsum(SKEW)[:-1]
    ids_N = np.zeros(items, np.int64)
    for digit in range(SPEC.digits):
        place_N = np.searchsorted(bounds, rng.random(items, np.float32), side="right")
        turn_N = ((ids_N + digit) * 2_654_435_761 >> 7) % SPEC.radix
        ids_N = ids_N * SPEC.radix + (place_N + turn_N) % SPEC.radix
    return ids_N


DRAWS: dict[str, Callable[[int], Ids]] = {"even": even_ids, "skewed": skewed_ids}


def growth(codes: str, ids_N: Ids, sizes: Sequence[int], ngram: ArmFeatures) -> Iterator[Row]:
    """Count the prefixes of the first items, for growing numbers of items.

    Args:
        codes: the draw's name. ids_N: SIDs of all items. sizes: numbers of items to count. ngram: the tables.
    """
    dim = RankerConfig().model.embedding_dim
    bags = [feature for feature in ngram.bags if feature.is_sid]
    for size in sizes:
        for length, feature in zip(SPEC.prefix_lengths, bags, strict=True):
            distinct = np.unique(ids_N[:size] // SPEC.radix ** (SPEC.digits - length))
            yield {
                "codes": codes,
                "items": size,
                "digits": length,
                "distinct": len(distinct),
                "rows": feature.rows,
                "collision_share": collision_share(distinct, feature.rows),
                "mib": 2 * feature.rows * dim * 4 / 2**20,
                "own_row_mib": 2 * len(distinct) * dim * 4 / 2**20,
            }


def side_bytes() -> int:
    """Return the additional bytes of `side` over `none`: weights, and the constants of the unpacking."""

    def held(arm: str) -> int:
        body = unsharded_model(features_of(arm), config_of(arm), torch.device("meta"), ModelConstants()).body
        return sum(tensor.nbytes for tensor in (*body.parameters(), *body.buffers()))

    return held("side") - held("none")


COLORS = {"even": "#0072b2", "skewed": "#d55e00", "side": "#009e73"}
INK, MUTED = "#1f2328", "#656d76"


def draw_growth(rows: Sequence[Row], file: Path) -> None:
    """Draw the bytes of tables without collisions, and the collisions in default tables, by number of items."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    side = next(row["mib"] for row in rows if row["codes"] == "SIDE")
    for codes in DRAWS:
        own = [row for row in rows if row["codes"] == codes]
        sizes = sorted({row["items"] for row in own})
        bytes_S = [sum(row["own_row_mib"] for row in own if row["items"] == size) for size in sizes]
        left.plot(sizes, bytes_S, marker="o", markersize=4, color=COLORS[codes], label=f"a row an id, {codes} codes")
        longest = [row for row in own if row["digits"] == SPEC.digits]
        shares = [100 * row["collision_share"] for row in longest]
        right.plot(sizes, shares, marker="o", markersize=4, color=COLORS[codes], label=f"{codes} codes")
    capped = sum(row["mib"] for row in own if row["items"] == sizes[0])
    left.axhline(capped, color=INK, linestyle="--", linewidth=1, label=f"default rows, {capped:,.0f} MiB")
    left.axhline(side, color=COLORS["side"], linewidth=1.5, label=f"SIDE, {side:.2f} MiB")
    left.set_yscale("log")
    _finish(left, "SID tables, MiB", "Bytes of sid_ngram's tables")
    rows_most = max(row["rows"] for row in own)
    right.set_ylim(0, 102)
    _finish(right, "ids that share a row, %", f"Collisions of whole SIDs in {rows_most:,} rows")
    figure.savefig(file, dpi=200)


def _finish(axes: Axes, unit: str, title: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("items", color=MUTED, fontsize=8.5)
    axes.set_ylabel(unit, color=MUTED, fontsize=8.5)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _page(rows: Sequence[Row]) -> str:
    counted: list[Row] = [row for row in rows if "items" in row]
    facts: dict[str, Any] = {
        "dim": RankerConfig().model.embedding_dim,
        "rows": max(row["rows"] for row in counted),
        "side": next(row["mib"] for row in rows if row["codes"] == "SIDE"),
        "skew": ", ".join(f"{chance:g}" for chance in SKEW),
    }
    picture = "![bytes and collisions by the number of items](sid_growth.png)"
    table = markdown_table(counted, COLUMNS)
    return "\n\n".join(["# Growth of SID tables", WORDS.strip().format(**facts), source(), picture, table])


if __name__ == "__main__":
    main()
