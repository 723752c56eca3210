"""The cost of a billion items: the arithmetic of docs/scale.md, from the figures in docs/results.

`python -m benchmarks.scale` prints it and writes it between the marks in docs/scale.md. A figure without a measurement
is listed as missing, with the command that measures it.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestack.benchmarks.record import RESULTS, markdown_table
from sidestack.encoder.budget import decide
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.sid.spec import SidSpec

PAGE = RESULTS.parent / "scale.md"
GPU_RESULTS = RESULTS / "gpu"
BEGIN, END = "<!-- begin: written by python -m benchmarks.scale -->", "<!-- end -->"
ITEMS = 1_000_000_000
SMALL = "items of one 64-dimensional embedding and one category"
FULL = "the default data's seven signals"
COLUMNS = {"what": "", "arithmetic": "", "cost": ""}


class MissingError(Exception):
    """A figure is not in the results; the message has the command that measures it."""


@dataclass(frozen=True)
class Results:
    """The benchmarks' figures in one folder."""

    folder: Path

    def conditions(self, name: str) -> dict[str, Any]:
        """Return the conditions of a benchmark's figures."""
        found: dict[str, Any] = self._read(name)["conditions"]
        return found

    def figure(self, name: str, value: str, **where: Any) -> float:
        """Return one value of the first row that has it and matches `where`.

        Raises:
            MissingError: there is no such row.
        """
        for row in self._read(name)["rows"]:
            if value in row and all(row.get(key) == wanted for key, wanted in where.items()):
                return float(row[value])
        raise MissingError(f"no {value} of {where} in {name}.json: run `python -m benchmarks.{name}`")

    def largest(self, name: str, value: str) -> int:
        """Return the largest value among a benchmark's rows."""
        return max(int(row[value]) for row in self._read(name)["rows"] if value in row)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
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
    arguments.page.write_text(replace_between_marks(arguments.page.read_text(encoding="utf-8"), text), encoding="utf-8")


def arithmetic(cpu: Results, gpu: Results) -> str:
    """Return the tables, in Markdown."""
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


def replace_between_marks(page: str, text: str) -> str:
    """Return the page with the text between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def _source(results: Results) -> str:
    try:
        made = results.conditions("materialize" if (results.folder / "materialize.json").exists() else "training")
    except MissingError as missing:
        return f"Figures: {missing}."
    return f"Figures of {made['date']}, {made['device']}, from `docs/results/*.json`."


def _lines(results: Results) -> Iterator[dict[str, str]]:
    for line in (training, two_ranks, materialization, encoding, memory, tables, columns, sid_map, unpacking):
        yield _line(line, results)


def _line(line: Callable[[Results], tuple[str, str, str]], results: Results) -> dict[str, str]:
    try:
        return dict(zip(COLUMNS, line(results), strict=True))
    except MissingError as missing:
        return {"what": line.__name__.replace("_", " "), "arithmetic": str(missing), "cost": "not measured"}


def training(results: Results) -> tuple[str, str, str]:
    """Return the line on training with the number of epochs and the batch size that follow from the items."""
    defaults = decide(EncoderConfig(), ITEMS).training
    rate = _training_rate(results, ranks=1)
    sum_of = f"{ITEMS:,} items x {defaults.epochs} epochs / {rate:,.0f} a second (batch {defaults.batch_size})"
    what = f"training, {defaults.epochs} epochs over all items; {SMALL}"
    return what, sum_of, _hours(ITEMS * defaults.epochs / rate)


def two_ranks(results: Results) -> tuple[str, str, str]:
    """Return the line on the speed-up by a second rank on the same machine, as measured."""
    one, two = (_training_rate(results, ranks=ranks) for ranks in (1, 2))
    return "training by two ranks of one machine", f"{two:,.0f} / {one:,.0f} a second", f"{two / one:.2f} x one rank"


def _training_rate(results: Results, ranks: int) -> float:
    batch = decide(EncoderConfig(), ITEMS).training.batch_size
    return results.figure("training", "items_per_second", what="training, default, float32", ranks=ranks, batch=batch)


def materialization(results: Results) -> tuple[str, str, str]:
    """Return the line on the whole stage: read, check, encode, write, hash."""
    rows = results.largest("materialize", "rows")
    rate = results.figure("materialize", "rows_per_second", what="program", rows=rows)
    return f"materialize, the whole program; {SMALL}", f"{ITEMS:,} items / {rate:,.0f} a second", _hours(ITEMS / rate)


def encoding(results: Results) -> tuple[str, str, str]:
    """Return the line on encoding alone, the part that GPUs would do."""
    rate = results.figure("encoding", "items_per_second", what="network and quantizer (default)", threads=1)
    what = f"network and quantizer alone; {FULL}"
    return what, f"{ITEMS:,} items / {rate:,.0f} a second a core", _hours(ITEMS / rate)


def memory(results: Results) -> tuple[str, str, str]:
    """Return the line on the memory of a rank, which does not depend on the number of items."""
    rows = results.largest("materialize", "rows")
    mib = results.figure("materialize", "peak_mib", what="stage", rows=rows)
    return (
        "memory of a rank of materialize",
        f"measured at {rows:,} items; it does not grow with them",
        f"{mib:,.0f} MiB",
    )


def tables(results: Results) -> tuple[str, str, str]:
    """Return the line on the bytes of the items and their SIDs."""
    rows = results.largest("materialize", "rows")
    each = results.figure("materialize", "bytes_a_row", rows=rows)
    return "items (64 halves) and their SIDs", f"{ITEMS:,} items x {each:.0f} B", _bytes(ITEMS * each)


def columns(results: Results) -> tuple[str, str, str]:
    """Return the line on the bytes of the SIDs and of the embeddings that they replace."""
    spec = SidSpec(quantizer="structured", levels=3, digits=15, depth=5, groups=3, fingerprint="none")
    bits = (spec.radix**spec.digits - 1).bit_length()
    what = f"SIDs, {bits} bits each, beside text embeddings of 384 halves"
    return what, f"{ITEMS:,} x {bits} / 8 B; {ITEMS:,} x 768 B", f"{_bytes(ITEMS * bits / 8)}; {_bytes(ITEMS * 768)}"


def sid_map(results: Results) -> tuple[str, str, str]:
    """Return the line on the bytes of the map on disk."""
    return "map from id to SID, kept beside the SIDs", f"{ITEMS:,} items x 8 B", _bytes(ITEMS * 8)


def unpacking(results: Results) -> tuple[str, str, str]:
    """Return the line on unpacking as many ids for the ranker."""
    ids = results.largest("unpack", "ids")
    rate = results.figure("unpack", "ids_per_second", what="SIDE", threads=1, ids=ids)
    seconds = ITEMS / rate
    what = f"SIDE unpacks as many ids, {ids:,} at a time"
    return what, f"{ITEMS:,} ids / {rate:,.0f} a second a core", f"{seconds:,.0f} core seconds"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours of one rank"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number < 1e12 else f"{number / 1e12:,.2f} TB"


if __name__ == "__main__":
    main()
