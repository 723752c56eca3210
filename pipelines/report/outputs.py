"""Readers of the other stages' outputs: summaries, curves and resolved configuration."""

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
    """First and last date, inclusive, of an arm's training and held-out dates."""

    train: tuple[date, date]
    held_out: tuple[date, date]


class RankerSummary(Config):
    """The numbers of one arm's training summary that the comparison needs; others are ignored.

    Its metrics are ignored too: the comparison computes them from the paired predictions.
    """

    model_config = ConfigDict(extra="ignore")

    arm: str
    dates: Windows
    held_out_rows: int | None = None
    """Held-out rows that were read; null from a ranker that did not count them."""
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
    """Training settings that rules decided, with their values; empty from a ranker without rules."""


def read_ranker_summary(path: Path) -> RankerSummary:
    """Read the `summary.json` of a ranker's output.

    Raises:
        DataError: it is missing, or lacks a number that the comparison needs.
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
    """Return the curve of a task's training NE; empty without one."""
    return curves.get(f"train_{task}_ne", [])


def validation_curve(curves: Mapping[str, Curve], task: str) -> Curve:
    """Return the curve of a task's NE on the validation window of a search; empty without one."""
    return curves.get(f"search_validation_{task}_ne", [])


def read_config_text(path: Path) -> str:
    """Read the resolved configuration of a stage's run; empty if the output has none."""
    file = Path(path) / CONFIG_FILE
    return file.read_text(encoding="utf-8") if file.exists() else ""


def read_sections(path: Path) -> dict[str, Any]:
    """Read the resolved sections of a stage's run, by name; empty if the output has none.

    Raises:
        DataError: the file is not valid YAML.
    """
    try:
        values = yaml.safe_load(read_config_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{Path(path) / CONFIG_FILE}: not valid YAML: {error}") from error
    return values if isinstance(values, dict) else {}


def read_section(path: Path, section: str) -> dict[str, Any]:
    """Read one of these sections; empty if the output does not have it."""
    found = read_sections(path).get(section)
    return found if isinstance(found, dict) else {}
