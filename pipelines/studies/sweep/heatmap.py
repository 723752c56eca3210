"""The heat map of a sweep: for each number of levels, loss over depth and groups."""

import math
from pathlib import Path

import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sidestack.pipelines.report.drawing import LIGHT
from sidestack.pipelines.studies.sweep.result import SettingResult, SweepResult

_COLUMNS = 3
_CELL_INCHES = 0.34
_LEAST_SIDE = 1.7
_WORST_SHARE = 0.9
"""Losses above this quantile share one colour; otherwise one bad setting would make the good ones look alike."""


def draw(sweep: SweepResult, file: Path) -> None:
    """Write the heat map as PNG: darker is better, the chosen setting is framed."""
    levels = sorted({result.setting.levels for result in sweep.results})
    columns = min(len(levels), _COLUMNS)
    rows = math.ceil(len(levels) / columns)
    most = max(len(_axis(sweep, number, "depth")) for number in levels)
    side = max(_CELL_INCHES * most, _LEAST_SIDE)
    figure = Figure(figsize=(columns * (side + 0.6) + 0.9, rows * (side + 0.65) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    shades = _shades(sweep)
    facets = figure.subplots(rows, columns, squeeze=False).flat
    for axes, number in zip(facets, levels, strict=False):
        _facet(axes, sweep, number, shades)
    for axes in list(figure.axes)[len(levels) :]:
        axes.set_axis_off()
    bar = figure.colorbar(shades, ax=figure.axes, shrink=0.7, aspect=30, extend="max")
    bar.set_label("weighted held-out loss", color=LIGHT.muted, fontsize=8.5)
    bar.ax.tick_params(labelsize=8, labelcolor=LIGHT.muted, length=0)
    bar.outline.set_visible(False)
    best = sweep.chosen.setting
    title = f"Chosen: {best.levels} levels, depth {best.depth} x groups {best.groups}: {sweep.chosen.loss:.4f}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=10.5, color=LIGHT.ink)
    figure.savefig(file, dpi=160, facecolor=LIGHT.paper)


def _shades(sweep: SweepResult) -> ScalarMappable:
    losses = sorted(result.loss for result in sweep.results)
    worst = losses[min(int(_WORST_SHARE * len(losses)), len(losses) - 1)]
    blend = colors.LinearSegmentedColormap.from_list("loss", ("#0b5c57", "#6fb3a8", "#e6e8eb", "#d9a15c"))
    return ScalarMappable(colors.Normalize(losses[0], max(worst, losses[0] + 1e-9)), blend)


def _axis(sweep: SweepResult, levels: int, knob: str) -> list[int]:
    return sorted({getattr(result.setting, knob) for result in sweep.results if result.setting.levels == levels})


def _facet(axes: Axes, sweep: SweepResult, levels: int, shades: ScalarMappable) -> None:
    """Draw the panel of one number of levels; only settings of the budget have a cell."""
    depths, groups = _axis(sweep, levels, "depth"), _axis(sweep, levels, "groups")
    shown = [result for result in sweep.results if result.setting.levels == levels]
    for result in shown:
        at = (groups.index(result.setting.groups), depths.index(result.setting.depth))
        _cell(axes, sweep, result, at, shades)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(len(groups)), [str(number) for number in groups])
    axes.set_yticks(range(len(depths)), [str(number) for number in depths])
    axes.set_xlabel("groups", fontsize=8.5, color=LIGHT.muted)
    axes.set_ylabel("depth", fontsize=8.5, color=LIGHT.muted)
    first = shown[0]
    title = f"{levels} levels, {first.setting.digits} digits, {first.bits:.1f} bits"
    axes.set_title(title, loc="left", fontsize=9, color=LIGHT.ink)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=LIGHT.muted)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell(axes: Axes, sweep: SweepResult, result: SettingResult, at: tuple[int, int], shades: ScalarMappable) -> None:
    color = shades.to_rgba(np.asarray(result.loss))
    x, y = at
    is_chosen, is_own = result is sweep.chosen, result.setting == sweep.own
    axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=color, edgecolor="none"))
    if is_chosen or is_own:
        style = "-" if is_chosen else ":"
        frame = Rectangle(
            (x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor=LIGHT.ink, linewidth=2, linestyle=style
        )
        axes.add_patch(frame)
    red, green, blue, _ = color
    ink = LIGHT.ink if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else LIGHT.paper
    axes.text(x, y, f"{result.loss:.3f}".removeprefix("0"), ha="center", va="center", fontsize=7, color=ink)
