"""Rows, goals and the Markdown page from results: means over seeds, with their spread."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from sidestack.benchmarks.quantizers.corpora import Corpus
from sidestack.benchmarks.quantizers.methods import METHODS
from sidestack.benchmarks.quantizers.reference import gaussian_reference
from sidestack.benchmarks.quantizers.work import Outcome
from sidestack.benchmarks.record import markdown_table

Row = dict[str, Any]

REFERENCE = "gaussian_rd"
_SPREAD = ("cosine_loss", "mse", "recall", "recall_side", "recall_side_steps", "unique_share")

COLUMNS = {
    "method": "",
    "real bits": ".1f",
    "cosine loss": ".4f",
    "± seeds": ".4f",
    "seeds": "d",
    "valid.": ".4f",
    "mse": ".4f",
    "R@20": ".3f",
    "R@50": ".3f",
    "R@100": ".3f",
    "SIDE R@20": ".3f",
    "SIDE R@100": ".3f",
    "steps R@20": ".3f",
    "steps R@100": ".3f",
    "entropy": ".0%",
    "dead": ".0f",
    "unique": ".1%",
    "train s": ",.0f",
    "vectors/s": ",.0f",
}
CONSOLE_COLUMNS = {
    name: COLUMNS[name] for name in ("method", "cosine loss", "± seeds", "valid.", "R@20", "SIDE R@20", "train s")
}
"""The columns that fit in 80 characters."""


def rows_of(outcomes: Iterable[Outcome]) -> list[Row]:
    """Return a row for each corpus, method and number of bits with a result, in the order of the tasks' names."""
    groups: dict[tuple[str, int, str], list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: _place(outcome)):
        if outcome.result is not None:
            task = outcome.task
            groups.setdefault((task.corpus.name, task.bits, task.method), []).append(outcome)
    return [_row(*group, members) for group, members in groups.items()]


def _place(outcome: Outcome) -> tuple[str, int, int, int]:
    task = outcome.task
    return task.corpus.name, task.bits, list(METHODS).index(task.method), task.seed


def _row(corpus: str, bits: int, method: str, members: Sequence[Outcome]) -> Row:
    results = [member.result for member in members if member.result is not None]
    first = results[0]
    whole = {name: first[name] for name in ("digits", "radix", "real_bits")}
    return {
        "corpus": corpus,
        "method": method,
        "family": METHODS[method].family,
        "bits": bits,
        **combined(results, mean),
        **whole,
        "seeds": [member.task.seed for member in members],
        "spread": combined([{name: result[name] for name in _SPREAD} for result in results], _deviation),
        "per_seed": {name: [result[name] for result in results] for name in ("cosine_loss", "validation_loss", "mse")},
    }


def combined(values: Sequence[Any], function: Callable[[Sequence[float]], float | None]) -> Any:
    """Apply a function to corresponding values of nested results; None stays None."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: combined([value[key] for value in values], function) for key in first}
    if isinstance(first, list):
        return [combined(list(parts), function) for parts in zip(*values, strict=True)]
    return None if first is None else function(values)


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def reference_rows(corpora: Sequence[Corpus], measured: Sequence[Row]) -> list[Row]:
    """Return the Gaussian rate-distortion values, one row for each corpus and number of bits that was measured."""
    rows = []
    for corpus in corpora:
        for number in sorted({row["bits"] for row in measured if row["corpus"] == corpus.name}):
            mse, loss = gaussian_reference(corpus.training, number)
            row = {"corpus": corpus.name, "method": REFERENCE, "family": "reference", "bits": number}
            rows.append({**row, "real_bits": float(number), "cosine_loss": loss, "mse": mse})
    return rows


def table_rows(rows: Iterable[Row], corpus: str, bits: int) -> list[Row]:
    """Return the table of one corpus at one number of bits, by `COLUMNS`, sorted by rising cosine loss."""
    chosen = [row for row in rows if row["corpus"] == corpus and row["bits"] == bits]
    return [_cells(row) for row in sorted(chosen, key=lambda row: float(row["cosine_loss"]))]


def _cells(row: Row) -> Row:
    cells: Row = {
        "method": row["method"],
        "real bits": row["real_bits"],
        "cosine loss": row["cosine_loss"],
        "mse": row["mse"],
    }
    if row["method"] == REFERENCE:
        return cells
    side, steps = row["recall_side"] or {}, row["recall_side_steps"] or {}
    use = row["use"]
    return cells | {
        "± seeds": row["spread"]["cosine_loss"],
        "seeds": len(row["seeds"]),
        "valid.": row["validation_loss"],
        **{f"R@{k}": share for k, share in row["recall"].items()},
        "SIDE R@20": side.get("20"),
        "SIDE R@100": side.get("100"),
        "steps R@20": steps.get("20"),
        "steps R@100": steps.get("100"),
        "entropy": sum(use["entropy_bits"]) / row["real_bits"],
        "dead": sum(use["dead_levels"]),
        "unique": row["unique_share"],
        "train s": row["seconds"],
        "vectors/s": row["encoded_per_second"],
    }


class Goal(NamedTuple):
    """One goal of the project: `ours` should have a smaller loss than `theirs`."""

    corpus: str
    bits: int
    ours: Row
    theirs: Row

    @property
    def change(self) -> float:
        """Our cosine loss / theirs - 1."""
        return float(self.ours["cosine_loss"] / self.theirs["cosine_loss"] - 1)

    def cells(self) -> Row:
        """Return the row of the goals' table."""
        return {
            "corpus": self.corpus,
            "bits": self.bits,
            "ours": self.ours["method"],
            "loss": self.ours["cosine_loss"],
            "against": self.theirs["method"],
            "its loss": self.theirs["cosine_loss"],
            "change": self.change,
            "reached": "yes" if self.change < 0 else "no",
        }


GOAL_COLUMNS = {
    "corpus": "",
    "bits": "d",
    "ours": "",
    "loss": ".4f",
    "against": "",
    "its loss": ".4f",
    "change": "+.1%",
    "reached": "",
}


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    """Return the goals that the rows decide.

    They are: the best of the structured family below faiss LSQ at 24 bits; DPCA below RQ-VAE and below FSQ at every
    number of bits. If a side has several methods, the one with the least validation loss represents it.
    """
    found = []
    for corpus, bits in sorted({(row["corpus"], row["bits"]) for row in rows}):
        here = [row for row in rows if (row["corpus"], row["bits"]) == (corpus, bits) and row["family"] != "reference"]
        pairs = [(_named(here, "dpca"), _named(here, "rqvae")), (_named(here, "dpca"), _named(here, "fsq"))]
        if bits == 24:
            pairs.insert(0, ([row for row in here if row["family"] == "structured"], _named(here, "faiss_lsq")))
        found += [Goal(corpus, bits, _best(ours), _best(theirs)) for ours, theirs in pairs if ours and theirs]
    return found


def _named(rows: Sequence[Row], beginning: str) -> list[Row]:
    return [row for row in rows if row["method"].startswith(beginning)]


def _best(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: float(row["validation_loss"]))


_HOW = """\
Cosine loss is the mean of 1 - cos(x, decoded) over the test rows, which nothing was trained or chosen on; rows are
ordered by it. `± seeds` is the standard deviation over so many `seeds`, `valid.` the same loss on the validation
rows. `mse` is the mean of |x - c d|^2 over unit vectors x, with d the decoded vector at unit length and c one number
fitted on training rows. `R@k` is the share of the true 20 nearest test rows among the nearest k by cosine, where
queries and corpus are both what the code makes of them: decoded vectors, `SIDE` the centred digits themselves,
`steps` those times the published steps. `entropy` is the entropy of the digits over their real bits, `dead` the
number of values that no test row takes, `unique` different codes by test rows. `train s` and `vectors/s` (encoding)
are seconds of one thread, with as many such runs side by side as there were jobs, and whatever else the machine did;
[encoding](encoding.md) has the speed on quiet cores. Our encoders have one network and one budget for each corpus;
faiss's quantizers learn from at most 131,072 of the same training rows. `+search` is the same trained encoder with
its codes refined by two rounds of coordinate descent through the decoder; `vectors/s` tells what that costs.
`dpca_prefix` decoded half of its training rows from a random prefix. `gaussian_rd` is the rate-distortion value D(R)
of a normal law of the training rows' covariance (reverse water-filling), and as cosine loss 1 - sqrt(1 - D); it is no
floor, for no corpus here is normal.
"""


def page(
    rows: Sequence[Row], corpora: Sequence[tuple[Corpus, str]], conditions: Mapping[str, Any], figures: Sequence[str]
) -> str:
    """Return the Markdown page.

    Args:
        rows: methods and references. corpora: each with the sentence on its origin.
        conditions: see `record.conditions`. figures: file names.
    """
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    made = f"Made by `{conditions['command']}` on {conditions['date']}, {conditions['device']}, {versions}."
    parts = ["# Quantizers at equal bits", made, _HOW]
    if goals := goals_of(rows):
        parts += ["## Goals", markdown_table([goal.cells() for goal in goals], GOAL_COLUMNS)]
        parts.append("What was tried on the way is in [quantizer-trials.md](quantizer-trials.md).")
    for corpus, origin in corpora:
        parts.append(f"## {corpus.name}")
        sizes = f"{len(corpus.training):,} training, {len(corpus.validation):,} validation, {len(corpus.test):,} test"
        parts.append(f"{origin}. {corpus.test.shape[1]} dimensions; {sizes} rows; {len(corpus.queries):,} queries.")
        parts += [f"![{corpus.name}]({name})" for name in figures if name.startswith(f"quantizers-{corpus.name}-")]
        for bits in sorted({row["bits"] for row in rows if row["corpus"] == corpus.name}):
            table = table_rows(rows, corpus.name, bits)
            parts += [f"### {corpus.name}, {bits} bits", markdown_table(table, COLUMNS)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
