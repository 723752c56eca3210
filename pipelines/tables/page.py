"""The papers' tables as a page of Markdown and as text for a terminal."""

from collections.abc import Mapping, Sequence

from infra.tables import TASKS
from pipelines.report.blocks import NO_DIFFERENCE
from pipelines.report.comparison import ArmResult, Comparison, holds_zero
from pipelines.report.table import line
from pipelines.report.units import byte_size, percent, percent_interval
from pipelines.tables.config import TableConfig

TITLES = ("arm", "bytes a row", "cost", *(f"{task} {what}" for task in TASKS for what in ("NE gain", "95 %")), "RoI")
PAPER_TITLES = ("cost", *(f"{task} NE gain" for task in TASKS), "RoI")
UNKNOWN = ""

Tables = Mapping[str, TableConfig]
Found = Mapping[str, Comparison]


def as_page(tables: Tables, found: Found, places: Mapping[str, str]) -> str:
    """Give the page.

    Args:
        tables: what each table is about. found: the comparison of each. places: its directory's name (the key).
    """
    lines = ["# The papers' tables, on public data", "", *_how(found), ""]
    for name, comparison in found.items():
        table = tables[name]
        lines += [f"## {table.title}", "", table.differs, "", *_markdown(table, comparison), ""]
        lines += [f"Compared in `compare/{places[name]}`; {_rows_of(comparison)}.", ""]
    return "\n".join(lines)


def _how(found: Found) -> list[str]:
    replicates = sorted({comparison.replicates for comparison in found.values()})
    trainings = " or ".join(str(number) for number in replicates)
    return [
        f"NE gain is 1 - NE / NE(reference) on held-out dates; each arm is trained {trainings} times, encoder and"
        " ranker, from other seeds.",
        "Intervals are over users and trainings together (over users alone where there is one training);"
        f" `{NO_DIFFERENCE}` marks one that holds 0: no difference is shown.",
        "`cost` is bytes a row of the content columns in Parquet, over those of the first arm that has any; `RoI` is"
        " the mean NE gain of the tasks a byte, likewise. Columns `paper:` are the paper's own, on its own data.",
    ]


def _rows_of(comparison: Comparison) -> str:
    first, last = comparison.held_out
    return f"{comparison.rows:,} impressions of {comparison.users:,} users, {first} to {last}"


def _markdown(table: TableConfig, comparison: Comparison) -> list[str]:
    titles = [*TITLES, *(f"paper: {title}" for title in PAPER_TITLES)]
    rows = [[*ours, *_paper(table, name)] for name, ours in _ours(comparison).items()]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def as_text(tables: Tables, found: Found) -> str:
    """Give the tables for a terminal, without the paper's figures, which take the room."""
    lines: list[str] = []
    for name, comparison in found.items():
        lines += [tables[name].title, *_aligned([TITLES, *_ours(comparison).values()]), ""]
    return "\n".join([*lines, f"{NO_DIFFERENCE} the interval holds 0: no difference is shown"])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [line(row, widths) for row in rows]


def _ours(comparison: Comparison) -> dict[str, list[str]]:
    """Give the cells of every arm, by `TITLES`."""
    first = next((arm for name, arm in comparison.arms.items() if arm.feature_bytes_per_row), None)
    rows = {}
    for name, arm in comparison.arms.items():
        cells = [name, byte_size(arm.feature_bytes_per_row), _times(arm.feature_bytes_per_row, first)]
        for task in TASKS:
            cells += _gain_cells(arm, task, is_reference=name == comparison.reference)
        rows[name] = [*cells, _return_times(arm, first)]
    return rows


def _gain_cells(arm: ArmResult, task: str, *, is_reference: bool) -> list[str]:
    result = arm.tasks[task]
    if is_reference:
        return ["reference", UNKNOWN]
    if result.ne_gain is None or result.ne_gain_interval is None:
        return ["undefined", UNKNOWN]
    mark = f" {NO_DIFFERENCE}" if holds_zero(result.ne_gain_interval) else ""
    return [f"{percent(result.ne_gain)}{mark}", percent_interval(result.ne_gain_interval)]


def _times(bytes_a_row: float, first: ArmResult | None) -> str:
    return f"x{bytes_a_row / first.feature_bytes_per_row:.2f}" if first and bytes_a_row else UNKNOWN


def _return_times(arm: ArmResult, first: ArmResult | None) -> str:
    """Give an arm's return over the first one's, as the paper does; none where the first has no gain to divide by."""
    if first is None or arm.roi is None or not first.roi or first.roi <= 0:
        return UNKNOWN
    return f"x{arm.roi / first.roi:.2f}"


def _paper(table: TableConfig, arm: str) -> list[str]:
    given = table.paper.get(arm)
    if given is None:
        return [UNKNOWN] * len(PAPER_TITLES)
    gains = [UNKNOWN if gain is None else f"{gain:+.4f} %" for gain in (given.click, given.conversion)]
    times = [UNKNOWN if number is None else f"x{number:g}" for number in (given.cost, given.roi)]
    return [times[0], *gains, times[1]]
