"""Figures of details: calibration by decile, and gains by segment."""

import math
from collections.abc import Sequence

from matplotlib import ticker
from matplotlib.axes import Axes

from sidestack.pipelines.report.comparison import Comparison, DecileResult, Segment, Verdict
from sidestack.pipelines.report.drawing import (
    WITHHELD_NOTE,
    Plot,
    Theme,
    arm_colors,
    draw_gain,
    keys,
    legend_below,
    percent_ticks,
)
from sidestack.pipelines.report.units import percent
from sidestack.pipelines.report.verdict import segment_verdict
from sidestack.ranker.metric_registry import HEADLINE


def reliability_plot(comparison: Comparison, task: str) -> Plot:
    """Draw observed rate against predicted probability by decile; on the diagonal, predictions are calibrated.

    Both axes are logarithmic, as rates span orders of magnitude; deciles without positives cannot be drawn.
    """
    deciles = {name: arm.tasks[task].deciles for name, arm in comparison.arms.items()}
    shown = {name: [one for one in found if min(one.predicted, one.observed) > 0] for name, found in deciles.items()}

    def draw(axes: Axes, theme: Theme) -> None:
        colors = arm_colors(comparison, theme)
        low, high = _limits([one for found in shown.values() for one in found])
        axes.plot([low, high], [low, high], color=theme.muted, linewidth=1, zorder=1)
        for name, found in shown.items():
            points = [one.predicted for one in found], [one.observed for one in found]
            axes.plot(*points, "o-", color=colors[name], markersize=4, linewidth=1.2, alpha=0.85)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        decades = math.log10(high / low)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
            axis.set_major_formatter(lambda share, _: f"{100 * share:g}")
            axis.set_minor_locator(ticker.NullLocator())
        axes.grid()
        axes.tick_params(length=0)
        axes.set_xlabel("predicted, %")
        axes.set_ylabel("observed, %")
        legend_below(axes, keys(colors))

    title = f"Reliability, {task}"
    ranges = (f"{name} from {_ratio(found[0])} to {_ratio(found[-1])}" for name, found in shown.items() if found)
    text = f"{title}: observed over predicted, lowest to highest decile: {', '.join(ranges)}"
    return Plot(f"reliability_{task}", title, text, draw)


def _limits(shown: Sequence[DecileResult]) -> tuple[float, float]:
    values = [value for one in shown for value in (one.predicted, one.observed)]
    return min(values, default=0.1) / 1.5, min(1.0, max(values, default=0.5) * 1.5)


def _ratio(one: DecileResult) -> str:
    return f"{one.observed / one.predicted:.2f}"


def segment_plot(comparison: Comparison, task: str, kind: str) -> Plot:
    """Draw each arm's gain by the number of earlier positives of the rows' user, or item."""
    found = {name: arm.tasks[task].segments[kind] for name, arm in comparison.arms.items()}
    arms = [name for name in found if name != comparison.reference]
    segments = found[comparison.reference]
    verdicts = {name: [segment_verdict(comparison, task, name, one) for one in found[name]] for name in arms}
    has_withheld = any(one is not None and one.is_withheld for of_arm in verdicts.values() for one in of_arm)

    def draw(axes: Axes, theme: Theme) -> None:
        colors = {name: color for name, color in arm_colors(comparison, theme).items() if name in arms}
        axes.axhline(0.0, color=theme.muted, linewidth=1, zorder=1)
        step = min(0.2, 0.8 / max(len(arms), 1))
        for place, name in enumerate(arms):
            offset = (place - (len(arms) - 1) / 2) * step
            for at, (one, verdict) in enumerate(zip(found[name], verdicts[name], strict=True)):
                if one.gain is not None and verdict is not None:
                    draw_gain(axes, theme, colors[name], one.gain, verdict, at + offset, across=False, size=6)
        axes.set_xlim(-0.5, len(segments) - 0.5)
        axes.set_xticks(range(len(segments)), [f"{one.name}\n{one.rows:,} rows" for one in segments])
        axes.grid(axis="y")
        axes.tick_params(length=0)
        percent_ticks(axes.yaxis)
        axes.set_ylabel(f"{HEADLINE.title} gain over {comparison.reference}, %")
        suffix = f"; {WITHHELD_NOTE}" if has_withheld else ""
        axes.set_xlabel(f"earlier positives of {comparison.earlier_task}, of the {kind}{suffix}")
        legend_below(axes, keys(colors))

    title = f"Gain by the {kind}'s earlier positives of {comparison.earlier_task}, {task}"
    gains = (f"{name} {_words(found[name], verdicts[name])}" for name in arms)
    return Plot(f"segments_{task}_{kind}", title, f"{title}, over {comparison.reference}: {'; '.join(gains)}", draw)


def _words(segments: Sequence[Segment], verdicts: Sequence[Verdict | None]) -> str:
    return ", ".join(
        f"{one.name} {_gain_words(one, verdict)} ({one.rows:,} rows)"
        for one, verdict in zip(segments, verdicts, strict=True)
    )


def _gain_words(segment: Segment, verdict: Verdict | None) -> str:
    if segment.gain is None or verdict is None:
        return "not defined"
    return verdict.kind if verdict.is_withheld else percent(segment.gain.gain)
