"""Results of a speed benchmark: measured rows and their goals, as a table, JSON and Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sidestack.benchmarks.record import Row, markdown_table, print_table, source, write_results, yes_or_no
from sidestack.benchmarks.timing import Spread

GOAL_COLUMNS = {"goal": "", "threads": "d", "ratio": ".2f", "low": ".2f", "high": ".2f", "at_least": ".2f", "met": ""}


def goal(what: str, ratio: Spread, at_least: float, threads: int | None = None) -> dict[str, Any]:
    """Return a goal's row: the ratio with its quartiles, its required minimum, and whether the median reaches it."""
    return {
        "goal": what,
        "threads": threads,
        **ratio._asdict(),
        "ratio": ratio.median,
        "at_least": at_least,
        "met": yes_or_no(ratio.median >= at_least),
    }


class PageTable(NamedTuple):
    """One table of a page: its heading and text, its rows, and their columns (name -> format)."""

    heading: str
    words: str
    rows: Sequence[Row]
    columns: Mapping[str, str]


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
        packages: packages whose versions matter, besides torch. out: the folder of the files.
    """
    measured = [row for row in rows if "goal" not in row]
    goals = [row for row in rows if "goal" in row]
    print_table(title, measured, columns)
    print_table("goals", goals, GOAL_COLUMNS)
    write_results(name, rows, packages=packages, out=out)
    page = [f"# {title}", words.strip(), source(packages), markdown_table(measured, columns), *_goals_part(goals)]
    (out / f"{name}.md").write_text("\n\n".join(page), encoding="utf-8")


def publish_tables(
    name: str,
    title: str,
    words: str,
    tables: Sequence[PageTable],
    goals: Sequence[Row],
    *,
    packages: Sequence[str] = (),
    out: Path,
) -> None:
    """Do the same as `publish` for several tables; in the JSON, "table" is the heading of a row's table."""
    for table in tables:
        print_table(table.heading, table.rows, table.columns)
    print_table("goals", goals, GOAL_COLUMNS)
    rows = [{"table": table.heading, **row} for table in tables for row in table.rows]
    write_results(name, [*rows, *goals], packages=packages, out=out)
    page = [f"# {title}", words.strip(), source(packages)]
    for table in tables:
        page += [f"## {table.heading}", table.words.strip(), markdown_table(table.rows, table.columns)]
    (out / f"{name}.md").write_text("\n\n".join([*page, *_goals_part(goals)]), encoding="utf-8")


def _goals_part(goals: Sequence[Row]) -> list[str]:
    reading = (
        "A ratio is the median over rounds in which all contestants took turns, with its quartiles, or a single run's."
    )
    return ["## Goals", reading, markdown_table(goals, GOAL_COLUMNS)]
