"""The replay's two figures: served NE and drift of SIDs by policy, and the cost of a cycle as the log grows."""

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from sidestack.benchmarks.record import Row
from sidestack.benchmarks.replay.measures import ALL, CONTROL, Growth, gains, of_policy, served, sids_changed

COLORS = {"append": "#0072b2", "refresh": "#009e73", "rebuild": "#d55e00", "never": "#656d76"}
"""Okabe and Ito's colours, distinguishable with every common colour blindness; the control is grey."""
STAGE_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#e69f00", "#d55e00", "#cc79a7", "#656d76", "#1f2328")
INK, MUTED = "#1f2328", "#656d76"
SIGNAL = "text_embedding"
"""The signal whose reconstruction is drawn: new items have it from their first day on."""

_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK}

Value = Callable[[Row], float | None]


def draw_replay(rows: Sequence[Row], policies: Sequence[str], file: Path) -> None:
    """Draw served NE, gains over the control, and drift by week; a filled point is a cycle that promoted."""
    figure = Figure(figsize=(11.5, 8.6), layout="constrained")
    axes = figure.subplots(3, 2)
    trained = [policy for policy in policies if policy != CONTROL]
    for column, task in enumerate(("click", "conversion")):
        _draw_weeks(axes[0, column], rows, policies, lambda row, task=task: served(row, task))  # type: ignore[misc]
        _finish(axes[0, column], f"served {task} NE")
        _draw_gains(axes[1, column], rows, trained, task)
        _finish(axes[1, column], f"{task} NE gain over {CONTROL}, %")
    _draw_weeks(axes[2, 0], rows, trained, lambda row: _percent(sids_changed(row)))
    new = [row for row in of_policy(rows, trained[0]) if "new_item_share" in row["figures"]]
    share = [100 * row["figures"]["new_item_share"] for row in new]
    axes[2, 0].plot(_days(new), share, color=INK, linestyle=":", linewidth=1.2, label="impressions of new items")
    _finish(axes[2, 0], "SIDs changed, and impressions of new items, %")
    name = f"reconstruction_ratio.sid.{SIGNAL}"
    _draw_weeks(axes[2, 1], rows, trained, lambda row: row["figures"].get(name))
    axes[2, 1].axhline(1, color=MUTED, linewidth=0.8)
    _finish(axes[2, 1], "text reconstruction loss, new items / old items")
    lines = [*axes[0, 0].get_lines(), axes[2, 0].get_lines()[-1]]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), **_LEGEND)
    figure.savefig(file, dpi=160)


def _draw_weeks(axes: Axes, rows: Sequence[Row], policies: Sequence[str], value: Value) -> None:
    for policy in policies:
        own = [row for row in of_policy(rows, policy) if value(row) is not None]
        _draw_line(axes, policy, own, [value(row) for row in own])


def _draw_gains(axes: Axes, rows: Sequence[Row], policies: Sequence[str], task: str) -> None:
    axes.axhline(0, color=COLORS[CONTROL], linewidth=1)
    for policy in policies:
        of_day = gains(rows, policy, task)
        own = [row for row in of_policy(rows, policy) if row["newest"] in of_day]
        _draw_line(axes, policy, own, [100 * of_day[row["newest"]] for row in own])


def _draw_line(axes: Axes, policy: str, rows: Sequence[Row], values: Sequence[float | None]) -> None:
    days, color = _days(rows), COLORS[policy]
    heights = np.array(values, float)
    promoted = np.array([row["promoted"] for row in rows], bool)
    axes.plot(days, heights, color=color, linewidth=1.3, label=policy)
    if policy != CONTROL:
        for chosen, fill in ((promoted, color), (~promoted, "white")):
            axes.scatter(days[chosen], heights[chosen], s=14, color=fill, edgecolors=color, linewidths=1, zorder=3)


def draw_cost(rows: Sequence[Row], policy: str, fits: Sequence[Growth], policies: Sequence[str], file: Path) -> None:
    """Draw CPU seconds by rows of the log: of one policy by stage, with the fits, and of all policies."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    own = of_policy(rows, policy)
    log = np.array([row["rows_log"] for row in own]) / 1e3
    bottom = np.zeros(len(own))
    width = 0.7 * float(np.min(np.diff(log))) if len(log) > 1 else 1.0
    for stage, color in zip([fit.stage for fit in fits if fit.stage != ALL], STAGE_COLORS, strict=False):
        seconds = np.array([row["cpu_seconds"].get(stage, 0.0) for row in own])
        left.bar(log, seconds, width, bottom, color=color, label=stage, linewidth=0)
        bottom += seconds
    fit = next(fit for fit in fits if fit.stage == ALL)
    left.plot(log, [fit.at(row) for row in own], color=INK, linewidth=1.4, label="fit")
    _finish(left, f"CPU seconds of a cycle, {policy}, by stage", "impressions of the log, thousands")
    left.set_axisbelow(True)
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, **_LEGEND)
    for name in policies:
        of = of_policy(rows, name)
        right.plot(
            [row["rows_log"] / 1e3 for row in of], [sum(row["cpu_seconds"].values()) for row in of],
            color=COLORS[name], linewidth=1.3, marker="o", markersize=3, label=name,
        )  # fmt: skip
    right.set_ylim(0, 1.15 * right.get_ylim()[1])
    right.legend(loc="upper left", ncols=len(policies), **_LEGEND)
    _finish(right, "CPU seconds of a cycle", "impressions of the log, thousands")
    figure.savefig(file, dpi=160)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _days(rows: Sequence[Row]) -> np.ndarray:  # type: ignore[type-arg]
    return np.array([np.datetime64(date.fromisoformat(row["newest"])) for row in rows], "datetime64[D]")


def _finish(axes: Axes, title: str, below: str = "") -> None:
    if not below:
        locator = AutoDateLocator(maxticks=9)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel(below, color=MUTED, fontsize=8.5)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
