"""The plots: loss by method and bits, recall by method, loss by prefix; in the report's style."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sidestack.benchmarks.quantizers.table import REFERENCE
from sidestack.pipelines.report.drawing import LIGHT, Plot, Theme, render

Row = dict[str, Any]

_MARKS = ("o", "s", "D")
_FAMILY_COLOR = {"structured": "side", "scalar": "sid_ngram", "codebook": "dense", "faiss": "none"}
"""The kind of content whose colour in the report a family uses."""


def plots(rows: Sequence[Row], corpus: str) -> list[Plot]:
    """Return the figures of one corpus."""
    here = [row for row in rows if row["corpus"] == corpus]
    measured = [row for row in here if row["method"] != REFERENCE]
    if not measured:
        return []
    least, most = min(row["bits"] for row in measured), max(row["bits"] for row in measured)
    found = [_loss_plot(here, corpus), _recall_plot([row for row in measured if row["bits"] == least], corpus, least)]
    # A search refines the whole code, not its prefixes, so its lines would overlap those of rounding.
    rounded = [row for row in measured if row["bits"] == most and "+search" not in row["method"]]
    residual = [row for row in rounded if len(row["prefix_losses"]) > 1]
    return [*found, _prefix_plot(residual, corpus)] if residual else found


def png(plot: Plot) -> bytes:
    """Draw a figure for a page of Markdown."""
    return render(plot, LIGHT, "png")


def _loss_plot(rows: Sequence[Row], corpus: str) -> Plot:
    bits = sorted({row["bits"] for row in rows})
    measured = [row for row in rows if row["method"] != REFERENCE]
    names = _by_loss(measured)

    def draw(axes: Axes, theme: Theme) -> None:
        _rows_of_names(axes, theme, names, _families(measured))
        for row in rows:
            mark = _MARKS[bits.index(row["bits"])]
            if row["method"] == REFERENCE:
                axes.axvline(row["cosine_loss"], color=theme.muted, linewidth=1, linestyle=_dashes(mark), zorder=1)
                continue
            at, color = names.index(row["method"]), _color(theme, row["family"])
            spread = row["spread"]["cosine_loss"] or 0.0
            axes.errorbar(row["cosine_loss"], at, xerr=spread, fmt=mark, color=color, markersize=5, capsize=2)
        marks = [_key(theme, _MARKS[at], f"{number} bits") for at, number in enumerate(bits)]
        lines = [_key(theme, "", f"normal law, {n} bits", _dashes(_MARKS[at])) for at, n in enumerate(bits)]
        _legend(axes, theme, marks + lines)
        axes.set_xlim(left=0)
        axes.set_xlabel("cosine loss of test rows")

    return Plot(f"quantizers-{corpus}-loss", f"{corpus}: cosine loss", "Cosine loss by method and bits", draw)


def _recall_plot(rows: Sequence[Row], corpus: str, bits: int) -> Plot:
    names = _by_loss(rows)
    kinds = {"recall": ("o", "decoded vectors"), "recall_side": ("s", "SIDE digits"),
             "recall_side_steps": ("D", "SIDE digits times steps")}  # fmt: skip

    def draw(axes: Axes, theme: Theme) -> None:
        _rows_of_names(axes, theme, names, _families(rows))
        for row in rows:
            color = _color(theme, row["family"])
            for kind, (mark, _) in kinds.items():
                if row[kind] is not None:
                    face = color if kind == "recall" else theme.paper
                    at = names.index(row["method"])
                    axes.plot(row[kind]["20"], at, mark, color=color, markerfacecolor=face, markersize=5)
        _legend(axes, theme, [_key(theme, *kind, hollow=name != "recall") for name, kind in kinds.items()])
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the true 20 nearest among the nearest 20")

    title = f"{corpus}: recall at 20, {bits} bits"
    return Plot(f"quantizers-{corpus}-recall", title, "Recall of true neighbours by method", draw)


def _prefix_plot(rows: Sequence[Row], corpus: str) -> Plot:
    ordered = sorted(rows, key=lambda row: float(row["cosine_loss"]))

    def draw(axes: Axes, theme: Theme) -> None:
        dashes = ("-", "--", ":", "-.")
        drawn: dict[str, int] = {}
        keys = []
        for row in ordered:
            number = drawn[row["family"]] = drawn.get(row["family"], -1) + 1
            color, dash = _color(theme, row["family"]), dashes[number % len(dashes)]
            points = sorted((int(n), loss) for n, loss in row["prefix_losses"].items())
            each = row["real_bits"] / row["digits"]
            axes.plot([n * each for n, _ in points], [loss for _, loss in points], dash, color=color, marker=".")
            keys.append(Line2D([], [], color=color, linestyle=dash, label=row["method"]))
        _resize(axes, 0.19 * len(ordered) + 1.6)
        _legend(axes, theme, keys)
        axes.set_ylim(0, 1.08 * max(max(row["prefix_losses"].values()) for row in ordered))
        axes.set_xlim(left=0)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.set_xlabel("bits of the prefix")
        axes.set_ylabel("cosine loss of test rows")

    return Plot(f"quantizers-{corpus}-prefix", f"{corpus}: loss by prefix", "Cosine loss by prefix of the code", draw)


def _by_loss(rows: Sequence[Row]) -> list[str]:
    """Return the methods ordered by their loss at the fewest bits measured."""
    least: dict[str, tuple[int, float]] = {}
    for row in rows:
        here = (row["bits"], float(row["cosine_loss"]))
        least[row["method"]] = min(least.get(row["method"], here), here)
    return sorted(least, key=lambda name: least[name])


def _families(rows: Sequence[Row]) -> dict[str, str]:
    return {row["method"]: row["family"] for row in rows}


def _rows_of_names(axes: Axes, theme: Theme, names: Sequence[str], families: dict[str, str]) -> None:
    """Make one row for each method, with its name in its family's colour."""
    _resize(axes, 0.24 * len(names) + 1.2)
    axes.set_yticks(range(len(names)), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(_color(theme, families[name]))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="both")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _resize(axes: Axes, height: float) -> None:
    """Set the figure's height for its rows; the report's figures all have one size."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(7.2, max(height, 2.6))


def _color(theme: Theme, family: str) -> str:
    return theme.kinds[_FAMILY_COLOR[family]]


def _dashes(mark: str) -> str:
    return {"o": "-", "s": "--", "D": ":"}[mark]


def _key(theme: Theme, mark: str, text: str, dashes: str = "none", *, hollow: bool = False) -> Line2D:
    face = theme.paper if hollow else theme.muted
    return Line2D(
        [], [], color=theme.muted, marker=mark, markerfacecolor=face, linestyle=dashes, markersize=5, label=text
    )


def _legend(axes: Axes, theme: Theme, keys: Sequence[Line2D]) -> None:
    axes.legend(
        handles=keys, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5, labelcolor=theme.muted
    )
