"""Which tasks' labels count on which dates, and the rows of the dates with any label that counts.

A recurring training learns clicks of the newest dates, and conversions of dates whose follow-up has ended since. Only
the rows of both are read; each has, by task, whether its label counts. A label that does not count still determines
whether the condition of its task's children holds.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.impressions import ImpressionRows
from sidestack.infra.parquet import RowGroup
from sidestack.infra.rows import Check, Rows
from sidestack.infra.snapshot import Dataset
from sidestack.ranker.config import Dates
from sidestack.ranker.convert import as_array

COUNTS = "{} counts"
"""The column with whether a task's label counts, present unless all labels count."""


class Span(NamedTuple):
    """Dates, first and last, on which the labels of the same tasks count."""

    dates: Dates
    tasks: frozenset[str]


def spans_of(dates: Dates, labels: Mapping[str, Dates]) -> tuple[Span, ...]:
    """Return the spans of dates, in order, on which the labels of some task count.

    Args:
        dates: first and last date to consider. labels: by task, the first and last date whose labels count.
    """
    day = timedelta(days=1)
    cut = {task: (max(first, dates[0]), min(last, dates[1])) for task, (first, last) in labels.items()}
    edges = sorted({edge for first, last in cut.values() if first <= last for edge in (first, last + day)})
    spans = (
        Span((begin, end - day), frozenset(task for task, (first, last) in cut.items() if first <= begin <= last))
        for begin, end in itertools.pairwise(edges)
    )
    return tuple(span for span in spans if span.tasks)


class SpannedRows:
    """The impressions of several spans, one after another: an `infra.rows.RowSource`.

    Args:
        spans: at least one. tasks: all of the dataset's. open_rows: opens the impressions of some dates.
    """

    def __init__(
        self, spans: Sequence[Span], tasks: Sequence[str], open_rows: Callable[[Dates], ImpressionRows]
    ) -> None:
        self._spans = tuple(spans)
        self._tasks = tuple(tasks)
        self._parts = [open_rows(span.dates) for span in spans]
        self._starts = np.cumsum([0, *(part.num_rows for part in self._parts)]).tolist()
        self._part_of: dict[Path, int] = {}

    @property
    def num_rows(self) -> int:
        """The impressions of all spans."""
        return int(self._starts[-1])

    @property
    def num_opened(self) -> int:
        """The number of files whose footer was read."""
        return sum(part.num_opened for part in self._parts)

    def groups(self, low: int, high: int) -> list[RowGroup]:
        """Return the row groups that hold a row of `[low, high)`; see `RowSource.groups`."""
        found: list[RowGroup] = []
        for number, part in enumerate(self._parts):
            start = self._starts[number]
            first, last = max(low - start, 0), min(high - start, part.num_rows)
            if first < last:
                own = part.groups(first, last)
                self._part_of |= dict.fromkeys((group.path for group in own), number)
                found += [replace(group, start=group.start + start) for group in own]
        return found

    def starts(self, group: RowGroup) -> npt.NDArray[np.int64]:
        """Return the rows of a row group, counted from its first, where a request begins."""
        part, _, own = self._own(group)
        return part.starts(own)

    def read(self, group: RowGroup) -> Rows:
        """Return the impressions of a row group, with a column per task of whether its label counts."""
        part, span, own = self._own(group)
        rows = part.read(own)
        table = rows.own
        for task in self._tasks:
            counts = pa.repeat(pa.scalar(task in span.tasks), table.num_rows)
            table = table.append_column(COUNTS.format(task), counts)
        return replace(rows, own=table)

    def joined(self, group: RowGroup) -> pa.Table:
        """Return the impressions of a row group, each with the columns of its request."""
        part, _, own = self._own(group)
        return part.joined(own)

    def _own(self, group: RowGroup) -> tuple[ImpressionRows, Span, RowGroup]:
        number = self._part_of[group.path]
        return self._parts[number], self._spans[number], replace(group, start=group.start - self._starts[number])


def open_impressions(
    dataset: Dataset,
    dates: Dates,
    labels: Mapping[str, Dates] | None,
    columns: Sequence[str],
    check: Check | None = None,
) -> ImpressionRows | SpannedRows:
    """Open the impressions of dates; with `labels`, only of dates on which the labels of some task count.

    Args:
        dataset: the snapshot. dates: first and last. labels: by task, the dates whose labels count; None: all do.
        columns: the columns to read. check: called with the rows of each table's row group.

    Raises:
        DataError: there are no events on these dates.
    """

    def impressions(dates: Dates) -> ImpressionRows:
        return ImpressionRows(dataset, *dates, columns, check)

    tasks = tuple(dataset.spec.tasks)
    spans = () if labels is None else spans_of(dates, labels)
    spans = tuple(span for span in spans if dataset.partitions("events", *span.dates))
    if not spans or (len(spans) == 1 and len(spans[0].tasks) == len(tasks)):
        return impressions(spans[0].dates if spans else dates)
    return SpannedRows(spans, tasks, impressions)


def mask_uncounted(table: pa.Table, task: str, label: pa.Array) -> pa.Array:
    """Return a task's labels, null where they do not count.

    Args:
        table: the rows of the labels. task: its name. label: the labels, as one contiguous array.
    """
    name = COUNTS.format(task)
    return pc.if_else(as_array(table, name), label, None) if name in table.column_names else label
