"""`python -m benchmarks.fusion`: one quantizer for all signals against one for each (the paper's Table 1, and more).

Every encoder is trained by the product's own stage. Trained encoders are kept below `--cache`, so an interrupted run
resumes, and more seeds cost only their own trainings.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidestack.benchmarks.fusion.corpus import distinct, paired, write_corpus
from sidestack.benchmarks.fusion.figures import draw_changes, draw_missing
from sidestack.benchmarks.fusion.measures import Row, plan, rows_of
from sidestack.benchmarks.fusion.missing import missing_rows
from sidestack.benchmarks.fusion.page import as_markdown, print_page
from sidestack.benchmarks.fusion.training import FUSION, METHODS, Trainer
from sidestack.benchmarks.items import newest_dataset
from sidestack.benchmarks.record import results_folder, write_results
from sidestack.encoder.signals import chosen_signals
from sidestack.infra.errors import DataError
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.run import exit_status

HOLDOUT = 0.1


@dataclass(frozen=True)
class Scale:
    """The number and sizes of the trainings.

    Attributes:
        methods: names of `METHODS`. seeds: for the table of two signals. many_seeds: for the table of all signals.
        epochs: passes over a corpus. rows: maximum number of items of a corpus; None for all.
    """

    methods: tuple[str, ...]
    seeds: int
    many_seeds: int
    epochs: int
    rows: int | None


FULL = Scale(tuple(METHODS), seeds=3, many_seeds=1, epochs=12, rows=None)
QUICK = Scale(("dpca",), seeds=1, many_seeds=1, epochs=1, rows=4000)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Raises:
        SystemExit: 1 after an error that the user can fix.
    """
    arguments = _parse(argv)
    with exit_status():
        _run(arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.fusion", description=__doc__)
    parser.add_argument("--dataset", type=Path, help="a committed prepare output; default: the newest below runs/")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/fusion"), help="keeps what is trained")
    parser.add_argument("--out", type=Path, help="directory of fusion.json, fusion.md and pictures")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="quantizers; default: all")
    parser.add_argument("--seeds", type=int, help=f"of the table of two signals; default {FULL.seeds}")
    parser.add_argument("--many-seeds", type=int, help=f"of the table of all signals; default {FULL.many_seeds}")
    parser.add_argument("--epochs", type=int, help=f"passes over a corpus; default {FULL.epochs}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at once, a thread each")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override an encoder setting")
    parser.add_argument("--quick", action="store_true", help="one method on few items: does it run at all")
    return parser.parse_args(argv)


def _scale(arguments: argparse.Namespace) -> Scale:
    base = QUICK if arguments.quick else FULL
    return Scale(
        methods=tuple(arguments.methods or base.methods),
        seeds=arguments.seeds or base.seeds,
        many_seeds=arguments.many_seeds or base.many_seeds,
        epochs=arguments.epochs or base.epochs,
        rows=base.rows,
    )


def _run(arguments: argparse.Namespace) -> None:
    scale = _scale(arguments)
    source = arguments.dataset or newest_dataset(Path("runs"))
    signals = chosen_signals({}, read_dataset(source).spec)
    if len(signals.embeddings) < 2:
        raise DataError(f"{source}: has {len(signals.embeddings)} embedding signals; fusing is measured on two")
    two = tuple(signals.embeddings)[:2]
    cache = arguments.cache.resolve()
    corpora = {
        choice.__name__: write_corpus(cache, source, choice, two, HOLDOUT, scale.rows) for choice in (paired, distinct)
    }
    plans = {
        "two": plan(scale.methods, dict.fromkeys(two, 1.0), scale.seeds, corpora["paired"]),
        "many": plan(scale.methods, signals.weights, scale.many_seeds, corpora["distinct"]),
    }
    trainer = Trainer(cache, scale.epochs, HOLDOUT, arguments.set)
    outputs = trainer.all([training for trainings in plans.values() for training in trainings], arguments.jobs)
    rows = [row for table, trainings in plans.items() for row in rows_of(table, trainings, outputs)]
    for method in scale.methods:
        fused = [
            outputs[training]
            for training, setting in plans["many"].items()
            if setting == FUSION and training.method == method
        ]
        rows += missing_rows(method, fused, corpora["distinct"], HOLDOUT)
    items = {name: read_dataset(path).spec.num_items for name, path in corpora.items()}
    _write(results_folder(arguments.out, quick=arguments.quick), rows, items)


def _write(out: Path, rows: Sequence[Row], items: dict[str, int]) -> None:
    print_page(rows, items)
    written = write_results("fusion", rows, packages=("pyarrow",), out=out)
    draw_changes(rows, out / "fusion_change.png")
    pictures = {"fusion_change.png": "Change of the loss by fusing, here and in the paper"}
    method = rows[-1]["method"] if all(row["method"] != "dpca" for row in rows) else "dpca"
    draw_missing(rows, method, out / "fusion_missing.png")
    pictures["fusion_missing.png"] = "Held-out loss of each signal by what the encoder sees"
    (out / "fusion.md").write_text(as_markdown(rows, items, pictures), encoding="utf-8")
    print(f"{written}\n{out / 'fusion.md'}")


if __name__ == "__main__":
    main()
