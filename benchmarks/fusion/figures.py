"""The benchmark's two figures: the effect of fusion, and the loss from missing signals."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidestack.benchmarks.fusion.measures import Row, paper_rows
from sidestack.benchmarks.fusion.missing import GUESS
from sidestack.benchmarks.fusion.page import NAMES
from sidestack.benchmarks.fusion.training import FUSION

COLORS = ("#0072b2", "#d55e00")
"""Colours of the first and second signal; Okabe and Ito's, distinguishable with every common colour blindness."""
INK, MUTED = "#1f2328", "#656d76"


def draw_changes(rows: Sequence[Row], file: Path) -> None:
    """Draw the change of each signal's loss by method, ours and the paper's."""
    fused = [row for row in [*rows, *paper_rows()] if row["table"] in ("two", "paper") and row["setting"] == FUSION]
    methods = list(dict.fromkeys(row["method"] for row in fused if row["table"] == "two"))
    figure = Figure(figsize=(6.4, 0.9 + 1.05 * len(methods)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=MUTED, linewidth=1)
    for row in fused:
        if row["method"] in methods and row["change"] is not None:
            _draw_change(axes, row, methods.index(row["method"]))
    axes.set_yticks([line + side for line in range(len(methods)) for side in (-0.17, 0.17)])
    axes.set_yticklabels([f"{NAMES[method]}, {whose}" for method in methods for whose in ("here", "paper")])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.margins(x=0.18)
    axes.set_xlabel("change of the loss by fusing two signals into one SID of 24 bits, %")
    _quiet(axes)
    figure.savefig(file, dpi=200)


def _draw_change(axes: Axes, row: Row, line: int) -> None:
    is_paper = row["table"] == "paper"
    is_text = "text" in row["signal"]
    color = COLORS[is_text]
    height = line + (0.17 if is_paper else -0.17)
    change, deviation = 100 * row["change"], 100 * (row.get("change_spread") or 0)
    axes.errorbar(change, height, xerr=deviation or None, fmt="o", color=color, mfc="white" if is_paper else color)
    name = row["signal"].removesuffix("_embedding")
    offset = (0, -12 if is_text else 6)  # below and above, so that close labels do not overlap
    axes.annotate(name, (change, height), offset, textcoords="offset points", ha="center", fontsize=7.5, color=color)


def draw_missing(rows: Sequence[Row], method: str, file: Path) -> None:
    """Draw how much each signal's reconstruction loses in each case of missing signals."""
    hidden = [row for row in rows if row["table"] == "missing" and row["method"] == method]
    labels = list(dict.fromkeys(row["case"] for row in hidden))
    names = list(dict.fromkeys(row["signal"] for row in hidden))
    loss_CK, guess_CK = np.full((2, len(labels), len(names)), np.nan)
    for row in hidden:
        place = labels.index(row["case"]), names.index(row["signal"])
        loss_CK[place], guess_CK[place] = row["loss"], row["loss"] if row["case"] == GUESS else row["guess"]
    best_K = loss_CK[labels.index("all")]
    lost_CK = (loss_CK - best_K) / np.maximum(guess_CK - best_K, 1e-9)
    figure = Figure(figsize=(1.9 + 0.85 * len(names), 1.1 + 0.3 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(lost_CK, cmap="RdYlBu_r", vmin=0, vmax=1.5, aspect="auto")
    for (case, column), lost in np.ndenumerate(lost_CK):
        ink = "white" if abs(lost - 0.75) > 0.6 else INK
        axes.text(column, case, f"{loss_CK[case, column]:.3g}", ha="center", va="center", fontsize=7.5, color=ink)
    short = [name.removesuffix("_embedding") for name in names]
    axes.set_xticks(range(len(names)), short, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), [label.replace("_embedding", "") for label in labels])
    axes.set_title(f"{NAMES[method]}: held-out loss by what the encoder sees", loc="left", fontsize=9.5, color=INK)
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.6)
    bar.set_label("0: as with all, 1: as one guess", color=MUTED, fontsize=8)
    bar.ax.tick_params(labelsize=8, labelcolor=MUTED, length=0)
    bar.outline.set_visible(False)
    _quiet(axes)
    figure.savefig(file, dpi=200)


def _quiet(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    axes.xaxis.label.set_color(MUTED)
    axes.xaxis.label.set_fontsize(8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
