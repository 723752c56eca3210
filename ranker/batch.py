"""One batch as the model takes it, able to move between devices and CUDA streams."""

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class RankerBatch(Pipelineable):  # type: ignore[misc]
    """One rank's part of a global batch: B rows, T history entries over all of them.

    Attributes:
        bags: ids of the sparse block, by feature.
        sequences: ids of the history, by feature; every feature has the same lengths.
        dense_BF: dense features.
        item_sids_BC: the ad's SIDs in C columns, set after set (C = 0 where the arm does not unpack them).
        item_known_BS: False where the ad's SID of a set is null (S = 0 where the arm does not ask).
        user_sids_BC, user_known_BS: the user's, likewise.
        history_sids_TC: the history's SIDs. history_known_TS: False where a SID of a set is null.
        history_recency_FT: how far back each history entry lies, in F = 3 ways: log(1 + days) to the event,
            log(1 + days) since the entry before it (0 for the oldest), and log rank counted from the newest.
        history_offsets_B1: row b owns history entries offsets[b] to offsets[b + 1].
        labels_BT: 0 or 1 by task (click, conversion).
        weights_BT: 1 where the label is known: not on padding, and a conversion not when null.
        longest: the longest history in the batch.
    """

    bags: KeyedJaggedTensor
    sequences: KeyedJaggedTensor
    dense_BF: Tensor
    item_sids_BC: Tensor
    item_known_BS: Tensor
    user_sids_BC: Tensor
    user_known_BS: Tensor
    history_sids_TC: Tensor
    history_known_TS: Tensor
    history_recency_FT: Tensor
    history_offsets_B1: Tensor
    labels_BT: Tensor
    weights_BT: Tensor
    longest: int

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Give the batch on `device`."""
        return self._mapped(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Give the batch in page-locked host memory, from which copies to a GPU overlap computation."""
        return self._mapped(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses this batch's memory."""
        self._mapped(lambda value: value.record_stream(stream))

    def _mapped(self, change: Any) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: value if name == "longest" else change(value) for name, value in values.items()}
        return type(self)(**changed)
