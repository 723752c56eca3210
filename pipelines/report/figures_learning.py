"""The learning curves: training NE, and validation NE if the training measured it."""

from collections.abc import Iterator, Mapping

from matplotlib.axes import Axes

from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.report.drawing import Plot, Theme, arm_colors, note
from sidestack.pipelines.report.outputs import Curve, learning_curve, validation_curve
from sidestack.ranker.metric_registry import HEADLINE

Curves = Mapping[str, Mapping[str, Curve]]
"""Arm -> its curves by name."""


def has_curve(task: str, curves: Curves) -> bool:
    """Return whether any arm has a curve of a task."""
    return any(learning_curve(of_arm, task) for of_arm in curves.values())


def learning_plot(comparison: Comparison, task: str, curves: Curves) -> Plot:
    """Draw all arms' full curves of a task: training curves as lines, validation curves dashed."""
    trained = {name: curve for name, of_arm in curves.items() if (curve := learning_curve(of_arm, task))}
    validated = {name: curve for name, of_arm in curves.items() if (curve := validation_curve(of_arm, task))}
    drawn = [*trained.values(), *validated.values()]

    def draw(axes: Axes, theme: Theme) -> None:
        colors = arm_colors(comparison, theme)
        for name, curve in trained.items():
            _line(axes, curve, colors[name], "-")
        for name, curve in validated.items():
            _line(axes, curve, colors[name], "--")
        right = max(curve[-1][0] for curve in drawn)
        axes.set(xlim=(0, right), ylim=_limits([value for curve in drawn for _, value in curve]))
        if axes.get_ylim()[1] > 1.0:
            axes.axhline(1.0, color=theme.muted, linewidth=1, zorder=1)
        ends = {name: curve[-1][1] for name, curve in trained.items()}
        for name, height in _spread(ends, axes.get_ylim()):
            note(axes, theme, name, (right, height), (6, 0), color=colors[name], fontweight="bold")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.set_xlabel("training step" + ("; dashed: validation" if validated else ""))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylabel(f"{HEADLINE.title}; 1: base rate alone")

    title = f"Learning curves, {task}"
    ends = [f"{name} ends at {curve[-1][1]:.4f}" for name, curve in trained.items()]
    ends += [f"{name} at {curve[-1][1]:.4f} in validation" for name, curve in validated.items()]
    return Plot(f"learning_{task}", title, f"{title}: {', '.join(ends)}", draw)


def _line(axes: Axes, curve: Curve, color: str, style: str) -> None:
    """Draw a curve; a single point is drawn as a dot."""
    steps, values = zip(*curve, strict=True)
    marker = "o" if len(curve) == 1 else ""
    axes.plot(steps, values, color=color, linewidth=1.6, linestyle=style, marker=marker, clip_on=False, zorder=3)


def _limits(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def _spread(ends: Mapping[str, float], limits: tuple[float, float]) -> Iterator[tuple[str, float]]:
    """Move overlapping labels apart, keeping their order, and within the axes if they fit."""
    low, high = limits
    apart = 0.085 * (high - low)
    order = sorted(ends, key=lambda name: ends[name])
    heights = [ends[name] for name in order]
    for _ in range(50):
        for lower in range(len(heights) - 1):
            overlap = apart - (heights[lower + 1] - heights[lower])
            if overlap > 0:
                heights[lower] -= overlap / 2
                heights[lower + 1] += overlap / 2
    lift = max(0.0, low + apart / 2 - heights[0]) if heights else 0.0
    yield from ((name, height + lift) for name, height in zip(order, heights, strict=True))
