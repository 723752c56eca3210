"""Stage `materialize` compared with raw Parquet reading and writing and with its network alone; its memory by rows.

`python -m benchmarks.materialize [--quick] [--rows N] [--out DIR]`. The stage runs as usual, as a program.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sidestack.benchmarks.goals import goal, publish
from sidestack.benchmarks.items import ALONE, random_batch, write_encoder, write_items
from sidestack.benchmarks.record import results_folder
from sidestack.benchmarks.timing import Contestant, Finished, Spread, Times, run_program, spread, take_turns, threads
from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.encoding import encode
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.prepare.contract import STORE

COLUMNS = {
    "what": "", "rows": ",d", "rows_per_second": ",.0f", "low": ",.0f", "high": ",.0f", "peak_mib": ".0f",
    "bytes_a_row": ".0f",
}  # fmt: skip
WORDS = """
Items with an embedding of 64 halves, a category and a short text to SIDs by an encoder of the default sizes, on one
rank. "read and write" reads the columns that the encoder takes, row group by row group, and writes one column of
integers, with the same compression and nothing else; "network alone" encodes rows that lie ready as tensors. Each of
the two on one thread. The stage's time is that of its body: verifying the items' partition, reading, checks, encoding,
writing, counting; not starting Python, nor what "program" includes beside the body. Memory is the program's largest
resident set. Bytes a row are those of the Parquet files of items and SIDs.
"""
BOUNDS = ("read and write", "network alone")
FLAT = 1.15
"""Maximum ratio of the larger run's memory to the smaller's."""


@dataclass(frozen=True)
class Sizes:
    """Rows of the smaller and the larger run, and of one round of the network alone; rounds."""

    few: int
    many: int
    network: int
    rounds: int


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.materialize", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--rows", type=int, default=10_000_000, help="items of the largest run")
    parser.add_argument("--out", type=Path, help="where materialize.json and materialize.md go")
    arguments = parser.parse_args()
    out = results_folder(arguments.out, quick=arguments.quick)
    full = Sizes(few=1_000_000, many=arguments.rows, network=1 << 17, rounds=3)
    sizes = Sizes(few=50_000, many=200_000, network=1 << 14, rounds=2) if arguments.quick else full
    with tempfile.TemporaryDirectory(prefix="sidestack-materialize-") as folder, threads(1):
        rows = measured(Path(folder), sizes)
    publish("materialize", "Materialization", WORDS, rows, COLUMNS, packages=["pyarrow"], out=out)


@dataclass(frozen=True)
class Stage:
    """A run of the stage: seconds of its body, the finished program, and bytes of items and SIDs on disk."""

    seconds: float
    program: Finished
    stored_bytes: int


def measured(folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Measure in turns with fewer rows, then the stage once with more rows."""
    write_encoder(folder / "encoder", EncoderConfig())
    few, times = _measure_in_turns(folder, sizes)
    write_items(folder / "many", sizes.many)
    many = run_stage(folder, "many")
    rows = [_row(name, sizes.few, times.rate(name)) for name in BOUNDS]
    for stages, number in ((few, sizes.few), ([many], sizes.many)):
        bodies = spread([number / stage.seconds for stage in stages])
        programs = spread([number / stage.program.seconds for stage in stages])
        rows += [_row("stage", number, bodies, stages), _row("program", number, programs, stages)]
    slower = min(BOUNDS, key=lambda name: times.rate(name).median)
    # There is one run with more rows; it is compared with the median of the others.
    late = sizes.many / many.seconds / times.rate(slower).median
    growth = max(stage.program.peak_bytes for stage in few) * FLAT / many.program.peak_bytes
    return [
        *rows,
        goal(f"stage / {slower}, {sizes.few:,} rows", times.ratio("stage", slower), 0.7),
        goal(f"stage / {slower}, {sizes.many:,} rows", Spread(late, late, late), 0.7),
        goal(f"{FLAT} x memory of {sizes.few:,} rows / memory of {sizes.many:,}", Spread(growth, growth, growth), 1),
    ]


def _measure_in_turns(folder: Path, sizes: Sizes) -> tuple[list[Stage], Times]:
    """Run in turns the stage, reading and writing alone, and the network alone."""
    write_items(folder / "few", sizes.few)
    bundle = load_bundle(folder / "encoder", ALONE.device)
    batch = random_batch(sizes.network)
    files = [file.path for file in read_dataset(folder / "few").files("items")]
    stages: list[Stage] = []
    contestants = {
        "read and write": Contestant(lambda: read_and_write(files, folder / "copy.parquet"), sizes.few),
        "network alone": Contestant(lambda: encode(bundle, bundle.spec, batch), sizes.network),
        "program": Contestant(lambda: stages.append(run_stage(folder, "few")), sizes.few),
    }
    times = take_turns(contestants, sizes.rounds)
    shutil.rmtree(folder / STORE)
    counted = stages[-sizes.rounds :]
    return counted, Times({**times.seconds, "stage": [stage.seconds / sizes.few for stage in counted]})


def read_and_write(files: Sequence[Path], copy: Path) -> None:
    """Read what the stage reads from Parquet files, row group by row group, and write as much as it writes."""
    schema = pa.schema([("item_id", pa.int64())])
    columns = ["item_id", "embedding", "category"]
    with pq.ParquetWriter(copy, schema, compression="zstd", compression_level=3) as writer:
        for path in files:
            with pq.ParquetFile(path) as file:
                for group in range(file.metadata.num_row_groups):
                    table = file.read_row_group(group, columns, use_threads=False)
                    writer.write_table(table.select(schema.names), row_group_size=table.num_rows)
    copy.unlink()


def run_stage(folder: Path, dataset: str) -> Stage:
    """Run the stage as a program on one rank, and remove its output."""
    config, out, store = folder / "config.yaml", folder / "out", folder / STORE
    config.write_text("materialize: {prefix_lengths: {sid: [5, 10]}}\n", encoding="utf-8")
    program = run_program(
        [sys.executable, "-m", "sidestack.encoder.materialize", "--config", str(config), "--out", str(out),
         "--input", f"dataset={folder / dataset}", "--input", f"encoder.sid={folder / 'encoder'}"],
        {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    stored = sum(path.stat().st_size for path in store.rglob("*.parquet"))
    shutil.rmtree(out)
    shutil.rmtree(store / "sids")
    return Stage(summary["seconds"], program, stored)


def _row(what: str, rows: int, rate: Spread, stages: Sequence[Stage] = ()) -> dict[str, Any]:
    found = {"what": what, "rows": rows, "rows_per_second": rate.median, "low": rate.low, "high": rate.high}
    if not stages:
        return found
    peak_mib = max(stage.program.peak_bytes for stage in stages) / 2**20
    return {**found, "peak_mib": peak_mib, "bytes_a_row": stages[0].stored_bytes / rows}


if __name__ == "__main__":
    main()
