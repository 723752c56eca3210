"""What a speed benchmark leaves: measured rows, goals held against them, as a table, JSON and Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Row, markdown_table, print_table, source, write_results
from benchmarks.timing import Spread

GOAL_COLUMNS = {"goal": "", "threads": "d", "ratio": ".2f", "low": ".2f", "high": ".2f", "at_least": ".2f", "met": ""}


def goal(what: str, ratio: Spread, at_least: float, threads: int | None = None) -> dict[str, Any]:
    """Give a goal's row: the ratio with its quartiles, the least it should be, and whether the median is that."""
    met = "yes" if ratio.median >= at_least else "no"
    return {
        "goal": what,
        "threads": threads,
        **ratio._asdict(),
        "ratio": ratio.median,
        "at_least": at_least,
        "met": met,
    }


def publish(
    name: str,
    title: str,
    words: str,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    *,
    packages: Sequence[str] = (),
    out: Path,
) -> None:
    """Print measured rows and goals (the rows that have "goal"), and write `<name>.json` and `<name>.md`.

    Args:
        name: the benchmark's. title: the page's heading. words: what was measured, in Markdown.
        rows: measured rows and goals' rows. columns: the measured rows' columns, name -> format.
        packages: whose versions matter, beside torch's. out: where the files go.
    """
    measured = [row for row in rows if "goal" not in row]
    goals = [row for row in rows if "goal" in row]
    print_table(title, measured, columns)
    print_table("goals", goals, GOAL_COLUMNS)
    write_results(name, rows, packages=packages, out=out)
    (out / f"{name}.md").write_text(_page(title, words, measured, columns, goals, source(packages)))


def _page(
    title: str, words: str, measured: list[Row], columns: Mapping[str, str], goals: list[Row], made_by: str
) -> str:
    reading = (
        "A ratio is the median over rounds in which all contestants took turns, with its quartiles, or a single run's."
    )
    tables = [markdown_table(measured, columns), "## Goals", reading, markdown_table(goals, GOAL_COLUMNS)]
    return "\n\n".join([f"# {title}", words.strip(), made_by, *tables])
