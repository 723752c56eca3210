"""A bounded sample of the impressions of some dates."""

from collections.abc import Sequence
from datetime import date

import numpy as np
import pyarrow as pa

from sidestack.infra.checks import check_events
from sidestack.infra.impressions import EVENTS, ImpressionRows
from sidestack.infra.parquet import RowGroup
from sidestack.infra.snapshot import Dataset
from sidestack.infra.take import take_rows

SAMPLE_ROWS = 100_000
"""Impressions of a sample, up to rounding, or all if there are fewer. At this size the rows of a decile vary by 1 %."""
GROUPS_A_DATE = 16
"""Maximum number of row groups read of a date, spread over the day."""


def sample_impressions(
    dataset: Dataset, days: Sequence[date], columns: Sequence[str], rng: np.random.Generator
) -> pa.Table:
    """Draw impressions from each date in proportion to its rows.

    If a date has more than `GROUPS_A_DATE` row groups, one is drawn from each of that many equal parts of the day.

    Args:
        dataset: the snapshot. days: dates of the snapshot. columns: what to read. rng: the random generator.

    Raises:
        DataError: rows break the tables' contract.
    """
    rows = {day: sum(file.rows for file in dataset.files(EVENTS, day, day)) for day in days}
    share = min(1.0, SAMPLE_ROWS / max(sum(rows.values()), 1))
    parts: list[pa.Table] = []
    for day in days:
        if rows[day]:
            parts += _of_date(dataset, day, columns, share, rng)
    return pa.concat_tables(parts) if parts else pa.table({name: [] for name in columns})


def _of_date(
    dataset: Dataset, day: date, columns: Sequence[str], share: float, rng: np.random.Generator
) -> list[pa.Table]:
    source = ImpressionRows(dataset, day, day, columns, lambda rows, where: check_events(rows, dataset.spec, where))
    chosen = _spread(source.groups(0, source.num_rows), rng)
    wanted = share * source.num_rows / sum(group.rows for group in chosen)
    parts = []
    for group in chosen:
        number = min(group.rows, round(wanted * group.rows))
        rows_N = np.sort(rng.choice(group.rows, number, replace=False))
        parts.append(take_rows(source.joined(group), rows_N))
    return parts


def _spread(groups: Sequence[RowGroup], rng: np.random.Generator) -> list[RowGroup]:
    """Draw one row group from each of `GROUPS_A_DATE` equal parts; return all if there are no more."""
    if len(groups) <= GROUPS_A_DATE:
        return list(groups)
    bounds = np.linspace(0, len(groups), GROUPS_A_DATE + 1).astype(int)
    return [groups[int(rng.integers(low, high))] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
