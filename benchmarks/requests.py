"""Benefit of computing the features that a request's impressions share once: training, reading, long histories, ranks.

`python -m benchmarks.requests [--quick] [--before CHECKOUT] [--out DIR]`. With `--before`, the training of another
checkout is timed too, in a process of its own, on the same log.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidestack.benchmarks.events import IMPRESSIONS, NUM_ITEMS, write_events
from sidestack.benchmarks.goals import PageTable, goal, publish_tables
from sidestack.benchmarks.ranker import read
from sidestack.benchmarks.record import Row, results_folder
from sidestack.benchmarks.timing import (
    RATES,
    Contestant,
    Spread,
    keep_freed_memory,
    rates,
    run_program,
    spread,
    take_turns,
    threads,
)
from sidestack.benchmarks.trial import PARTS, StepParts, Trial, config_of, training_split
from sidestack.infra.distributed import World, process_group
from sidestack.infra.impressions import read_impressions
from sidestack.infra.lane import Batch
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import quiet
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.reader import Split, to_ranker_batch
from sidestack.ranker.throughput import UNTIMED_STEPS

ARMS = ("none", "sid_ngram", "side", "dense")
PIECES = {"one by one": 1, "4 together": 4, "whole requests": None}
BATCH = config_of("none").training.batch_size
HELD = 16
HISTORY_ARM = "side"

WORDS = f"""
A synthetic log made by stage `prepare`: the default data's numbers of items and users, {IMPRESSIONS} impressions a
request, 32 entries of history; SIDs of an encoder that was not trained. Arms, model and training are the defaults,
batches of {BATCH:,} rows, float32, one process and one thread of torch unless said otherwise.
"""
TRAINING_WORDS = """
Steps of trainings in turns, each reading its own events from disk. "One by one": rows are shuffled by themselves, so
that a batch shares nearly nothing; "4 together": requests are cut into pieces of four; "whole requests": the default.
"""
BEFORE_WORDS = """
Steps of trainings of this checkout and of an earlier one, whole requests, each a process of its own, in turns.
"""
READING_WORDS = """
"flat scan" reads the same columns of the same rows from a Parquet file in which every impression repeats what its
request has, as tables of version 1 did, and drops them; "reader" makes shuffled `RankerBatch`es of whole requests.
Rows are impressions; the scan has one thread, the reader threads of its own.
"""
HISTORY_WORDS = """
Microseconds a row of a training step of arm `side`, on batches in memory whose histories were lengthened to so many
entries. "rows" is how many rows of a request a batch has together.
"""
RANKS_WORDS = """
Steps on batches in memory under torchrun, arm `side`, one thread a rank, each rank with its share of the global batch:
the same batch as one rank has, and one that leaves each rank as many rows.
"""
STEP_WORDS = """
Milliseconds of a step on rank 0, the same trainings with clocks on the parts. What a part waits for other ranks is in
it: lookups and the tables' backward pass exchange vectors and gradients, and averaging adds up the losses too.
"""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the benchmark: days and items of the log, rounds of turns, steps per turn, lengths of histories."""

    days: int
    items: int
    rounds: int
    steps: int
    lengths: tuple[int, ...]
    ranks: tuple[int, ...]


FULL = Sizes(days=12, items=NUM_ITEMS, rounds=5, steps=16, lengths=(32, 256, 1024), ranks=(1, 2))
QUICK = Sizes(days=2, items=2000, rounds=1, steps=2, lengths=(32, 64), ranks=())

Part = tuple[PageTable, Sequence[Row]]


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.requests", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few steps, to see that it runs")
    parser.add_argument("--before", type=Path, help="a checkout whose training is timed beside this one's")
    parser.add_argument("--steps-of", nargs=4, metavar=("DATASET", "ARM", "STEPS", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where requests.json and requests.md go")
    arguments = parser.parse_args()
    quiet()
    if arguments.steps_of:
        found = in_memory(*arguments.steps_of)
        if found is not None:
            print(json.dumps(found))
        return
    sizes, out = QUICK if arguments.quick else FULL, results_folder(arguments.out, quick=arguments.quick)
    with tempfile.TemporaryDirectory(prefix="sidestack-requests-") as folder:
        dataset = write_events(Path(folder), sizes.days, sizes.items)
        with threads(1), process_group() as world:
            parts = [training(dataset, world, sizes), reading(dataset, world, sizes, Path(folder))]
            parts.append(long_histories(dataset, world, sizes))
        if arguments.before:
            parts.insert(1, compare_checkouts(arguments.before, sizes, Path(folder)))
        if sizes.ranks:
            parts += by_ranks(dataset, sizes)
    tables, goals = [table for table, _ in parts], [row for _, found in parts for row in found]
    title = "Every history once"
    publish_tables("requests", title, WORDS, tables, goals, packages=["torchrec", "pyarrow"], out=out)


def training(dataset: Dataset, world: World, sizes: Sizes) -> Part:
    """Train every arm in turns, with the rows of a request kept together and not."""
    rows: list[Row] = []
    for arm in ARMS:
        trials = {name: Trial(dataset, arm, world, rows_per_request=number) for name, number in PIECES.items()}
        for trial in trials.values():
            trial.steps(UNTIMED_STEPS)
        contestants = {
            name: Contestant(partial(trial.steps, sizes.steps), sizes.steps * BATCH) for name, trial in trials.items()
        }
        times = take_turns(contestants, sizes.rounds)
        for name, trial in trials.items():
            trial.close()
            times_one = times.ratio(name, "one by one").median
            rows.append({"arm": arm, "rows": name, **rates(times.rate(name)), "times": times_one})
    return PageTable("Training", TRAINING_WORDS, rows, {"arm": "", "rows": "", **RATES, "times": ".2f"}), []


_STEPS_OF_BEFORE = """
import sys, time
from pathlib import Path
import torch
from sidestack.benchmarks.trial import Trial
try:
    from sidestack.infra.distributed import process_group
except ImportError:  # the name in versions up to 0.2.0
    from sidestack.infra.distributed import started as process_group
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.stage import quiet
quiet(); torch.set_num_threads(1)
with process_group() as world:
    trial = Trial(read_dataset(Path(sys.argv[1])), sys.argv[2], world)
    trial.steps(10)
    began = time.perf_counter(); trial.steps(int(sys.argv[3])); seconds = time.perf_counter() - began
    trial.close()
print(seconds)
"""


_EVENTS_OF_BEFORE = """
import sys
from pathlib import Path
from sidestack.benchmarks.events import write_events
write_events(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""


def adapt_imports(program: str, checkout: Path) -> str:
    """Return a program with a checkout's module names; in version 0.2.0, modules are not in a package."""
    return program if (checkout / "sidestack").is_dir() else program.replace("from sidestack.", "from ")


def compare_checkouts(before: Path, sizes: Sizes, folder: Path) -> Part:
    """Train the arms of this checkout and of another in turns, on the same log, in each one's table format."""
    rows, goals = [], []
    checkouts, steps = {"before": before.resolve(), "now": Path(__file__).resolve().parents[1]}, 4 * sizes.steps
    for name, checkout in checkouts.items():
        (folder / name).mkdir()
        command = [
            sys.executable,
            "-c",
            adapt_imports(_EVENTS_OF_BEFORE, checkout),
            str(folder / name),
            str(sizes.days),
            str(sizes.items),
        ]
        run_program(command, {"PYTHONPATH": str(checkout)}, checkout)
    for arm in ARMS:
        found: dict[str, list[float]] = {name: [] for name in checkouts}
        for _ in range(max(sizes.rounds // 2, 1)):
            for name, checkout in checkouts.items():
                command = [
                    sys.executable,
                    "-c",
                    adapt_imports(_STEPS_OF_BEFORE, checkout),
                    str(folder / name / "dataset"),
                    arm,
                    str(steps),
                ]
                where = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
                seconds = float(run_program(command, where, checkout).output.split()[-1])
                found[name].append(steps * BATCH / seconds)
        ratio = spread(np.divide(found["now"], found["before"]))
        rows += [{"arm": arm, "what": name, **rates(spread(each))} for name, each in found.items()]
        goals.append(goal(f"now / before, {arm}", ratio, 4.0 if arm == "dense" else 2.5))
    return PageTable("Beside an earlier checkout", BEFORE_WORDS, rows, {"arm": "", "what": "", **RATES}), goals


def reading(dataset: Dataset, world: World, sizes: Sizes, folder: Path) -> Part:
    """Measure the reader, and a scan of the same rows written as a flat table."""
    rows, goals = [], []
    for arm in ("none", "sid_ngram", "side"):
        split = training_split(dataset, arm)
        file, number = write_flat(split, folder / f"flat-{arm}.parquet")
        reader = split.open(config_of(arm).training, world, is_training=True)
        contestants = {
            "flat scan": Contestant(partial(scan_flat, file), number),
            "reader": Contestant(partial(read, split, arm, world, 1), reader.num_batches * BATCH),
        }
        times = take_turns(contestants, sizes.rounds)
        rows += [{"arm": arm, "what": name, **rates(times.rate(name))} for name in contestants]
        goals.append(goal(f"reader / flat scan, rows, {arm}", times.ratio("reader", "flat scan"), 1.5))
    return PageTable("Reading", READING_WORDS, rows, {"arm": "", "what": "", **RATES}), goals


def write_flat(split: Split, path: Path) -> tuple[Path, int]:
    """Write an arm's columns, joined, and return the file and its rows."""
    rows = read_impressions(split.dataset, split.features.columns, *split.dates)
    first = next(rows)
    with TableWriter(path, first.schema) as writer:
        for group in chain([first], rows):
            writer.write_group(group)
    return path, writer.rows


def scan_flat(path: Path) -> None:
    """Read a file row group by row group, and discard the rows."""
    with pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            file.read_row_group(index, use_threads=False)


def long_histories(dataset: Dataset, world: World, sizes: Sizes) -> Part:
    """Train on batches in memory with histories of several lengths."""
    trial = Trial(dataset, HISTORY_ARM, world)
    rows: list[Row] = []
    contestants = {}
    for length in sizes.lengths:
        for name, number in PIECES.items():
            held = [lengthened(batch, length, trial) for batch in batches(trial, HISTORY_ARM, world, number, 2)]
            step = partial(train_on, trial, held)
            contestants[f"{length}/{name}"] = Contestant(step, len(held) * BATCH)
    times = take_turns(contestants, max(sizes.rounds // 2, 1))
    trial.close()
    for length in sizes.lengths:
        found = {name: 1e6 / times.rate(f"{length}/{name}").median for name in PIECES}
        rows.append({"entries": length, **found})
    return PageTable("Long histories", HISTORY_WORDS, rows, {"entries": ",d", **dict.fromkeys(PIECES, ".1f")}), []


def train_on(trial: Trial, held: Sequence[RankerBatch]) -> None:
    """Take a step on each batch, without the pipeline, which would still hold batches of the previous turn."""
    for batch in held:
        trial.sharded.optimizer.zero_grad()
        loss, _ = trial.sharded.model(batch)
        loss.backward()
        trial.sharded.optimizer.step()


def batches(trial: Trial, arm: str, world: World, rows_per_request: int | None, number: int) -> Iterator[Batch]:
    """Return `number` batches of an arm, not yet converted."""
    training = trial.config.training.model_copy(update={"rows_per_request": rows_per_request})
    return islice(training_split(trial.dataset, arm).open(training, world, is_training=True).epoch(0), number)


def lengthened(batch: Batch, entries: int, trial: Trial) -> RankerBatch:
    """Repeat the entries of each history in place until it has `entries`, and convert the batch."""
    shared = batch.rows.shared
    assert shared is not None
    for name in trial.features.sequence_columns:
        lists = shared[name].combine_chunks()
        lengths_R = lists.value_lengths().to_numpy().astype(np.int64)
        starts_R, number_R = np.cumsum(lengths_R) - lengths_R, np.where(lengths_R > 0, entries, 0)
        place_T = np.concatenate([np.arange(n) for n in number_R])
        taken_T = np.repeat(starts_R, number_R) + place_T * np.repeat(lengths_R, number_R) // entries
        offsets = pa.array(np.concatenate([[0], np.cumsum(number_R)]).astype(np.int32))
        column = pa.ListArray.from_arrays(offsets, lists.flatten().take(pa.array(taken_T)), type=lists.type)
        shared = shared.set_column(shared.schema.get_field_index(name), shared.schema.field(name), column)
    return to_ranker_batch(batch._replace(rows=replace(batch.rows, shared=shared)), trial.features)


def by_ranks(dataset: Dataset, sizes: Sizes) -> list[Part]:
    """Train on batches in memory on one and more ranks, and measure the parts of a step."""
    rates_found: list[Row] = []
    parts_found: list[Row] = []
    for ranks, batch in [(number, BATCH * times) for number in sizes.ranks for times in sorted({1, number})]:
        finished = run_program(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
             "sidestack.benchmarks.requests", "--steps-of", str(dataset.path), "side", str(8 * sizes.steps),
             str(batch)],
            {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        (found,) = (json.loads(line) for line in finished.output.splitlines() if line.startswith("{"))
        named = {"ranks": ranks, "batch": batch}
        rates_found.append({**named, "samples_per_second": found["rate"]})
        parts_found.append({**named, **found["parts"]})
    one, *several = (row["samples_per_second"] for row in rates_found)
    goals = [
        goal(f"{row['ranks']} ranks / 1, batches of {row['batch']:,}", Spread(*[rate / one] * 3), 1.7)
        for row, rate in zip(rates_found[1:], several, strict=True)
    ]
    by_part = dict.fromkeys(["step", *PARTS], ".2f")
    return [
        (
            PageTable("Ranks", RANKS_WORDS, rates_found, {"ranks": "d", "batch": ",d", "samples_per_second": ",.0f"}),
            goals,
        ),
        (PageTable("Where a step goes", STEP_WORDS, parts_found, {"ranks": "d", "batch": ",d", **by_part}), []),
    ]


def in_memory(path: str, arm: str, steps: str, batch: str) -> Row | None:
    """Return the samples per second of steps on batches in memory, and each part's milliseconds per step.

    The parts are measured after the rate. Return None on all ranks except the first.
    """
    number, rows = int(steps), int(batch)
    with threads(1), process_group() as world:
        trial = Trial(read_dataset(Path(path)), arm, world, batch_size=rows)
        trial.hold(HELD)
        trial.steps(UNTIMED_STEPS)
        began = time.perf_counter()
        trial.steps(number)
        rate = number * rows / (time.perf_counter() - began)
        parts = StepParts(trial).milliseconds(number)
        trial.close()
        return {"rate": rate, "parts": dict(parts)} if world.is_main else None


if __name__ == "__main__":
    keep_freed_memory()
    main()
