"""The figures. One panel each, labelled directly, an arm's colour the same in every figure.

The colours are Okabe and Ito's, told apart with every common colour blindness; a dark page has lighter ones.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import colors as mcolors
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipelines.report.comparison import Comparison, EncoderResult, Gain
from pipelines.report.outputs import Curve
from pipelines.report.table import tasks_of, undefined_reason
from pipelines.report.units import byte_size, percent

matplotlib.use("agg")

ARMS = ("none", "sid_ngram", "side", "dense", "kmeans", "hde")
SIZE = (5.2, 3.1)
"""Inches: narrow enough that the labels stay readable on a phone."""


@dataclass(frozen=True)
class Theme:
    """The colours of a page."""

    ink: str
    muted: str
    line: str
    paper: str
    arms: tuple[str, ...]
    values: tuple[str, str, str]
    """Lowest, middle and highest value of a digit, no arm's colour; those between are blended."""


LIGHT = Theme(
    ink="#1f2328", muted="#656d76", line="#d8dde3", paper="#ffffff",
    arms=("#6e7781", "#d55e00", "#0072b2", "#009e73", "#a8528a", "#3a87ad", "#8a6d00"),
    values=("#b3874a", "#e6e8eb", "#2f7d78"),
)  # fmt: skip
DARK = Theme(
    ink="#e6e9ed", muted="#9aa4af", line="#3a424c", paper="#14181d",
    arms=("#a4adb7", "#ff8a3d", "#5cb3f0", "#3fcf9f", "#e39acb", "#86cdf2", "#e0c04a"),
    values=("#c79a5b", "#39414a", "#4fa8a1"),
)  # fmt: skip

Drawing = Callable[[Axes, Theme], None]


@dataclass(frozen=True)
class Plot:
    """One figure of the report.

    Attributes:
        name: file name without ending.
        title: a short heading; the page and the picture itself carry it.
        text: what it shows, for who cannot see it.
        draw: draws it into axes.
    """

    name: str
    title: str
    text: str
    draw: Drawing


def plots(comparison: Comparison, curves: Mapping[str, Mapping[str, Curve]]) -> tuple[Plot, ...]:
    """Give every figure that the numbers allow.

    Args:
        comparison: the numbers.
        curves: for each task and arm the learning curve, possibly empty.
    """
    tasks = [task for task in tasks_of(comparison) if not _undefined(comparison, task)]
    found = [_gain_plot(comparison, task) for task in tasks]
    found += [_curve_plot(comparison, task, curves[task]) for task in tasks if any(curves[task].values())]
    found += [_cost_plot(comparison, task) for task in tasks]
    if comparison.encoder.items:
        found.append(_codebook_plot(comparison.encoder))
    return tuple(found)


def render(plot: Plot, theme: Theme, file_format: str) -> bytes:
    """Draw a figure as ``png`` or ``svg``; equal numbers give equal bytes.

    The SVG is transparent, has its title on the page, and carries its letters as outlines, so it looks alike
    everywhere. The PNG stands alone: it has paper and a title.
    """
    is_svg = file_format == "svg"
    with matplotlib.rc_context(_style(theme)):
        layout = ConstrainedLayoutEngine() if is_svg else ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=SIZE, layout=layout)
        axes = figure.add_subplot()
        plot.draw(axes, theme)
        if not is_svg:
            axes.set_title(plot.title, loc="left", color=theme.ink, fontsize=10.5, pad=12)
        image = io.BytesIO()
        metadata = {"Date": None} if is_svg else {}
        figure.savefig(image, format=file_format, dpi=200, transparent=is_svg, metadata=metadata)
    return image.getvalue()


def arm_colors(comparison: Comparison, theme: Theme) -> dict[str, str]:
    """Give each arm its colour: fixed for the known arms, the rest by turns."""
    others = [name for name in comparison.arms if name not in ARMS]
    order = [*ARMS, *others]
    return {name: theme.arms[order.index(name) % len(theme.arms)] for name in comparison.arms}


def _undefined(comparison: Comparison, task: str) -> bool:
    return bool(undefined_reason(next(iter(comparison.arms.values())).tasks[task]))


def _style(theme: Theme) -> dict[str, object]:
    return {
        "font.size": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "text.color": theme.ink, "axes.labelcolor": theme.muted,
        "xtick.color": theme.line, "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted, "ytick.labelcolor": theme.muted,
        "axes.edgecolor": theme.line, "axes.facecolor": "none", "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper, "grid.color": theme.line, "grid.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "svg.fonttype": "path", "svg.hashsalt": "sidestack",
    }  # fmt: skip


def _gain_plot(comparison: Comparison, task: str) -> Plot:
    names = list(comparison.arms)

    def draw(axes: Axes, theme: Theme) -> None:
        colors = arm_colors(comparison, theme)
        axes.axvline(0.0, color=theme.muted, linewidth=1, zorder=1)
        for position, name in enumerate(names):
            gain = comparison.arms[name].tasks[task].over.get(comparison.reference)
            _gain_row(axes, theme, colors[name], position, gain)
        axes.set_yticks(range(len(names)), names)
        for label, name in zip(axes.get_yticklabels(), names, strict=True):
            label.set_color(colors[name])
            label.set_fontweight("bold")
        axes.set_ylim(len(names) - 0.45, -0.75)
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        _percent_ticks(axes.xaxis)
        axes.set_xlabel(f"NE gain over {comparison.reference}, %")

    title = f"NE gain, {task}"
    told = (
        f"{name} {percent(arm.tasks[task].ne_gain or 0.0)}"
        for name, arm in comparison.arms.items()
        if name != comparison.reference
    )
    return Plot(f"ne_gain_{task}", title, f"{title} over {comparison.reference}: {', '.join(told)}", draw)


def _gain_row(axes: Axes, theme: Theme, color: str, position: int, gain: Gain | None) -> None:
    """Draw one arm: its gain and interval, hollow when that holds 0; without a gain it is the reference."""
    if gain is None:
        axes.plot(0.0, position, "o", color=color, markersize=8, zorder=3)
        _note(axes, theme, "reference", (0.0, position), (11, 0), color=theme.muted)
        return
    axes.plot(gain.ne_gain_interval, [position] * 2, color=color, linewidth=2.5, zorder=2)
    axes.plot(gain.ne_gain, position, "o", color=color, zorder=3, **_mark(theme, gain))
    ink = theme.muted if gain.holds_zero else theme.ink
    _note(axes, theme, percent(gain.ne_gain), (gain.ne_gain, position), (0, 14), color=ink, ha="center")


def _percent_ticks(axis: Axis) -> None:
    """Show shares as signed percents, at round steps whose labels need no rounding."""
    axis.set_major_locator(ticker.MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda share, _: f"{100 * share:+.6g}" if abs(share) > 1e-9 else "0")


def _mark(theme: Theme, gain: Gain) -> dict[str, Any]:
    face = {"markerfacecolor": theme.paper} if gain.holds_zero else {}
    return {"markersize": 8, "markeredgewidth": 2, **face}


def _note(
    axes: Axes, theme: Theme, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any
) -> None:
    """Write beside a point, on a patch of the page's colour that keeps lines from crossing the letters."""
    axes.annotate(
        text, at, xytext=offset, textcoords="offset points", annotation_clip=False,
        **{"va": "center", "fontsize": 9, **style}, bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _curve_plot(comparison: Comparison, task: str, curves: Mapping[str, Curve]) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        colors = arm_colors(comparison, theme)
        ends = {}
        for name, curve in curves.items():
            if curve:
                steps, values = zip(*curve, strict=True)
                axes.plot(steps, values, color=colors[name], linewidth=1.6)
                ends[name] = values[-1]
        _clip_start(axes, curves)
        right = max(curve[-1][0] for curve in curves.values() if curve)
        for name, height in _spread(ends, axes.get_ylim()):
            _note(axes, theme, name, (right, height), (6, 0), color=colors[name], fontweight="bold")
        axes.set_xlim(0, right)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.set_xlabel("training step")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylabel("training NE")

    title = f"Learning curves, {task}"
    ends = (f"{name} ends at {curve[-1][1]:.4f}" for name, curve in curves.items() if curve)
    return Plot(f"learning_{task}", title, f"{title}: {', '.join(ends)}", draw)


def _clip_start(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Let the axis fit the last four fifths: beside the first steps all else would be flat."""
    settled = []
    for curve in curves.values():
        settled += [value for _, value in curve[len(curve) // 5 :]]
    low, high = min(settled), max(settled)
    room = 0.06 * (high - low) or 0.01
    axes.set_ylim(low - room, high + room)


def _spread(ends: Mapping[str, float], limits: tuple[float, float]) -> Iterator[tuple[str, float]]:
    """Move labels apart that would lie on one another, keeping their order."""
    apart = 0.085 * (limits[1] - limits[0])
    order = sorted(ends, key=lambda name: ends[name])
    heights = [ends[name] for name in order]
    for _ in range(50):
        for lower in range(len(heights) - 1):
            overlap = apart - (heights[lower + 1] - heights[lower])
            if overlap > 0:
                heights[lower] -= overlap / 2
                heights[lower + 1] += overlap / 2
    yield from zip(order, heights, strict=True)


def _cost_plot(comparison: Comparison, task: str) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        colors = arm_colors(comparison, theme)
        axes.axhline(0.0, color=theme.muted, linewidth=1, zorder=1)
        for name, arm in comparison.arms.items():
            x, gain = arm.feature_bytes_per_row, arm.tasks[task].over.get(comparison.reference)
            if gain is None:
                axes.plot(x, 0.0, "o", color=colors[name], markersize=8, zorder=3)
                _note(axes, theme, name, (x, 0.0), (0, 14), color=colors[name], fontweight="bold", ha="center")
                continue
            axes.plot([x, x], gain.ne_gain_interval, color=colors[name], linewidth=2.5)
            axes.plot(x, gain.ne_gain, "o", color=colors[name], zorder=3, **_mark(theme, gain))
            _note(axes, theme, name, (x, gain.ne_gain), (10, 6), color=colors[name], fontweight="bold")
            tables = f"{byte_size(arm.sid_table_bytes)} of SID tables"
            _note(axes, theme, tables, (x, gain.ne_gain), (10, -6), color=colors[name], fontsize=8.5)
        widest = max(arm.feature_bytes_per_row for arm in comparison.arms.values())
        axes.set_xlim(-0.07 * (widest or 1), 1.5 * (widest or 1))
        axes.margins(y=0.15)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        _percent_ticks(axes.yaxis)
        axes.set_ylabel(f"NE gain over {comparison.reference}, %")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("bytes of content feature a row")

    title = f"Gain and cost, {task}"
    told = (
        f"{name} {percent(arm.tasks[task].ne_gain or 0.0)} for {byte_size(arm.feature_bytes_per_row)} a row"
        for name, arm in comparison.arms.items()
    )
    return Plot(f"cost_{task}", title, f"{title}: {', '.join(told)}", draw)


def _codebook_plot(encoder: EncoderResult) -> Plot:
    shares = [[count / max(sum(digit), 1) for count in digit] for digit in encoder.histogram]
    values = len(shares[0])
    named = set(range(values)) if values <= 5 else {0, values // 2, values - 1}

    def draw(axes: Axes, theme: Theme) -> None:
        blend = mcolors.LinearSegmentedColormap.from_list("values", theme.values)
        floor = [0.0] * len(shares)
        for value in range(values):
            share = [digit[value] for digit in shares]
            axes.bar(
                range(1, len(shares) + 1), share, bottom=floor, width=0.82, color=blend(value / max(values - 1, 1)),
                edgecolor=theme.paper, linewidth=0.6, label=f"value {value}" if value in named else None,
            )  # fmt: skip
            floor = [below + height for below, height in zip(floor, share, strict=True)]
        axes.legend(
            reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=0.8,
            handleheight=0.8, labelcolor=theme.muted, fontsize=8.5, labelspacing=0.8,
        )  # fmt: skip
        axes.set_ylim(0, 1)
        axes.set_xlim(0.4, len(shares) + 0.6)
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=""))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.tick_params(length=0)
        axes.set_xlabel("digit of the Semantic ID")
        axes.set_ylabel("items, %")

    least = min(max(digit) for digit in shares)
    most = max(max(digit) for digit in shares)
    text = (
        f"Share of items on each of {values} values, for {len(shares)} digits; "
        f"the most used value of a digit has {least:.0%} to {most:.0%}"
    )
    return Plot("codebook_use", "Codebook use", text, draw)
