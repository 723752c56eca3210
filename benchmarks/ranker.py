"""Speed of the ranker: its reader against a bare scan, the parts of a step, and its arms with torchrec's example.

`python -m benchmarks.ranker [--quick] [--out DIR]`. Everything is measured on one rank and one thread, unless noted
otherwise.
"""

import argparse
import collections
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from sidestack.benchmarks.events import IMPRESSIONS, NUM_ITEMS, write_events
from sidestack.benchmarks.goals import PageTable, goal, publish_tables
from sidestack.benchmarks.golden_example import golden_batch, golden_dlrm, golden_pipeline, our_network, our_pipeline
from sidestack.benchmarks.record import Row, results_folder
from sidestack.benchmarks.timing import (
    RATES,
    Contestant,
    Spread,
    Times,
    keep_freed_memory,
    rates,
    run_program,
    take_turns,
    threads,
)
from sidestack.benchmarks.trial import (
    ARMS,
    DEFAULT_MODEL,
    PARTS,
    StepParts,
    Trial,
    config_of,
    kernels,
    progress,
    training_split,
)
from sidestack.infra.config import plain, to_yaml
from sidestack.infra.distributed import World, process_group
from sidestack.infra.impressions import columns_by_table
from sidestack.infra.parquet import RowGroup, row_groups
from sidestack.infra.prefetch import prefetched
from sidestack.infra.snapshot import Dataset
from sidestack.infra.stage import quiet
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.config import ModelConfig
from sidestack.ranker.cost import count_flops
from sidestack.ranker.cpu_sequence_lookup import BagsOfOne
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.reader import Split, ranker_batches
from sidestack.ranker.step_runner import StepRunner
from sidestack.ranker.throughput import UNTIMED_STEPS

BATCH = config_of("none").training.batch_size
READ_ARMS = ("none", "sid_ngram", "side")
WAIT_GOAL = 0.05
LADDER_ARM, RANKS_ARM = "sid_ngram", "side"
WIDE = ModelConfig(cross_rank=256, over_arch=(1024, 512))

WORDS = """
A synthetic log made by stage `prepare`: the default data's numbers of items and users, 32 entries of history, 36 days
of 8,192 training events; SIDs by stage `materialize`, of an encoder that was not trained. Arms, model and training
are the defaults, batches of 1,024 rows, float32. One process, one thread of torch; the reader has threads of its own.
"""
READER_WORDS = """
"scan" reads the columns that the arm reads, of requests, events, labels and SIDs as they lie on disk, row group by row
group, on one thread, and drops them; its rows are impressions. "reader" joins the same files to impressions and yields
shuffled `RankerBatch`es, with every check of the tables' contract, as training takes them, epoch after epoch in one
stream; its threads use the second core too, as those of "scan, two threads" do.
"""
PARTS_WORDS = """
Milliseconds of a step, batches read from disk while it trains. One rank, so no gradient is averaged; the tables' own
optimizer runs inside their backward pass. The last line is the share of a step that waits for data.
"""
ARMS_WORDS = f"""
Steps of trainings in turns, each reading its own events from disk. An arm's cost is one of history entries, whatever
the network above them; "wide" is a network nearer to production's, with {WIDE.over_arch[0]:,} and {WIDE.over_arch[1]}
units over crosses of rank {WIDE.cross_rank}. FLOPs are of matrix products, forward and backward.
"""
GOLDEN_WORDS = """
torchrec's golden training example (examples/golden_training/train_dlrm.py) beside ours, arm `none`. Equal: the tables
(rows, width, row-wise Adagrad in the backward pass), the rows and their ids (16 batches that lie in memory), the
batch, one rank, one thread, the widths of the dense, over and tower layers, `TrainPipelineSparseDist`. Different: the
example is DLRM: it sums a history to one vector, crosses vectors by dot products and has one task; ours keeps every
entry of the history, attends to them with 4 queries, crosses by a low-rank DCNv2 and has two tasks. So two more hold
the network equal. "The example's network in our training": DLRM, sharded and optimized by the ranker's own code. "Our
network in the example's training": `Ranker` with the example's sharding, planner, Adagrad, and
DistributedDataParallel. FLOPs are of matrix products, forward and backward.
"""
LADDER_WORDS = f"""
Arm `{LADDER_ARM}`, the one with most lookups: all that we do, and all but one thing, in turns. "times" is how many
times as fast it is as "all". `python -m benchmarks.ranker` shows every row. The pooled kernel and the fused Adam came
with commit c842b06, batches converted in the thread that reads ahead with 8a0cad0.
"""
RANKS_WORDS = f"""
Stage `ranker` under torchrun, arm `{RANKS_ARM}`, one thread a rank; its own figures of a whole epoch, first
{UNTIMED_STEPS} steps left out.
"""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the benchmark.

    Attributes:
        days: of training. items: of the log. epochs: to read at once. rounds: of turns.
        ladder_rounds: rounds of the ladder. steps: per turn. parts_steps: steps for the table of a step's parts.
        ranks: numbers of ranks.
    """

    days: int
    items: int
    epochs: int
    rounds: int
    ladder_rounds: int
    steps: int
    parts_steps: int
    ranks: tuple[int, ...]


FULL = Sizes(days=36, items=NUM_ITEMS, epochs=4, rounds=9, ladder_rounds=5, steps=24, parts_steps=100, ranks=(1, 2))
QUICK = Sizes(days=2, items=2000, epochs=2, rounds=1, ladder_rounds=1, steps=2, parts_steps=2, ranks=())


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranker", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few steps, to see that it runs")
    parser.add_argument("--impressions", type=int, default=IMPRESSIONS, help="of a request of the log")
    parser.add_argument("--out", type=Path, help="where ranker.json and ranker.md go")
    arguments = parser.parse_args()
    quiet()
    out = results_folder(arguments.out, quick=arguments.quick)
    sizes = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory(prefix="sidestack-ranker-") as folder:
        dataset = write_events(Path(folder), sizes.days, sizes.items, arguments.impressions)
        with threads(1), process_group() as world:
            parts = [measure(dataset, world, sizes) for measure in (reading, step_parts, arms, golden, ladder)]
        if sizes.ranks:
            parts.append(by_ranks(dataset, sizes, Path(folder)))
    goals = [row for _, found in parts for row in found]
    tables = [table for table, _ in parts]
    packages = ["torchrec", "pyarrow"]
    publish_tables("ranker", "The ranker's speed", WORDS, tables, goals, packages=packages, out=out)


Part = tuple[PageTable, Sequence[Row]]


def reading(dataset: Dataset, world: World, sizes: Sizes) -> Part:
    """Measure the reader and a bare scan in turns, for each arm."""
    rows, goals = [], []
    for arm in READ_ARMS:
        split = training_split(dataset, arm)
        reader = split.open(config_of(arm).training, world, is_training=True)
        rows_scanned, rows_read = (sizes.epochs * rows for rows in (reader.num_rows, reader.num_batches * BATCH))
        contestants = {
            "scan": Contestant(partial(scan, split, sizes.epochs), rows_scanned),
            "scan, two threads": Contestant(partial(scan, split, sizes.epochs, 2), rows_scanned),
            "reader": Contestant(partial(read, split, arm, world, sizes.epochs), rows_read),
        }
        times = take_turns(contestants, sizes.rounds)
        rows += [{"arm": arm, "what": name, **rates(times.rate(name))} for name in contestants]
        goals.append(goal(f"reader / scan, {arm}", times.ratio("reader", "scan"), 0.6))
    return PageTable("Reading", READER_WORDS, rows, {"arm": "", "what": "", **RATES}), goals


def scan(split: Split, epochs: int, threads: int = 1) -> None:
    """Read the columns of the tables that an arm reads, `epochs` times, and do nothing else.

    A thread reads one row group after another, table by table.
    """
    of_kind = columns_by_table(split.dataset, split.features.columns)
    groups = [
        (group, columns)
        for tables in of_kind
        for table, columns in tables.items()
        for group in row_groups([file.path for file in split.dataset.files(table, *split.dates)])
    ]

    def read_group(place: tuple[RowGroup, Sequence[str]]) -> None:
        group, columns = place
        with pq.ParquetFile(group.path) as file:
            file.read_row_group(group.index, columns=columns, use_threads=False)

    with ThreadPoolExecutor(threads) as pool:
        collections.deque(pool.map(read_group, groups * epochs), maxlen=0)


def read(split: Split, arm: str, world: World, epochs: int) -> None:
    """Read an arm's batches of `epochs` epochs, as training does."""
    collections.deque(stream(split, arm, world, epochs), maxlen=0)


def stream(split: Split, arm: str, world: World, epochs: int = 1) -> Iterator[RankerBatch]:
    """Return the batches of consecutive epochs, prefetched in a thread."""
    reader = split.open(config_of(arm).training, world, is_training=True)
    batches = ranker_batches(reader, range(epochs), 0, split.features, NewestEntries(), world)
    return prefetched(batches, depth=3)


def step_parts(dataset: Dataset, world: World, sizes: Sizes) -> Part:
    """Measure the parts of a step, for every arm."""
    by_arm = {}
    for arm in ARMS:
        trial = Trial(dataset, arm, world)
        parts = StepParts(trial)
        trial.steps(UNTIMED_STEPS)
        by_arm[arm] = parts.milliseconds(sizes.parts_steps)
        trial.close()
    rows: list[Row] = [{"part": part} | {arm: by_arm[arm][part] for arm in ARMS} for part in (*PARTS, "step")]
    waits = {arm: by_arm[arm]["waiting for data"] / by_arm[arm]["step"] for arm in ARMS}
    rows.append({"part": "waiting, % of a step"} | {arm: 100 * share for arm, share in waits.items()})
    goals = [
        goal(f"step without waiting for data / step, {arm}", Spread(*[1 - share] * 3), 1 - WAIT_GOAL)
        for arm, share in waits.items()
    ]
    return PageTable("A step", PARTS_WORDS, rows, {"part": "", **dict.fromkeys(ARMS, ".2f")}), goals


def arms(dataset: Dataset, world: World, sizes: Sizes) -> Part:
    """Train arms in turns, with the default network and with a wide one."""
    rows, goals = [], []
    for network, model in {"default": DEFAULT_MODEL, "wide": WIDE}.items():
        trials = {arm: Trial(dataset, arm, world, model=model) for arm in READ_ARMS}
        flops = {arm: _flops(partial(trial.steps, 1)) / BATCH for arm, trial in trials.items()}
        times = trained_in_turns(trials, sizes)
        rows += [
            {"network": network, "arm": arm, **rates(times.rate(arm)), "flops_a_row": flops[arm]} for arm in trials
        ]
        goals += [
            goal(f"side / none, samples a second, {network} network", times.ratio("side", "none"), 0.98),
            goal(f"side / sid_ngram, samples a second, {network} network", times.ratio("side", "sid_ngram"), 1),
        ]
    return PageTable("Training", ARMS_WORDS, rows, {"network": "", "arm": "", **RATES, "flops_a_row": ",.0f"}), goals


def trained_in_turns(trials: dict[str, Trial], sizes: Sizes, two_threads: str = "") -> Times:
    """Train trials in turns, the one named `two_threads` with two threads, and close them."""
    for trial in trials.values():
        trial.steps(UNTIMED_STEPS)

    def turn(name: str) -> Callable[[], None]:
        def steps() -> None:
            with threads(2 if name == two_threads else 1):
                trials[name].steps(sizes.steps)

        return steps

    times = take_turns({name: Contestant(turn(name), sizes.steps * BATCH) for name in trials}, sizes.rounds)
    for trial in trials.values():
        trial.close()
    return times


def golden(dataset: Dataset, world: World, sizes: Sizes) -> Part:
    """Train torchrec's golden example and ours in turns, on batches in memory."""
    arm, device = "none", world.device
    ours = Trial(dataset, arm, world)
    held = [batch.to(device) for batch in islice(stream(training_split(dataset, arm), arm, world), 16)]
    theirs = [golden_batch(batch, ours.features) for batch in held]
    runs: dict[str, tuple[TrainPipelineSparseDist[Any, Any], Sequence[Any]]] = {
        "golden example": (golden_pipeline(golden_dlrm(ours.features, ours.config.model, device), device), theirs),
        "the example's network in our training": (
            our_pipeline(golden_dlrm(ours.features, ours.config.model, device), world),
            theirs,
        ),
        "our network in the example's training": (
            golden_pipeline(our_network(ours.features, arm, device), device),
            held,
        ),
        "ours": (ours.pipeline, held),
    }
    flops = {}
    contestants = {}
    for name, (pipeline, batches) in runs.items():
        source = cycle(batches)
        progress(pipeline, source, 1)
        flops[name] = _flops(partial(progress, pipeline, source, 1)) / BATCH
        contestants[name] = Contestant(partial(progress, pipeline, source, sizes.steps), sizes.steps * BATCH)
    times = take_turns(contestants, sizes.rounds)
    ours.close()
    rows = [{"what": name, **rates(times.rate(name)), "flops_a_row": flops[name]} for name in runs]
    pairs = [
        ("the example's network in our training", "golden example"),
        ("ours", "our network in the example's training"),
        ("ours", "golden example"),
    ]
    goals = [goal(f"{name} / {of}", times.ratio(name, of), 1) for name, of in pairs]
    return PageTable(
        "Beside torchrec's golden example", GOLDEN_WORDS, rows, {"what": "", **RATES, "flops_a_row": ",.0f"}
    ), goals


def _flops(work: Callable[[], None]) -> int:
    """Return the number of floating-point operations of a call."""
    with count_flops() as counter:
        work()
    flops: int = counter.get_total_flops()
    return flops


class ReadByItself(StepRunner):
    """A variant in which the training thread assembles and converts batches; row groups are still prefetched."""

    def prefetched(self, batches: Iterator[RankerBatch]) -> Iterator[RankerBatch]:
        """Return the batches without prefetching."""
        return batches


def ladder(dataset: Dataset, world: World, sizes: Sizes) -> Part:
    """Train in turns with all optimizations, and without one of them at a time."""
    everything, two_threads = "all", "all, two threads of torch"
    trials = {everything: Trial(dataset, LADDER_ARM, world), two_threads: Trial(dataset, LADDER_ARM, world)}
    trials["sequences by fbgemm's unpooled kernel"] = unpooled = Trial(dataset, LADDER_ARM, world)
    use_unpooled_kernels(unpooled)
    trials["Adam not fused"] = unfused = Trial(dataset, LADDER_ARM, world)
    for group in unfused.sharded.dense_optimizer.param_groups:
        group["fused"] = False
    trials["rows of a request shuffled one by one"] = Trial(dataset, LADDER_ARM, world, rows_per_request=1)
    trials["batches converted by the training's own thread"] = Trial(dataset, LADDER_ARM, world, ReadByItself)
    times = trained_in_turns(trials, replace(sizes, rounds=sizes.ladder_rounds), two_threads)
    rows: list[Row] = []
    for name in trials:
        ratio = times.ratio(name, everything)._asdict()
        rows.append({"what": name, **rates(times.rate(name))} | {f"times_{key}": x for key, x in ratio.items()})
    columns = {"what": "", **RATES, **dict.fromkeys(("times_median", "times_low", "times_high"), ".2f")}
    return PageTable("What each thing gives", LADDER_WORDS, rows, columns), []


def use_unpooled_kernels(trial: Trial) -> None:
    """Revert `ranker.cpu_sequence_lookup.speed_up_sequences`."""
    for kernel in kernels(trial.sharded):
        if isinstance(kernel.forward, BagsOfOne):
            del kernel.forward
            kernel.emb_module.pooling_mode = PoolingMode.NONE


def by_ranks(dataset: Dataset, sizes: Sizes, folder: Path) -> Part:
    """Run stage `ranker` as a program on one and more ranks, with one thread each."""
    config, out = folder / "ranker.yaml", folder / "out"
    config.write_text(to_yaml({"ranker": plain(config_of(RANKS_ARM))}), encoding="utf-8")
    rows: list[Row] = []
    for ranks in sizes.ranks:
        run_program(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
             "sidestack.ranker.train", "--config", str(config), "--input", f"dataset={dataset.path}",
             "--out", str(out)],
            {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        rows.append({"ranks": ranks} | {name: summary[name] for name in ("samples_per_second", "data_wait_share")})
        shutil.rmtree(out)
    columns = {"ranks": "d", "samples_per_second": ",.0f", "data_wait_share": ".2%"}
    return PageTable("Ranks", RANKS_WORDS, rows, columns), []


if __name__ == "__main__":
    keep_freed_memory()
    main()
