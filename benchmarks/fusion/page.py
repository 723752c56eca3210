"""The tables for the terminal and for docs/results/fusion.md."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sidestack.benchmarks.fusion.measures import PAPER_SIGNALS, Row, paper_rows
from sidestack.benchmarks.fusion.missing import GUESS
from sidestack.benchmarks.fusion.training import FUSION, ONE_EACH
from sidestack.benchmarks.record import conditions, markdown_table, print_table
from sidestack.encoder.config import TrainingConfig
from sidestack.encoder.signals import CATEGORICAL_WEIGHT

NAMES = {"dpca": "DPCA", "fsq": "FSQ", "rq": "RQ"}
MOST_CHANGE = 9.99

DIFFERENCE = (
    "The paper's signals are two 1,024-dimensional embeddings of image and text from production models, a billion"
    " items to train on; ours are {paired:,} items with both of {first} and {second}, whose texts are short and made"
    " from a few fields. Image and text of one thing say much the same; what a product's text says and who buys it with"
    " what do not, so one code of 24 bits has to hold nearly the sum of both. Compare the changes, not the losses. The"
    " paper prints RQ's change on text without its sign."
)
READING = (
    "`1:1`: an encoder of its own for each signal, 24 bits each. `fusion`: one of 24 bits for all. Held-out items;"
    " no text is on both sides of the split. Mean and standard deviation over seeds."
)
MANY = (
    "{items:,} items, one of each text; seeds: {seeds}. A categorical's loss has weight 1 where it is alone and"
    " {weight:g} where all signals share a code, so its change is of both, the sharing and the weight."
)
HIDDEN = (
    "Held-out loss of each signal when the encoder of all of them gets only some to see. An item counts where something"
    " of it is left to see. `!`: worse, on the items that count, than one and the same guess for all of them, by what"
    " the others are like on the whole (the last row has it on all items)."
    " In training too some rows show only some of their signals: `encoder.training.signal_dropout`,"
    f" {TrainingConfig().signal_dropout:.0%} of them where it is not set."
)


class Section(NamedTuple):
    """One table with its heading.

    Attributes:
        title: the heading. text: how to read it, may be empty.
        rows: cells by column, for display. columns: column -> format, as `benchmarks.record` takes it.
    """

    title: str
    text: str
    rows: list[Row]
    columns: dict[str, str]


def sections(rows: Sequence[Row], corpora: Mapping[str, int]) -> Iterator[Section]:
    """Yield all tables of the benchmark.

    Args:
        rows: see `measures.rows_of` and `missing.missing_rows`.
        corpora: number of items of each corpus, `paired` and `distinct`.
    """
    two = [row for row in rows if row["table"] == "two"]
    first, second = dict.fromkeys(row["signal"] for row in two)
    text = f"{READING} {DIFFERENCE.format(first=first, second=second, **corpora)}"
    yield _beside_the_paper(two, text)
    many = [row for row in rows if row["table"] == "many"]
    text = MANY.format(
        items=corpora["distinct"], weight=CATEGORICAL_WEIGHT, seeds=max(len(row["losses"]) for row in many)
    )
    yield _by_signal(many, text)
    hidden = [row for row in rows if row["table"] == "missing"]
    for method in dict.fromkeys(row["method"] for row in hidden):
        of_method = [row for row in hidden if row["method"] == method]
        yield _by_case(of_method, "loss", f"{NAMES[method]}: loss with signals missing", HIDDEN)
        if any("top1" in row for row in of_method):
            yield _by_case(of_method, "top1", f"{NAMES[method]}: top-1 accuracy with signals missing", "")


def _beside_the_paper(two: Sequence[Row], text: str) -> Section:
    """Return a table of our two signals above the paper's; our text matches its text, our other signal its image."""
    ours = sorted(dict.fromkeys(row["signal"] for row in two), key=lambda name: "text" in name)
    heads = [f"{_short(name)} / {theirs}" for name, theirs in zip(ours, PAPER_SIGNALS, strict=True)]
    changes = [f"change, {head}" for head in heads]
    lines: dict[tuple[str, ...], Row] = {}
    for row in [*two, *paper_rows()]:
        whose, signals = ("paper", PAPER_SIGNALS) if row["table"] == "paper" else ("here", ours)
        column = signals.index(row["signal"])
        cells = {heads[column]: _measured(row["loss"], row.get("spread")), changes[column]: _change(row)}
        setting, method = row["setting"], NAMES[row["method"]]
        line = lines.setdefault((setting, method, whose), {"": f"{setting} {method}", " ": whose})
        line |= cells
    order = (ONE_EACH, FUSION)
    shown = [lines[key] for key in sorted(lines, key=lambda key: (order.index(key[0]), *key[1:]))]
    forms = dict.fromkeys((heads[0], changes[0], heads[1], changes[1]), ">")
    return Section("Two embeddings, beside the paper's Table 1", text, shown, {"": "", " ": "", **forms})


def _short(name: str) -> str:
    return name.removesuffix("_embedding")


def _measured(value: float, deviation: float | None) -> str:
    return f"{value:.4f}" + ("" if deviation is None else f" ±{deviation:.4f}")


def _change(row: Row) -> str:
    """Format a change in per cent; relative to a loss near 0 it is unbounded."""
    change, deviation = row.get("change"), row.get("change_spread")
    if change is None:
        return ""
    if change > MOST_CHANGE:
        return f"> {100 * MOST_CHANGE:.0f} %"
    return f"{100 * change:+.1f} %" + ("" if deviation is None else f" ±{100 * deviation:.1f}")


def _by_signal(many: Sequence[Row], text: str) -> Section:
    cells = {(row["method"], row["signal"], row["setting"]): row for row in many}
    shown = []
    for method, name in dict.fromkeys((row["method"], row["signal"]) for row in many):
        one, fused = cells[method, name, ONE_EACH], cells[method, name, FUSION]
        line: Row = {"method": NAMES[method], "signal": _short(name), "change": _change(fused)}
        for setting, row in ((ONE_EACH, one), (FUSION, fused)):
            line[f"{setting} loss"] = _measured(row["loss"], row["spread"])
            line[f"{setting} top-1"] = row.get("top1")
        shown.append(line)
    number = len({row["signal"] for row in many})
    columns = {
        "method": "", "signal": "", f"{ONE_EACH} loss": ">", f"{FUSION} loss": ">", "change": ">",
        f"{ONE_EACH} top-1": ".1%", f"{FUSION} top-1": ".1%",
    }  # fmt: skip
    return Section(f"{number} signals in one SID", text, shown, columns)


def _by_case(hidden: Sequence[Row], what: str, title: str, text: str) -> Section:
    form = ".3g" if what == "loss" else ".1%"
    lines: dict[str, Row] = {}
    for row in hidden:
        if what not in row:
            continue
        is_worse = what == "loss" and row["case"] != GUESS and row[what] > row["guess"]
        mark = " !" if is_worse else ""
        lines.setdefault(row["case"], {"seen": row["case"].replace("_embedding", "")})[_short(row["signal"])] = (
            f"{row[what]:{form}}{mark}"
        )
    names = dict.fromkeys(_short(row["signal"]) for row in hidden if what in row)
    return Section(title, text, list(lines.values()), {"seen": "", **dict.fromkeys(names, ">")})


def print_page(rows: Sequence[Row], corpora: Mapping[str, int]) -> None:
    """Print the tables."""
    for section in sections(rows, corpora):
        print_table(section.title, section.rows, section.columns)
        print(f"{section.text}\n" if section.text else "")


def as_markdown(rows: Sequence[Row], corpora: Mapping[str, int], pictures: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        rows, corpora: see `sections`.
        pictures: file name -> description.
    """
    made = conditions()
    lines = [
        "# VQ-fusion: what one Semantic ID for many signals costs",
        "",
        f"Written by `{made['command']}` on {made['date']}: {made['device']}, {made['cores']} cores, one a training;"
        f" torch {made['versions']['torch']}.",
        "",
    ]
    for section in sections(rows, corpora):
        text = [section.text, ""] if section.text else []
        lines += [f"## {section.title}", "", *text, markdown_table(section.rows, section.columns)]
    lines += [f"![{text}]({name})\n" for name, text in pictures.items()]
    return "\n".join(lines).rstrip("\n") + "\n"
