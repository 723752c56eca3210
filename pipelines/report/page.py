"""The HTML page: one self-contained file, for light and dark mode and any width."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from sidestack.pipelines.report.blocks import (
    between_block,
    defined_tasks,
    gains_block,
    return_block,
    segment_blocks,
    tables_block,
    trainings_block,
    withheld_block,
)
from sidestack.pipelines.report.blocks_trained import settings_notes
from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.report.drawing import DARK, LIGHT, Plot, Theme, arm_colors, render
from sidestack.pipelines.report.lead import lead
from sidestack.pipelines.report.table import blocks, footnotes, learning_blocks, mark_note, trained_blocks


@dataclass(frozen=True)
class RunFile:
    """The run file that reproduces the comparison.

    Attributes:
        text: YAML for `--config`; empty if there is none.
        why_not: the reason if there is none.
    """

    text: str
    why_not: str = ""


def render_page(comparison: Comparison, figures: Sequence[Plot], configs: Mapping[str, str], run_file: RunFile) -> str:
    """Return the page's HTML.

    Args:
        comparison: the numbers.
        figures: figures to draw; each is embedded twice, for light and dark pages.
        configs: the resolved configuration of each input, as YAML, collapsed at the end of the page.
        run_file: the same as one run file.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("page.html.jinja"))
    defined = defined_tasks(comparison)
    return template.render(
        comparison=comparison,
        style=_asset("page.css"),
        colors=_color_rules(comparison),
        lead=lead(comparison),
        trained=trained_blocks(comparison),
        settings_notes=settings_notes(comparison),
        learning=learning_blocks(comparison),
        withheld=withheld_block(comparison),
        blocks=blocks(comparison),
        returns=return_block(comparison),
        tables=tables_block(comparison),
        between=between_block(comparison),
        further=[gains_block(comparison, task) for task in defined],
        trainings=[trainings_block(comparison, task) for task in defined] if comparison.replicates > 1 else [],
        segments=segment_blocks(comparison),
        mark_note=mark_note(comparison),
        footnotes=footnotes(comparison),
        figures=[_embedded(figure) for figure in figures],
        configs={name: text for name, text in configs.items() if text},
        run_file=run_file,
    )


def _color_rules(comparison: Comparison) -> str:
    """Return the arms' colours as CSS variables, for light and dark pages."""

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
    return resources.files("sidestack.pipelines.report").joinpath(name).read_text(encoding="utf-8")
