"""Style and shared parts of the figures: one panel each, with the same colour for an arm in every figure.

The colours are Okabe and Ito's, distinguishable with every common colour blindness; a dark page has lighter ones.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import attrgetter
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from sidestack.pipelines.report.comparison import Comparison, Gain, Verdict
from sidestack.ranker.contents import content_kinds
from sidestack.ranker.contents.contract import Color

matplotlib.use("agg")

SIZE = (5.2, 3.1)
"""Inches: narrow enough that the labels stay readable on a phone."""


@dataclass(frozen=True)
class Theme:
    """The colours of a page."""

    ink: str
    muted: str
    line: str
    paper: str
    shade: Callable[[Color], str]
    """Selects this page's colour of the two for a kind of content."""
    other: str
    """Colour of an arm that is not named after a kind."""
    values: tuple[str, str, str]
    """Colours of the lowest, middle and highest value of a digit, not used for arms; others are interpolated."""

    @property
    def kinds(self) -> dict[str, str]:
        """The colours of the kinds of content, by the kind's name."""
        return {name: self.shade(kind.color) for name, kind in content_kinds().items() if kind.color}


LIGHT = Theme(
    ink="#1f2328", muted="#656d76", line="#d8dde3", paper="#ffffff",
    shade=attrgetter("light"), other="#8a6d00",
    values=("#b3874a", "#e6e8eb", "#2f7d78"),
)  # fmt: skip
DARK = Theme(
    ink="#e6e9ed", muted="#9aa4af", line="#3a424c", paper="#14181d",
    shade=attrgetter("dark"), other="#e0c04a",
    values=("#c79a5b", "#39414a", "#4fa8a1"),
)  # fmt: skip

Drawing = Callable[[Axes, Theme], None]


@dataclass(frozen=True)
class Plot:
    """One figure of the report.

    Attributes:
        name: file name without suffix.
        title: a short heading, on the page and in the picture itself.
        text: alternative text for readers who cannot see it.
        draw: draws it into axes.
        height: inches.
    """

    name: str
    title: str
    text: str
    draw: Drawing
    height: float = SIZE[1]


def render(plot: Plot, theme: Theme, file_format: str) -> bytes:
    """Draw a figure as ``png`` or ``svg``; equal numbers give equal bytes.

    The SVG is transparent, without a title (the page has it), and with text as outlines, so it looks the same
    everywhere. The PNG has a background and a title.
    """
    is_svg = file_format == "svg"
    with matplotlib.rc_context(_style(theme)):
        layout = ConstrainedLayoutEngine() if is_svg else ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(SIZE[0], plot.height), layout=layout)
        axes = figure.add_subplot()
        plot.draw(axes, theme)
        if not is_svg:
            axes.set_title(plot.title, loc="left", color=theme.ink, fontsize=10.5, pad=12)
        image = io.BytesIO()
        metadata = {"Date": None} if is_svg else {}
        figure.savefig(image, format=file_format, dpi=200, transparent=is_svg, metadata=metadata)
    return image.getvalue()


def arm_colors(comparison: Comparison, theme: Theme) -> dict[str, str]:
    """Return each arm's colour: its kind's if it is named after a kind of content; others cycle through the rest."""
    turns = cycle([theme.other, *theme.kinds.values()])
    return {name: theme.kinds.get(name) or next(turns) for name in comparison.arms}


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


def percent_ticks(axis: Axis) -> None:
    """Format ticks as signed percents, at steps whose labels need no rounding."""
    axis.set_major_locator(ticker.MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda share, _: f"{100 * share:+.6g}" if abs(share) > 1e-9 else "0")


WITHHELD_NOTE = "x: withheld"
"""Note on the mark of a gain whose verdict is withheld."""


def draw_gain(
    axes: Axes, theme: Theme, color: str, gain: Gain, verdict: Verdict, place: float, *, across: bool, size: float = 8
) -> None:
    """Draw a gain's point and interval at a position on the other axis.

    The point is hollow if no difference is shown; it is a cross on a dotted interval if the verdict is withheld.

    Args:
        across: whether gains run along the x axis.
        size: of the point.
    """

    def plot(values: Sequence[float], *style: str, **given: Any) -> None:
        places = [place] * len(values)
        axes.plot(*((values, places) if across else (places, values)), *style, color=color, clip_on=False, **given)

    if verdict.is_withheld:
        plot(gain.interval, linewidth=size / 5, linestyle=":", zorder=2)
        plot([gain.gain], "x", markersize=size - 1, markeredgewidth=size / 5, zorder=3)
        return
    face = {} if verdict.is_shown else {"markerfacecolor": theme.paper}
    plot(gain.interval, linewidth=size / 3.2, zorder=2)
    plot([gain.gain], "o", markersize=size, markeredgewidth=size / 4, zorder=3, **face)


def keys(colors: Mapping[str, str]) -> list[Line2D]:
    """Return legend entries: the arms' names with a dot of their colour."""
    dot: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 5}
    return [Line2D([], [], color=color, label=name, **dot) for name, color in colors.items()]


def legend_below(axes: Axes, handles: Sequence[Line2D]) -> None:
    """Draw a legend below the axes, where it covers nothing."""
    assert isinstance(axes.figure, Figure)
    axes.figure.legend(
        handles=handles, loc="outside lower center", ncols=4, labelcolor="linecolor", borderpad=0, borderaxespad=0.3,
        frameon=False, handletextpad=0.1, columnspacing=1.2, fontsize=8.5,
    )  # fmt: skip


def note(
    axes: Axes, theme: Theme, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any
) -> None:
    """Annotate a point, on a patch of the page's colour so that lines do not cross the text."""
    axes.annotate(
        text, at, xytext=offset, textcoords="offset points", annotation_clip=False,
        **{"va": "center", "fontsize": 9, **style}, bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip
