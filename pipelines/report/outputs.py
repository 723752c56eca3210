"""What the comparison reads of the other stages' outputs: their summaries, curves and resolved configuration."""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, ValidationError

from sidestack.infra.config import Config
from sidestack.infra.errors import DataError
from sidestack.infra.record import CONFIG_FILE, HISTORY_FILE, SUMMARY_FILE
from sidestack.infra.tables import read_json
from sidestack.pipelines.report.comparison import IdTable

Curve = list[tuple[float, float]]


class Windows(Config):
    """First and last date, inclusive, of what an arm was trained on and of what it was measured on."""

    train: tuple[date, date]
    held_out: tuple[date, date]


class RankerSummary(Config):
    """The closing numbers of one arm's training that the comparison needs; further ones are ignored.

    So are its metrics: the comparison measures them anew, from the predictions it pairs.
    """

    model_config = ConfigDict(extra="ignore")

    arm: str
    dates: Windows
    held_out_rows: int | None = None
    """Rows of the held-out dates that were read; null from a ranker that did not count them."""
    sid_table_bytes: int
    table_bytes: int
    tables: tuple[IdTable, ...] = ()
    feature_bytes_per_row: float
    samples_per_second: float
    peak_memory_bytes: int
    flops_per_sample: float | None = None
    train_seconds: float | None = None
    parameters: int | None = None
    world_size: int | None = None
    steps: int | None = None
    budget: dict[str, Any] = {}
    """What rules decided of the training's settings, and which of them; empty from a ranker without rules."""


def read_ranker_summary(path: Path) -> RankerSummary:
    """Read the `summary.json` of a ranker's output.

    Raises:
        DataError: it is missing, or lacks a number the comparison needs.
    """
    file = Path(path) / SUMMARY_FILE
    try:
        return RankerSummary.model_validate(read_json(file))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise DataError(f"{file}: not a ranker's summary: {'; '.join(faults)}") from error


def read_curves(path: Path) -> dict[str, Curve]:
    """Read `history.jsonl` as a curve of (step, value) for each name; a null or absent value leaves a gap.

    An output without history has no curves.

    Raises:
        DataError: a line is not a JSON object with a step.
    """
    file = Path(path) / HISTORY_FILE
    curves: dict[str, Curve] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else (), start=1):
        try:
            values = json.loads(line)
            step = float(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}, line {number}: must be a JSON object with a step") from error
        for name, value in values.items():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def learning_curve(curves: Mapping[str, Curve], task: str) -> Curve:
    """Return the curve of a task's normalized entropy while training; empty without one."""
    return curves.get(f"train_{task}_ne", [])


def validation_curve(curves: Mapping[str, Curve], task: str) -> Curve:
    """Return the curve of a task's normalized entropy on the window that a search left out; empty without one."""
    return curves.get(f"search_validation_{task}_ne", [])


def read_config_text(path: Path) -> str:
    """Read the resolved configuration a stage was run with; empty when the output has none."""
    file = Path(path) / CONFIG_FILE
    return file.read_text(encoding="utf-8") if file.exists() else ""


def read_sections(path: Path) -> dict[str, Any]:
    """Read the resolved sections that a stage was run with, by name; empty when the output does not say.

    Raises:
        DataError: the file is not valid YAML.
    """
    try:
        values = yaml.safe_load(read_config_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{Path(path) / CONFIG_FILE}: not valid YAML: {error}") from error
    return values if isinstance(values, dict) else {}


def read_section(path: Path, section: str) -> dict[str, Any]:
    """Read one of these sections; empty when the output does not have it."""
    found = read_sections(path).get(section)
    return found if isinstance(found, dict) else {}
