"""An id column and its embedding table."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sidestack.encoder.sid.columns import sid_columns
from sidestack.encoder.sid.spec import SidSpec

CLUSTERS = "_clusters"
"""Suffix of the name of a feature whose ids are unpacked from the columns of a SID."""
ROWS_AN_ID = 4
"""Rows of a hashed table per id that can occur: about a fifth of the ids then share a row."""
MAX_SID_ROWS = 2**20


@dataclass(frozen=True)
class IdFeature:
    """One id column and the embedding table it is looked up in.

    Attributes:
        column: the events column, which is also the feature's name; clusters have a name of their own.
        num_ids: ids are in [0, num_ids); anything else is an error, never a silent zero.
        rows: rows of the table. Fewer than num_ids means hashing by modulo; more, room for future ids.
        of_request: whether the ids are stored once per request, for all its impressions.
        sid: the set of Semantic IDs that the ids come from; its bytes count as the arm's own cost.
        clusters: more than 0: the ids are this many first digits of the SID, unpacked from its columns.
        fallback_rows: more than 0: the table has admission, and ids without a row of their own share this many first
            rows.
        row_map: the row of each id in a table with admission, int32; None until `ranker.row_maps` has read it. Ids
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
        """Whether ids share rows, by modulo of the number of rows."""
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
        """The number of ids per item."""
        return max(self.clusters, 1)


def sid_rows(num_ids: int, can_occur: int, max_rows: int | None) -> int:
    """Return the rows of a table of SIDs; fewer rows than ids mean that ids are hashed.

    By rule one row per id, but no more than the power of two with `ROWS_AN_ID` rows per id that can occur, and at most
    `MAX_SID_ROWS`. The ids that occur are not counted, as that would need the files; items or users bound their number.

    Args:
        num_ids: ids that the digits can spell. can_occur: ids that can occur; of prefixes, the items or users.
        max_rows: the arm's setting; None: the rule.
    """
    if max_rows is None:
        wanted = ROWS_AN_ID * max(can_occur, 1)
        max_rows = min(1 << (wanted - 1).bit_length(), MAX_SID_ROWS)
    return min(num_ids, max_rows)
