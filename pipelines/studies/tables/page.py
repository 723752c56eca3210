"""The papers' tables as a page of Markdown and as text for a terminal."""

from collections.abc import Iterable, Mapping, Sequence

from sidestack.pipelines.report.blocks import NO_DIFFERENCE, WITHHELD_MARK, tables_block
from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.report.table import line
from sidestack.pipelines.studies.tables.columns import Column, measured_columns, paper_columns
from sidestack.pipelines.studies.tables.config import TableConfig
from sidestack.ranker.metric_registry import HEADLINE, compared_metrics

Tables = Mapping[str, TableConfig]
Found = Mapping[str, Comparison]


def as_page(tables: Tables, found: Found, places: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        tables: the configuration of each table. found: the comparison of each. places: its directory's name (the key).
    """
    lines = ["# The papers' tables, on public data", "", *_how([tables[name] for name in found], found), ""]
    for name, comparison in found.items():
        table = tables[name]
        columns = [*measured_columns(table, comparison), *paper_columns(table)]
        lines += [f"## {table.title}", "", table.differs, "", *_markdown(columns, comparison), ""]
        lines += _sid_tables(comparison)
        lines += [f"Compared in `compare/{places[name]}`; {_rows_of(comparison)}.", ""]
    return "\n".join(lines)


def _how(shown: Sequence[TableConfig], found: Found) -> list[str]:
    replicates = sorted({comparison.replicates for comparison in found.values()})
    trainings = " or ".join(str(number) for number in replicates)
    used = [metric for metric in compared_metrics() if metric.name in {table.metric for table in shown}]
    how = [
        f"{'; '.join(metric.gain_rule('reference') for metric in used)}, on held-out dates; each arm is trained"
        f" {trainings} times, encoder and ranker, from other seeds.",
        "Intervals are over users and trainings together (over users alone where there is one training);"
        f" `{NO_DIFFERENCE}` marks one that holds 0: no difference is shown; `{WITHHELD_MARK}` a gain whose verdict is"
        " withheld, for reasons that its comparison's report gives.",
    ]
    if HEADLINE in used:
        how.append(
            "`cost` is bytes a row of the content columns in Parquet, over those of the first arm that has any; `RoI`"
            f" is the mean {HEADLINE.title} gain of the tasks a byte, likewise, marked `{NO_DIFFERENCE}` where no gain"
            " of the arm, or of that first arm, is shown."
        )
    if any(table.paper for table in shown):
        how.append("Columns `paper:` are the paper's own, on its own data.")
    if any(table.storage_over for table in shown):
        how.append(
            "`storage` is how many times fewer bytes a row an arm takes than the embeddings it quantizes; `of dense` is"
            " its gain over theirs, given where the interval of theirs lies above 0, and has no interval of its own."
        )
    return how


def _sid_tables(comparison: Comparison) -> list[str]:
    """Return the tables on SID embedding tables: hash sizes, and the share of ids that collide."""
    block = tables_block(comparison, only_sids=True)
    if not block.rows:
        return []
    return ["Tables of SIDs:", "", *_rendered([block.title, *block.columns], block.rows), ""]


def _rows_of(comparison: Comparison) -> str:
    first, last = comparison.held_out
    return f"{comparison.rows:,} impressions of {comparison.users:,} users, {first} to {last}"


def _markdown(columns: Sequence[Column], comparison: Comparison) -> list[str]:
    titles, *rows = _grid(columns, comparison)
    return _rendered(titles, rows)


def _rendered(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def as_text(tables: Tables, found: Found) -> str:
    """Return the tables for a terminal, without the paper's figures, for lack of space."""
    lines: list[str] = []
    for name, comparison in found.items():
        rows = _grid(measured_columns(tables[name], comparison), comparison)
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines += [tables[name].title, *(line(row, widths) for row in rows), ""]
    return "\n".join([*lines, *_marks()])


def _marks() -> tuple[str, str]:
    return (
        f"{NO_DIFFERENCE} the interval holds 0: no difference is shown",
        f"{WITHHELD_MARK} the verdict is withheld, for reasons that the comparison's report gives",
    )


def _grid(columns: Sequence[Column], comparison: Comparison) -> list[list[str]]:
    """Return the headings, and a row of cells for every arm."""
    return [[title for title, _ in columns], *([cell(arm) for _, cell in columns] for arm in comparison.arms)]
