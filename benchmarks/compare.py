"""Memory and time of comparing arms, against the rows: `python -m benchmarks.compare [--quick] [--out DIR]`.

Predictions of four arms are fabricated in a temporary directory, in the order in which lanes deal rows, and
measured as the stage `compare` does, each size in a process of its own. Left out are the bootstrap, which knows users
and not rows, and the drawing of the report.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.record import Row, results_folder
from sidestack.benchmarks.timing import Spread, own_peak_bytes
from sidestack.infra.parquet_writer import TableWriter
from sidestack.pipelines.report.measure import measure
from sidestack.pipelines.report.segments import EarlierPositives

ARMS = ("none", "sid_ngram", "side", "dense")
TASKS = ("click", "conversion")
USERS, ITEMS = 50_000, 20_000
LANES = 64
SIZES, QUICK_SIZES = (1_000_000, 10_000_000), (20_000, 40_000)
MOST_GROWTH = 1.25
"""Peak memory of the largest size over that of the smallest."""

COLUMNS = {"rows": ",d", "arms": "d", "seconds": ".1f", "peak_mib": ".0f", "rows_per_second": ",.0f"}
WORDS = """
Four arms of one training each, two tasks (`conversion` judged on clicks), 50,000 users: every metric with its sums by
user, deciles and segments. Peak memory is that of the process, its libraries included. Rows are
sorted on disk by DuckDB in `ranker.predictions.MEMORY`.
"""


def main() -> None:
    """Fabricate, measure each size in its own process, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, to see that it runs")
    parser.add_argument("--out", type=Path, help="where compare.json and compare.md go")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure)))
        return
    rows: list[Row] = [in_own_process(size) for size in (QUICK_SIZES if arguments.quick else SIZES)]
    growth = rows[0]["peak_mib"] / rows[-1]["peak_mib"]
    goals = [goal("memory of the fewest rows over that of the most", Spread(growth, growth, growth), 1 / MOST_GROWTH)]
    publish(
        "compare", "Comparing arms at scale", WORDS, [*rows, *goals], COLUMNS, packages=("duckdb", "numpy", "pyarrow"),
        out=results_folder(arguments.out, quick=arguments.quick),
    )  # fmt: skip


def in_own_process(num_rows: int) -> dict[str, Any]:
    """Fabricate that many rows an arm and measure them in a fresh process, whose peak memory is then theirs."""
    with TemporaryDirectory() as folder:
        for seed, arm in enumerate(ARMS):
            fabricate(Path(folder) / arm, num_rows, seed)
        command = [sys.executable, "-m", "sidestack.benchmarks.compare", "--measure", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fabricate(path: Path, num_rows: int, seed: int) -> None:
    """Write an arm's predictions: the same rows and labels for every seed, other scores."""
    tables = batches(num_rows, seed)
    first = next(tables)
    with TableWriter(path / "predictions/part-00000.parquet", first.schema) as writer:
        writer.write(first)
        for table in tables:
            writer.write(table)


def batches(num_rows: int, seed: int) -> Iterator[pa.Table]:
    """Draw rows as ranks write them: some of every lane, then the next of every lane."""
    a_lane = num_rows // LANES
    step = min(1024, a_lane)
    for start in range(0, a_lane, step):
        places_S = np.arange(start, min(start + step, a_lane))
        rows_N = (np.arange(LANES)[:, None] * a_lane + places_S).ravel()
        labels, scores = np.random.default_rng([start, 0]), np.random.default_rng([start, 1, seed])
        rate_N = 0.3 * labels.random(len(rows_N)) ** 2
        click_N = (labels.random(len(rows_N)) < rate_N).astype(np.int8)
        conversion_N = click_N * (labels.random(len(rows_N)) < 0.3)
        score_N = np.clip(rate_N * scores.lognormal(0.0, 0.3, len(rows_N)), 0.0, 1.0)
        yield pa.table({
            "row": rows_N,
            "user_id": labels.integers(0, USERS, len(rows_N)),
            "item_id": labels.integers(0, ITEMS, len(rows_N)),
            "click": pa.array(click_N, pa.int8()),
            "conversion": pa.array(conversion_N, pa.int8(), mask=click_N == 0),
            "p_click": pa.array(score_N, pa.float32()),
            "p_conversion": pa.array(0.2 + 0.5 * score_N, pa.float32()),
        })  # fmt: skip


def measured(folder: Path) -> dict[str, Any]:
    """Reduce the arms that lie in a folder, and return time and this process's peak memory."""
    rng = np.random.default_rng(0)
    earlier = EarlierPositives({"user": rng.integers(0, 20, USERS), "item": rng.integers(0, 20, ITEMS)})
    start = time.perf_counter()
    found = measure({arm: [folder / arm] for arm in ARMS}, TASKS, earlier, folder)
    seconds = time.perf_counter() - start
    return {
        "rows": found.num_rows,
        "arms": len(ARMS),
        "seconds": seconds,
        "peak_mib": own_peak_bytes() / 2**20,
        "rows_per_second": len(ARMS) * found.num_rows / seconds,
    }


if __name__ == "__main__":
    main()
