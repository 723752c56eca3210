"""The HTML page: one file that needs nothing beside itself, light or dark, wide or narrow."""

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipelines.report.blocks import (
    between_block,
    defined_tasks,
    gains_block,
    return_block,
    segment_blocks,
    tables_block,
    trainings_block,
    undefined_reason,
)
from pipelines.report.comparison import Comparison, Gain
from pipelines.report.drawing import DARK, LIGHT, Plot, Theme, arm_colors, render
from pipelines.report.table import blocks, footnotes
from pipelines.report.units import byte_size, percent, percent_interval, unbroken
from ranker.metric_registry import HEADLINE


def render_page(comparison: Comparison, figures: Sequence[Plot], configs: Mapping[str, str]) -> str:
    """Return the page's HTML.

    Args:
        comparison: the numbers.
        figures: what to draw; each is embedded twice, for light and dark pages.
        configs: the resolved configuration of each input, as YAML, to be folded away at the end.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("page.html.jinja"))
    defined = defined_tasks(comparison)
    return template.render(
        comparison=comparison,
        style=_asset("page.css"),
        colors=_color_rules(comparison),
        lead=lead(comparison),
        blocks=blocks(comparison),
        returns=return_block(comparison),
        tables=tables_block(comparison),
        between=between_block(comparison),
        further=[gains_block(comparison, task) for task in defined],
        trainings=[trainings_block(comparison, task) for task in defined] if comparison.replicates > 1 else [],
        segments=segment_blocks(comparison),
        footnotes=footnotes(comparison),
        figures=[_embedded(figure) for figure in figures],
        configs={name: text for name, text in configs.items() if text},
    )


def lead(comparison: Comparison) -> list[str]:
    """Say in a sentence for each arm what came out, without a word more than the intervals allow."""
    return [f"{name}: {_told(comparison, name)}." for name in comparison.arms if name != comparison.reference]


def _told(comparison: Comparison, name: str) -> str:
    arm = comparison.arms[name]
    parts = []
    for task in comparison.tasks:
        result = arm.tasks[task]
        why = undefined_reason(result)
        gain = result.gain(HEADLINE.name, comparison.reference)
        parts.append(f"{task} {_gain_words(gain) if gain else f'undefined ({why})'}")
    costs = f"{unbroken(byte_size(arm.sid_table_bytes))} of SID tables"
    return f"{'; '.join(parts)}; {costs}"


def _gain_words(gain: Gain) -> str:
    bounds = unbroken(percent_interval(gain.interval))
    if gain.holds_zero:
        return f"no difference shown ({bounds})"
    return f"{HEADLINE.title} gain {unbroken(percent(gain.gain))} ({bounds})"


def _color_rules(comparison: Comparison) -> str:
    """Return the arms' colours as CSS variables, for the light page and the dark."""

    def rules(theme: Theme) -> str:
        colors = arm_colors(comparison, theme).values()
        return "".join(f"--arm-{number}:{color};" for number, color in enumerate(colors))

    return f":root{{{rules(LIGHT)}}}@media (prefers-color-scheme:dark){{:root{{{rules(DARK)}}}}}"


def _embedded(figure: Plot) -> dict[str, Any]:
    return {
        "title": figure.title,
        "text": figure.text,
        "light": _data_uri(render(figure, LIGHT, "svg")),
        "dark": _data_uri(render(figure, DARK, "svg")),
    }


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _asset(name: str) -> str:
    return resources.files("pipelines.report").joinpath(name).read_text(encoding="utf-8")
