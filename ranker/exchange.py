"""What a plan's tables cost in messages: the bytes that ranks send to each other in one step of training.

A rank makes b lookups, one a row or one a request of its batch. With L ids a lookup (int64), and a shard that holds a
share s of a table's rows in c columns (float32), each other rank asks the shard for b L s ids, and tells how many are
of each lookup (b int64, as both travel in one message). The shard answers with b vectors where they are pooled, b L s
where they are not, and gets as many gradients back: 4 c bytes each.

Table-row-wise sharding sums within a node first, which moves bytes from between the nodes into them, but neither adds
nor saves any; how its gradients are shared out over the senders is then not as given here, their sum is.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sidestack.ranker.planner import PlannedTable, TablePlan

ID_BYTES, LENGTH_BYTES, NUMBER_BYTES = 8, 8, 4

PerRank = npt.NDArray[np.float64]


class Sent(NamedTuple):
    """Bytes that each of the R ranks sends to others in a step: ids, looked-up vectors, and gradients."""

    ids_R: PerRank
    forward_R: PerRank
    backward_R: PerRank

    def total(self) -> PerRank:
        """Return all three together, [R]."""
        return self.ids_R + self.forward_R + self.backward_R


def sent(table: PlannedTable, ranks: int) -> Sent:
    """Count what one table's lookups make the ranks send, ids spread evenly over the table's rows.

    Args:
        table: its place, and b. ranks: R.
    """
    each = Sent(np.zeros(ranks), np.zeros(ranks), np.zeros(ranks))
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


def sent_by_all(plan: TablePlan) -> Sent:
    """Count what all tables together make each rank send in a step."""
    tables = [sent(table, plan.cluster.ranks) for table in plan.tables]
    return Sent(*(np.sum(parts, axis=0) for parts in zip(*tables, strict=True)))
