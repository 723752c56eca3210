"""The figures of the report: gain, learning curves, cost, codebook, and those of `figures_detail`."""

from collections.abc import Iterator, Mapping

from matplotlib import colors as mcolors
from matplotlib import ticker
from matplotlib.axes import Axes

from pipelines.report.blocks import defined_tasks, segment_kinds
from pipelines.report.comparison import Comparison, EncoderResult, Gain
from pipelines.report.drawing import Plot, Theme, arm_colors, mark, note, percent_ticks
from pipelines.report.figures_detail import reliability_plot, segment_plot
from pipelines.report.outputs import Curve
from pipelines.report.units import byte_size, percent
from ranker.metric_registry import HEADLINE


def plots(comparison: Comparison, curves: Mapping[str, Mapping[str, Curve]]) -> tuple[Plot, ...]:
    """Return every figure that the numbers allow.

    Args:
        comparison: the numbers.
        curves: for each task and arm the learning curve, possibly empty.
    """
    tasks = defined_tasks(comparison)
    found = [_gain_plot(comparison, task) for task in tasks]
    found += [_curve_plot(comparison, task, curves[task]) for task in tasks if any(curves[task].values())]
    found += [_cost_plot(comparison, task) for task in tasks]
    found += [reliability_plot(comparison, task) for task in tasks]
    found += [segment_plot(comparison, task, kind) for task in tasks for kind in segment_kinds(comparison, task)]
    if comparison.encoder.items:
        found.append(_codebook_plot(comparison.encoder))
    return tuple(found)


def _gain_plot(comparison: Comparison, task: str) -> Plot:
    names = list(comparison.arms)

    def draw(axes: Axes, theme: Theme) -> None:
        colors = arm_colors(comparison, theme)
        axes.axvline(0.0, color=theme.muted, linewidth=1, zorder=1)
        for position, name in enumerate(names):
            gain = comparison.arms[name].tasks[task].gain(HEADLINE.name, comparison.reference)
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
        percent_ticks(axes.xaxis)
        axes.set_xlabel(f"{HEADLINE.title} gain over {comparison.reference}, %")

    title = f"{HEADLINE.title} gain, {task}"
    told = (f"{name} {_gain_text(comparison, name, task)}" for name in comparison.arms if name != comparison.reference)
    return Plot(f"{HEADLINE.name}_gain_{task}", title, f"{title} over {comparison.reference}: {', '.join(told)}", draw)


def _gain_text(comparison: Comparison, name: str, task: str) -> str:
    """Tell an arm's gain, that of the reference being 0."""
    gain = comparison.arms[name].tasks[task].gain(HEADLINE.name, comparison.reference)
    return percent(gain.gain if gain else 0.0)


def _gain_row(axes: Axes, theme: Theme, color: str, position: int, gain: Gain | None) -> None:
    """Draw one arm: gain, interval (hollow when it holds 0), a tick a training; without a gain it is the reference."""
    if gain is None:
        axes.plot(0.0, position, "o", color=color, markersize=8, zorder=3)
        note(axes, theme, "reference", (0.0, position), (11, 0), color=theme.muted)
        return
    axes.plot(gain.interval, [position] * 2, color=color, linewidth=2.5, zorder=2)
    trainings = gain.replicates if len(gain.replicates) > 1 else ()
    axes.plot(trainings, [position + 0.2] * len(trainings), "|", color=color, markersize=6, zorder=3)
    axes.plot(gain.gain, position, "o", color=color, zorder=3, **mark(theme, gain))
    ink = theme.muted if gain.holds_zero else theme.ink
    note(axes, theme, percent(gain.gain), (gain.gain, position), (0, 14), color=ink, ha="center")


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
            note(axes, theme, name, (right, height), (6, 0), color=colors[name], fontweight="bold")
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
            x, gain = arm.feature_bytes_per_row, arm.tasks[task].gain(HEADLINE.name, comparison.reference)
            if gain is None:
                axes.plot(x, 0.0, "o", color=colors[name], markersize=8, zorder=3)
                note(axes, theme, name, (x, 0.0), (0, 14), color=colors[name], fontweight="bold", ha="center")
                continue
            axes.plot([x, x], gain.interval, color=colors[name], linewidth=2.5)
            axes.plot(x, gain.gain, "o", color=colors[name], zorder=3, **mark(theme, gain))
            note(axes, theme, name, (x, gain.gain), (10, 6), color=colors[name], fontweight="bold")
            tables = f"{byte_size(arm.sid_table_bytes)} of SID tables"
            note(axes, theme, tables, (x, gain.gain), (10, -6), color=colors[name], fontsize=8.5)
        widest = max(arm.feature_bytes_per_row for arm in comparison.arms.values())
        axes.set_xlim(-0.07 * (widest or 1), 1.5 * (widest or 1))
        axes.margins(y=0.15)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        percent_ticks(axes.yaxis)
        axes.set_ylabel(f"{HEADLINE.title} gain over {comparison.reference}, %")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("bytes of content feature a row")

    title = f"Gain and cost, {task}"
    told = (
        f"{name} {_gain_text(comparison, name, task)} for {byte_size(arm.feature_bytes_per_row)} a row"
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
