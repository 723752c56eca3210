"""What a billion items cost: the arithmetic of docs/scale.md, from the figures in docs/results.

`python -m benchmarks.scale` prints it and writes it between the marks in docs/scale.md. A figure that was not measured
yet is named as missing, with the command that measures it.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, markdown_table
from encoder.config import TrainingConfig
from encoder.sid import SidSpec

PAGE = RESULTS.parent / "scale.md"
GPU_RESULTS = RESULTS / "gpu"
BEGIN, END = "<!-- begin: written by python -m benchmarks.scale -->", "<!-- end -->"
ITEMS = 1_000_000_000
RANKS = 64
COLUMNS = {"what": "", "arithmetic": "", "cost": ""}


class MissingError(Exception):
    """A figure is not in the results; the message says what measures it."""


@dataclass(frozen=True)
class Results:
    """The benchmarks' figures in one folder."""

    folder: Path

    def conditions(self, name: str) -> dict[str, Any]:
        """Give what the figures of a benchmark depend on."""
        found: dict[str, Any] = self._read(name)["conditions"]
        return found

    def figure(self, name: str, value: str, **where: Any) -> float:
        """Give one value of the first row that has it and is described so.

        Raises:
            MissingError: there is none.
        """
        for row in self._read(name)["rows"]:
            if value in row and all(row.get(key) == wanted for key, wanted in where.items()):
                return float(row[value])
        raise MissingError(f"no {value} of {where} in {name}.json: run `python -m benchmarks.{name}`")

    def largest(self, name: str, value: str) -> int:
        """Give the largest value among a benchmark's rows."""
        return max(int(row[value]) for row in self._read(name)["rows"] if value in row)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        except OSError:
            raise MissingError(f"{name}.json is not there: run `python -m benchmarks.{name}`") from None
        return found


def main() -> None:
    """Print the arithmetic and write it into the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the benchmarks' JSON")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is written into")
    arguments = parser.parse_args()
    text = arithmetic(Results(arguments.results), Results(arguments.results / GPU_RESULTS.name))
    print(text)
    arguments.page.write_text(between_marks(arguments.page.read_text(), text))


def arithmetic(cpu: Results, gpu: Results) -> str:
    """Give the tables, in Markdown."""
    parts = [f"### {ITEMS:,} items on CPU cores", _source(cpu), markdown_table(list(_lines(cpu)), COLUMNS)]
    parts += ["### GPUs"]
    if (gpu.folder / "training.json").exists():
        parts += [_source(gpu), markdown_table([_line(training, gpu)], COLUMNS)]
    else:
        parts += [
            "**Not measured.** No figure of this repository was taken on a GPU, so none is given here. On a machine"
            " with one, `python -m benchmarks.training --out docs/results/gpu` writes the figures, and this program"
            " then adds a table of GPU hours by the same arithmetic."
        ]
    return "\n\n".join(part.strip() for part in parts)


def between_marks(page: str, text: str) -> str:
    """Put the text between the page's two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def _source(results: Results) -> str:
    try:
        made = results.conditions("materialize" if (results.folder / "materialize.json").exists() else "training")
    except MissingError as missing:
        return f"Figures: {missing}."
    return f"Figures of {made['date']}, {made['device']}, from `docs/results/*.json`."


def _lines(results: Results) -> Iterator[dict[str, str]]:
    for line in (training, materialization, encoding, memory, tables, columns, the_map, unpacking):
        yield _line(line, results)


def _line(line: Callable[[Results], tuple[str, str, str]], results: Results) -> dict[str, str]:
    try:
        return dict(zip(COLUMNS, line(results), strict=True))
    except MissingError as missing:
        return {"what": line.__name__.replace("_", " "), "arithmetic": str(missing), "cost": "not measured"}


def training(results: Results) -> tuple[str, str, str]:
    """Train on every item for the default epochs."""
    epochs = TrainingConfig().epochs
    batch = results.largest("training", "batch")
    rate = results.figure("training", "items_per_second", ranks=1, batch=batch)
    sum_of = f"{ITEMS:,} items x {epochs} epochs / {rate:,.0f} a second a rank (batch {batch})"
    return f"training, {epochs} epochs over all items", sum_of, _rank_hours(ITEMS * epochs / rate)


def materialization(results: Results) -> tuple[str, str, str]:
    """Run the whole stage: read, check, encode, write, hash."""
    rows = results.largest("materialize", "rows")
    rate = results.figure("materialize", "rows_per_second", what="program", rows=rows)
    return "materialize, the whole program", f"{ITEMS:,} items / {rate:,.0f} a second a rank", _rank_hours(ITEMS / rate)


def encoding(results: Results) -> tuple[str, str, str]:
    """Encode alone, which is what GPUs would take over."""
    rate = results.figure("encoding", "items_per_second", what="network and quantizer (default)", threads=1)
    what = "of it network and quantizer (the default data's signals)"
    return what, f"{ITEMS:,} items / {rate:,.0f} a second a core", _rank_hours(ITEMS / rate)


def memory(results: Results) -> tuple[str, str, str]:
    """Memory of a rank, which does not depend on the number of items."""
    rows = results.largest("materialize", "rows")
    mib = results.figure("materialize", "peak_mib", what="stage", rows=rows)
    return (
        "memory of a rank of materialize",
        f"measured at {rows:,} items; it does not grow with them",
        f"{mib:,.0f} MiB",
    )


def tables(results: Results) -> tuple[str, str, str]:
    """Bytes of the items table with SIDs."""
    rows = results.largest("materialize", "rows")
    each = results.figure("materialize", "bytes_a_row", rows=rows)
    return "items table with SIDs (64 halves)", f"{ITEMS:,} items x {each:.0f} B", _bytes(ITEMS * each)


def columns(results: Results) -> tuple[str, str, str]:
    """Bytes of the SIDs themselves, beside those of what they stand for."""
    spec = SidSpec(quantizer="structured", levels=3, digits=15, depth=5, groups=3, fingerprint="none")
    bits = (spec.radix**spec.digits - 1).bit_length()
    what = f"SIDs, {bits} bits each, beside text embeddings of 384 halves"
    return what, f"{ITEMS:,} x {bits} / 8 B; {ITEMS:,} x 768 B", f"{_bytes(ITEMS * bits / 8)}; {_bytes(ITEMS * 768)}"


def the_map(results: Results) -> tuple[str, str, str]:
    """Bytes of the map on disk while materialize runs."""
    return "map of SIDs on disk while materialize runs", f"{ITEMS:,} items x 8 B", _bytes(ITEMS * 8)


def unpacking(results: Results) -> tuple[str, str, str]:
    """Unpack as many ids for the ranker."""
    ids = min(results.largest("unpack", "ids"), 1 << 16)
    rate = results.figure("unpack", "ids_per_second", what="SIDE", threads=1, ids=ids)
    seconds = ITEMS / rate
    return "SIDE unpacks as many ids", f"{ITEMS:,} ids / {rate:,.0f} a second a core", f"{seconds:,.0f} core seconds"


def _rank_hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f} hours of one rank; {hours / RANKS:,.2f} hours of {RANKS}"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number < 1e12 else f"{number / 1e12:,.2f} TB"


if __name__ == "__main__":
    main()
