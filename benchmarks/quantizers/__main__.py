"""Train and measure every quantizer on the same vectors at equal bits, and write table, JSON, page and plots.

Each result is kept under the digest of all it depends on, so a stopped benchmark resumes where it was. The tables use
only test rows; choose settings by the validation column.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from sidestack.benchmarks import record
from sidestack.benchmarks.items import newest_dataset
from sidestack.benchmarks.quantizers import corpora as sources
from sidestack.benchmarks.quantizers import figures, table
from sidestack.benchmarks.quantizers.corpora import Corpus, Sizes, Source
from sidestack.benchmarks.quantizers.methods import BITS, METHODS
from sidestack.benchmarks.quantizers.work import Outcome, Task, outcomes
from sidestack.infra.errors import ConfigError, DataError, SidestackError

_HERE = Path(__file__).parent
_PACKAGES = ("faiss-cpu", "numpy", "pyarrow")
_QUICK_METHODS = ("dpca", "structured_85x3", "fsq_clamp", "faiss_pq", "faiss_rq_beam5", "faiss_lsq")
_QUICK_SIZES = Sizes(training=4000, test=1500, queries=200)
_QUICK_SETS = ("encoder.training.epochs=2", "encoder.network.hidden=128", "encoder.network.embedding_width=64")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; exit with 1 when a run failed or a setting is wrong."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    try:
        failed = _run(arguments)
    except SidestackError as error:
        print(f"quantizers: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    for outcome in failed:
        print(f"quantizers: {outcome.task.label}: {outcome.error}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizers", description=__doc__)
    add = parser.add_argument
    add("--corpora", nargs="+", choices=("text", "glove"), default=["text", "glove"])
    add("--vectors", type=Path, metavar="FILE.npy", help="a float matrix in place of the corpora")
    add("--dataset", type=Path, metavar="DIR", help="prepared dataset of the text corpus; default: the newest in runs/")
    add("--methods", nargs="+", choices=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)}; default: all")
    add("--bits", nargs="+", type=int, choices=BITS)
    add("--seeds", nargs="+", type=int)
    add("--config", type=Path, help="shared network and training in place of the corpus's own file")
    add("--set", action="append", default=[], metavar="A.B=C", help="override it, for every method of ours")
    add("--jobs", type=int, default=os.cpu_count(), help="runs side by side, one thread each; default: the cores")
    add("--quick", action="store_true", help="few rows, steps and methods, 24 bits, one seed: does it run?")
    add("--fresh", action="store_true", help="run also what was run before")
    add("--kept", action="store_true", help="run nothing: tables of what was run before, of all that is asked for")
    add("--cache", type=Path, default=Path("runs/benchmarks/quantizers"), metavar="DIR", help="where runs are kept")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where table and plots go; default: docs/results, if quick runs/benchmarks/quick",
    )
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.methods = arguments.methods or (list(_QUICK_METHODS) if quick else list(METHODS))
    arguments.bits = arguments.bits or ([24] if quick else list(BITS))
    arguments.seeds = arguments.seeds or ([0] if quick else [0, 1, 2])
    arguments.out = record.results_folder(arguments.out, quick=quick)
    return arguments


def _run(arguments: argparse.Namespace) -> list[Outcome]:
    sizes = _QUICK_SIZES if arguments.quick else Sizes()
    corpora: list[tuple[Corpus, str]] = []
    tasks: list[Task] = []
    sets = (*(_QUICK_SETS if arguments.quick else ()), *arguments.set)
    for source in _sources(arguments):
        corpus = sources.make_corpus(source, arguments.cache / "corpora", sizes)
        corpora.append((corpus, source.origin))
        config = (arguments.config or _config(source.name)).resolve()
        runs = product(arguments.seeds, arguments.bits, arguments.methods)
        tasks += [Task(corpus, method, bits, seed, config, sets) for seed, bits, method in runs]
    folder = arguments.cache / "runs"
    if arguments.kept:
        if arguments.fresh:
            raise ConfigError("--kept runs nothing, --fresh runs everything: give one of them")
        tasks = [task for task in tasks if task.result_file(folder).is_file()]
        if not tasks:
            raise DataError(f"{folder}: keeps no result of what is asked for, by the code as it is now")
    done = []
    for outcome in outcomes(tasks, folder, jobs=arguments.jobs, fresh=arguments.fresh):
        done.append(outcome)
        _print_outcome(outcome, len(done), len(tasks))
    rows = table.rows_of(done)
    rows += table.reference_rows([corpus for corpus, _ in corpora], rows)
    _show(rows, corpora, arguments.bits)
    _write(rows, corpora, arguments.out)
    return [outcome for outcome in done if outcome.result is None]


def _sources(arguments: argparse.Namespace) -> list[Source]:
    if arguments.vectors is not None:
        return [sources.file_source(arguments.vectors)]
    found = []
    if "text" in arguments.corpora:
        found.append(sources.text_source(arguments.dataset or newest_dataset(Path("runs"))))
    if "glove" in arguments.corpora:
        found.append(sources.glove_source())
    return found


def _config(corpus: str) -> Path:
    own = _HERE / f"{corpus}.yaml"
    return own if own.is_file() else _HERE / "vectors.yaml"


def _print_outcome(outcome: Outcome, number: int, total: int) -> None:
    if outcome.result is None:
        what = "failed"
    else:
        took = "kept" if outcome.wall_seconds is None else f"{outcome.wall_seconds:,.0f} s"
        what = f"cosine loss {outcome.result['cosine_loss']:.4f} ({took})"
    print(f"[{number}/{total}] {outcome.task.label}: {what}", file=sys.stderr, flush=True)


def _show(rows: list[table.Row], corpora: Sequence[tuple[Corpus, str]], bits: Sequence[int]) -> None:
    for (corpus, _), number in product(corpora, bits):
        if here := table.table_rows(rows, corpus.name, number):
            record.print_table(f"\n{corpus.name}, {number} bits", here, table.CONSOLE_COLUMNS)
    if goals := table.goals_of(rows):
        record.print_table("\ngoals", [goal.cells() for goal in goals], table.GOAL_COLUMNS)


def _write(rows: list[table.Row], corpora: Sequence[tuple[Corpus, str]], out: Path) -> None:
    path = record.write_results("quantizers", rows, packages=_PACKAGES, out=out)
    drawn = [plot for corpus, _ in corpora for plot in figures.plots(rows, corpus.name)]
    for plot in drawn:
        (out / f"{plot.name}.png").write_bytes(figures.png(plot))
    conditions = json.loads(path.read_text(encoding="utf-8"))["conditions"]
    names = [f"{plot.name}.png" for plot in drawn]
    path.with_suffix(".md").write_text(table.page(rows, corpora, conditions, names), encoding="utf-8")
    print(f"\nwritten: {path}, {path.with_suffix('.md').name}, {len(drawn)} plots", file=sys.stderr)


if __name__ == "__main__":
    main()
