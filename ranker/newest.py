"""Truncation of histories to their newest entries, by the configured bounds."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from sidestack.infra.lane import Batch
from sidestack.ranker.config import HistoryConfig
from sidestack.ranker.convert import as_array, history_lengths, rank_from_newest
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.layout import Integers

_NO_BOUND = 2**62
"""A bound above the entries of any history."""


@dataclass
class NewestEntries:
    """A truncation of histories to their newest entries, with counts of the entries cut.

    Attributes:
        settings: how many entries a history, and a global batch, may have; without bounds nothing is counted.
        entries: entries seen so far, without padding; a row that is read again counts again.
        entries_cut: how many of them were cut.
    """

    settings: HistoryConfig = HistoryConfig()
    entries: int = 0
    entries_cut: int = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Both counts: entries seen, and entries cut."""
        return self.entries, self.entries_cut

    def of(self, batch: Batch, features: ArmFeatures, lane_batch: int, lanes: int) -> Batch:
        """Return the batch with every sequence column cut to the newest entries, all at the same places.

        Args:
            batch: one batch of a rank, or several in turn. features: which columns are sequences.
            lane_batch: rows of a lane's share of a batch, which are adjacent. lanes: their number over all ranks.
        """
        if self.settings.max_length is None and self.settings.max_entries is None:
            return batch
        requests, request_N = batch.rows.shared, batch.rows.run_N
        assert requests is not None
        lengths_R = history_lengths(requests)
        kept_R = np.minimum(lengths_R, self.settings.max_length or _NO_BOUND)
        if self.settings.max_entries is not None:
            kept_R = fitting_lengths(kept_R, batch.rows.run_starts // lane_batch, self.settings.max_entries // lanes)
        self.entries += int(lengths_R[request_N][batch.valid_N].sum())
        self.entries_cut += int((lengths_R - kept_R)[request_N][batch.valid_N].sum())
        if np.array_equal(kept_R, lengths_R):
            return batch
        is_kept_T = pa.array(rank_from_newest(lengths_R) <= np.repeat(kept_R, lengths_R))
        offsets_R1 = pa.array(np.concatenate([[0], np.cumsum(kept_R)]).astype(np.int32))
        for column in features.sequence_columns:
            values = as_array(requests, column).flatten().filter(is_kept_T)
            at, field = requests.schema.get_field_index(column), requests.schema.field(column)
            requests = requests.set_column(at, field, pa.ListArray.from_arrays(offsets_R1, values, type=field.type))
        return batch._replace(rows=replace(batch.rows, shared=requests))


def fitting_lengths(lengths_R: Integers, share_R: Integers, most: int) -> Integers:
    """Return lengths that sum to at most `most` in each share; the longest of a share are cut to one common length.

    Args:
        lengths_R: of histories. share_R: the share of each, ascending from 0. most: bound of a share's entries.
    """
    fitting_R = lengths_R.copy()
    for share in np.flatnonzero(np.bincount(share_R, lengths_R) > most):
        own = share_R == share
        ascending_R = np.sort(lengths_R[own])
        before_R = np.cumsum(ascending_R) - ascending_R
        level_R = (most - before_R) // np.arange(len(ascending_R), 0, -1)  # if all shorter ones are kept whole
        fitting_R[own] = np.minimum(lengths_R[own], level_R[np.argmax(level_R < ascending_R)])
    return fitting_R
