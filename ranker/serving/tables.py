"""Embedding tables of a served ranker: float32 or fewer bits per number, looked up without torchrec or fbgemm."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "float16", "int8"]


class ServedTable:
    """One table in its stored precision; a looked-up row is float32.

    `int8` stores a byte per number, and for each row the least number and the step between two bytes.

    Args:
        stored: as `stored_table` returns.
    """

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._rows_ND = stored["rows"]
        self._least_step_N2 = stored.get("least_step")

    @property
    def num_rows(self) -> int:
        """The table's number of rows."""
        return len(self._rows_ND)

    def rows(self, ids_N: Tensor) -> Tensor:
        """Return float32 [N, d], the rows of ids in [0, rows)."""
        rows_ND = self._rows_ND.index_select(0, ids_N).float()
        if self._least_step_N2 is None:
            return rows_ND
        least_N1, step_N1 = torch.split(self._least_step_N2.index_select(0, ids_N), 1, dim=1)
        return torch.addcmul(least_N1, rows_ND, step_N1)

    def pooled(self, ids_N: Tensor, lengths_B: Tensor) -> Tensor:
        """Return float32 [B, d], the sums of the rows of each bag; zeros where it is empty.

        Args:
            ids_N: the concatenated ids of all bags. lengths_B: how many ids each bag has.
        """
        rows_ND = self.rows(ids_N)
        bag_N = torch.repeat_interleave(lengths_B.long(), output_size=len(ids_N))
        return rows_ND.new_zeros(len(lengths_B), rows_ND.shape[1]).index_add_(0, bag_N, rows_ND)


def stored_table(rows_ND: Tensor, precision: Precision) -> dict[str, Tensor]:
    """Return a table's stored tensors, by name: `rows`, and for int8 `least_step` [rows, 2]."""
    if precision == "float32":
        return {"rows": rows_ND}
    if precision == "float16":
        return {"rows": rows_ND.half()}
    least_N1, most_N1 = rows_ND.min(1, keepdim=True).values, rows_ND.max(1, keepdim=True).values
    step_N1 = (most_N1 - least_N1) / 255
    bytes_ND = ((rows_ND - least_N1) / torch.where(step_N1 > 0, step_N1, 1)).round().to(torch.uint8)
    return {"rows": bytes_ND, "least_step": torch.cat([least_N1, step_N1], dim=1)}
