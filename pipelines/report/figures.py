"""The figures of the report: gain, cost, codebook, and those of `figures_learning` and `figures_detail`."""

from collections.abc import Collection, Mapping

from matplotlib import colors as mcolors
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.transforms import offset_copy

from sidestack.pipelines.report.blocks import defined_tasks, segment_kinds
from sidestack.pipelines.report.comparison import Comparison, EncoderResult, TaskResult
from sidestack.pipelines.report.drawing import SIZE, Drawing, Plot, Theme, arm_colors, draw_gain, note, percent_ticks
from sidestack.pipelines.report.figures_detail import reliability_plot, segment_plot
from sidestack.pipelines.report.figures_learning import has_curve, learning_plot
from sidestack.pipelines.report.outputs import Curve
from sidestack.pipelines.report.units import byte_size, percent
from sidestack.ranker.metric_registry import HEADLINE


def plots(comparison: Comparison, curves: Mapping[str, Mapping[str, Curve]]) -> tuple[Plot, ...]:
    """Return all figures for which there are numbers.

    Args:
        comparison: the numbers.
        curves: of each arm, by name; may be empty.
    """
    tasks = defined_tasks(comparison)
    found = [_gain_plot(comparison, task) for task in tasks]
    found += [learning_plot(comparison, task, curves) for task in tasks if has_curve(task, curves)]
    found += [_cost_plot(comparison, task) for task in tasks]
    found += [reliability_plot(comparison, task) for task in tasks]
    found += [segment_plot(comparison, task, kind) for task in tasks for kind in segment_kinds(comparison, task)]
    if comparison.encoder.items:
        found.append(_codebook_plot(comparison.encoder))
    return tuple(found)


def _gain_plot(comparison: Comparison, task: str) -> Plot:
    title = f"{HEADLINE.title} gain, {task}"
    gains = (f"{name} {_gain_text(comparison, name, task)}" for name in comparison.arms if name != comparison.reference)
    text = f"{title} over {comparison.reference}: {', '.join(gains)}"
    names = list(comparison.arms)
    draw = _rows_of_gains(comparison, task, {name: name for name in names})
    return Plot(f"{HEADLINE.name}_gain_{task}", title, text, draw, _height(names))


def _cost_plot(comparison: Comparison, task: str) -> Plot:
    """Draw the arms' gains ordered by feature cost, one row each, as costs span orders of magnitude."""
    title = f"Gain and cost, {task}"
    gains = (
        f"{name} {_gain_text(comparison, name, task)} for {byte_size(arm.feature_bytes_per_row)} a row"
        for name, arm in comparison.arms.items()
    )
    ordered = sorted(comparison.arms.items(), key=lambda item: item[1].feature_bytes_per_row)
    labels = {
        name: f"{name}\n{byte_size(arm.feature_bytes_per_row)} a row\n{byte_size(arm.sid_table_bytes)} tables"
        for name, arm in ordered
    }
    draw = _rows_of_gains(comparison, task, labels)
    return Plot(f"cost_{task}", title, f"{title}: {', '.join(gains)}", draw, _height(labels, 0.56))


def _height(rows: Collection[str], inches: float = 0.36) -> float:
    """Return the height of a figure whose rows have a minimum height in inches."""
    return max(SIZE[1], 1.0 + inches * len(rows))


def _rows_of_gains(comparison: Comparison, task: str, labels: Mapping[str, str]) -> Drawing:
    """Return the function that draws each arm's gain in its own row, from the top in the order of the labels."""

    def draw(axes: Axes, theme: Theme) -> None:
        colors = arm_colors(comparison, theme)
        axes.axvline(0.0, color=theme.muted, linewidth=1, zorder=1)
        for position, name in enumerate(labels):
            _gain_row(axes, theme, colors[name], position, comparison.arms[name].tasks[task], comparison.reference)
        axes.set_yticks(range(len(labels)), labels.values())
        for tick, name in zip(axes.get_yticklabels(), labels, strict=True):
            tick.set_color(colors[name])
            tick.set_fontweight("bold")
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        percent_ticks(axes.xaxis)
        axes.set_xlabel(f"{HEADLINE.title} gain over {comparison.reference}, %")

    return draw


def _gain_text(comparison: Comparison, name: str, task: str) -> str:
    """Return an arm's gain as text, if its verdict allows; the reference's is 0."""
    result = comparison.arms[name].tasks[task]
    if result.verdict is not None and not result.verdict.is_shown:
        return result.verdict.words
    gain = result.gain(HEADLINE.name, comparison.reference)
    return percent(gain.gain if gain else 0.0)


def _gain_row(axes: Axes, theme: Theme, color: str, position: int, result: TaskResult, reference: str) -> None:
    """Draw one arm: gain, interval, and a tick per training below; without a gain it is the reference."""
    gain, verdict = result.gain(HEADLINE.name, reference), result.verdict
    if gain is None or verdict is None:
        axes.plot(0.0, position, "o", color=color, markersize=8, zorder=3)
        note(axes, theme, "reference", (0.0, position), (11, 0), color=theme.muted)
        return
    draw_gain(axes, theme, color, gain, verdict, position, across=True)
    trainings = gain.replicates if len(gain.replicates) > 1 else ()
    below = offset_copy(axes.transData, axes.get_figure(root=True), y=-9, units="points")
    axes.plot(trainings, [position] * len(trainings), "|", color=color, markersize=5, zorder=3, transform=below)
    axes.update_datalim([(training, position) for training in trainings])  # offset points extend no limits
    text = verdict.kind if verdict.is_withheld else percent(gain.gain)
    right = max(gain.interval[1], gain.gain)
    note(axes, theme, text, (right, position), (9, 0), color=theme.ink if verdict.is_shown else theme.muted)


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
