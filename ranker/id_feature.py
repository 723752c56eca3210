"""An id column and its embedding table."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sidestack.encoder.sid.columns import sid_columns
from sidestack.encoder.sid.spec import SidSpec

CLUSTERS = "_clusters"
"""Ends the name of a feature whose ids are unpacked from the columns of a SID."""
ROWS_AN_ID = 4
"""Rows of a hashed table for an id that can occur: about a fifth of the ids then share a row."""
MAX_SID_ROWS = 2**20


@dataclass(frozen=True)
class IdFeature:
    """One id column and the embedding table it is looked up in.

    Attributes:
        column: the events column, which is also the feature's name; of clusters a name of their own.
        num_ids: ids lie in [0, num_ids); anything else is an error, never a silent zero.
        rows: rows of the table. Fewer than num_ids means hashing by modulo; more, room for ids to come.
        of_request: whether a request has the ids once, for all its impressions.
        sid: the set of Semantic IDs that the ids are of, whose bytes are the arm's own cost.
        clusters: more than 0: the ids are so many first digits of the SID, unpacked from its columns.
        fallback_rows: more than 0: the table has admission, and its first rows are those that ids without a row of
            their own share.
        row_map: of a table with admission the row of each id, int32; None until `ranker.row_maps` has read it. Ids
            beyond it share the fallback rows.
    """

    column: str
    num_ids: int
    rows: int
    of_request: bool
    sid: SidSpec | None = None
    clusters: int = 0
    fallback_rows: int = 0
    row_map: npt.NDArray[np.int32] | None = field(default=None, compare=False, repr=False)

    @property
    def table(self) -> str:
        """The embedding table's name."""
        return f"t_{self.column}"

    @property
    def is_hashed(self) -> bool:
        """Whether ids share rows by modulo of all rows."""
        return self.rows < self.num_ids and not self.has_admission

    @property
    def has_admission(self) -> bool:
        """Whether only admitted ids have rows of their own (`ranker.admission`)."""
        return self.fallback_rows > 0

    @property
    def is_sid(self) -> bool:
        """Whether the table holds Semantic IDs."""
        return self.sid is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The events columns that the ids come from."""
        if not self.clusters:
            return (self.column,)
        assert self.sid is not None
        base = self.column.removesuffix(CLUSTERS)
        return tuple(sid_columns(base, self.sid))[: len(self.sid.of_prefix(self.clusters).chunk_sizes)]

    @property
    def ids_per_entry(self) -> int:
        """How many ids stand for one item."""
        return max(self.clusters, 1)


def sid_rows(num_ids: int, can_occur: int, max_rows: int | None) -> int:
    """Return the rows of a table of SIDs; fewer than ids mean that ids are hashed.

    By rule a row for each id, but no more than the power of two that has `ROWS_AN_ID` rows for each that can occur, and
    `MAX_SID_ROWS` at most. What occurs is not counted: that would need the files. It is bounded by the items or users.

    Args:
        num_ids: that the digits can spell. can_occur: of prefixes, the items or users.
        max_rows: the arm's setting; None: the rule.
    """
    if max_rows is None:
        wanted = ROWS_AN_ID * max(can_occur, 1)
        max_rows = min(1 << (wanted - 1).bit_length(), MAX_SID_ROWS)
    return min(num_ids, max_rows)
