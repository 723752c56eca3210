"""Communication volume of a table plan: the bytes that ranks send to each other in one training step.

A rank makes b lookups, one per row or one per request of its batch. Let L be the ids per lookup (int64), and let a
shard hold a share s of a table's rows in c columns (float32). Each other rank sends the shard b L s ids, and the number
of ids of each lookup (b int64, as both travel in one message). The shard sends back b vectors if they are pooled, else
b L s, and receives as many gradients: 4 c bytes each.

Table-row-wise sharding sums within a node first. This moves bytes from inter-node to intra-node links; the total stays
the same. The gradients are then divided among the senders in another way than here, but their sum is right.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sidestack.ranker.planner import PlannedTable, TablePlan

ID_BYTES, LENGTH_BYTES, NUMBER_BYTES = 8, 8, 4

PerRank = npt.NDArray[np.float64]


class SentBytes(NamedTuple):
    """Bytes that each of the R ranks sends to others in a step: ids, looked-up vectors, and gradients."""

    ids_R: PerRank
    forward_R: PerRank
    backward_R: PerRank

    def total(self) -> PerRank:
        """Return the sum of all three, [R]."""
        return self.ids_R + self.forward_R + self.backward_R


def count_sent(table: PlannedTable, ranks: int) -> SentBytes:
    """Count the bytes that ranks send for one table's lookups, assuming ids spread evenly over the table's rows.

    Args:
        table: its placement, and b. ranks: R.
    """
    each = SentBytes(np.zeros(ranks), np.zeros(ranks), np.zeros(ranks))
    for shard in table.shards:
        rows, columns = shard.size
        ids = table.lookups * table.ids * rows / table.rows
        request = ids * ID_BYTES + table.lookups * LENGTH_BYTES
        answer = (table.lookups if table.is_pooled else ids) * columns * NUMBER_BYTES
        others_R = np.arange(ranks) != shard.rank
        each.ids_R[others_R] += request
        each.forward_R[shard.rank] += (ranks - 1) * answer
        each.backward_R[others_R] += answer
    return each


def count_all_sent(plan: TablePlan) -> SentBytes:
    """Count the bytes that each rank sends in a step, for all tables together."""
    tables = [count_sent(table, plan.cluster.ranks) for table in plan.tables]
    return SentBytes(*(np.sum(parts, axis=0) for parts in zip(*tables, strict=True)))
