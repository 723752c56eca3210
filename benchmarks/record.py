"""Records of a benchmark's results: rows, with the command, date, machine and versions that made them."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sidestack.infra.console import wide_console

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
QUICK_RESULTS = Path("runs/benchmarks/quick")

Row = Mapping[str, Any]


def conditions(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return the conditions of a result besides the code: command, date, machine, threads, versions."""
    device = ", ".join([_cpu_name(), *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])])
    return {
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", *packages)} | {"python": platform.python_version()},
    }


def source(packages: Sequence[str] = ()) -> str:
    """Return the line of a page that describes how its results were made."""
    made = conditions(packages)
    versions = ", ".join(f"{package} {number}" for package, number in made["versions"].items())
    return f"`{made['command']}` on {made['date']}, {made['device']}, {made['cores']} cores; {versions}."


def results_folder(out: Path | None, *, quick: bool) -> Path:
    """Return the folder for results: `out` if set, else docs/results; a quick run's are not valid and go elsewhere."""
    return out or (QUICK_RESULTS if quick else RESULTS)


def write_results(name: str, rows: Sequence[Row], *, packages: Sequence[str] = (), out: Path = RESULTS) -> Path:
    """Write `<name>.json`, `{"conditions": ..., "rows": [...]}`, and return its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(
        json.dumps({"conditions": conditions(packages), "rows": list(rows)}, indent=1) + "\n", encoding="utf-8"
    )
    return path


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print rows as a table.

    Args:
        title: above the table. rows: their values by name.
        columns: name -> Python format of its values, such as ".3f"; "" prints text as it is.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name, form in columns.items():
        table.add_column(name, justify="right" if form else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name), form) for name, form in columns.items()))
    wide_console(200).print(table)


def markdown_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table; see `print_table`."""
    head = "| " + " | ".join(columns) + " |"
    rule = "|" + "|".join("---:" if form else "---" for form in columns.values()) + "|"
    lines = ["| " + " | ".join(_cell(row.get(n), form) for n, form in columns.items()) + " |" for row in rows]
    return "\n".join([head, rule, *lines]) + "\n"


def yes_or_no(is_met: bool) -> str:
    """Return the tables' word for whether a goal is met."""
    return "yes" if is_met else "no"


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in info.read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()
