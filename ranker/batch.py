"""One batch as the model takes it, able to move between devices and CUDA streams."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
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
        item_content_BC: the ids that the ad's content takes as they are, not by a table (`ranker.features.Content`):
            its SIDs in C columns, set after set, or its own id (C = 0 for other content).
        item_known_BS: False where the ad's SID of a set is null (S = 0 where the arm does not ask).
        user_content_BC, user_known_BS: the user's, likewise.
        history_content_TC, history_known_TS: those of the history's entries, likewise.
        history_recency_FT: how far back each history entry lies, in F = 3 ways: log(1 + days) to the event,
            log(1 + days) since the entry before it (0 for the oldest), and log rank counted from the newest.
        history_offsets_B1: row b owns history entries offsets[b] to offsets[b + 1].
        labels_BT: 0 or 1 by task, 0 where the label is not known.
        weights_BT: 1 where the label is known and the row is not padding, else 0.
        longest: the longest history in the batch.
    """

    bags: KeyedJaggedTensor
    sequences: KeyedJaggedTensor
    dense_BF: Tensor
    item_content_BC: Tensor
    item_known_BS: Tensor
    user_content_BC: Tensor
    user_known_BS: Tensor
    history_content_TC: Tensor
    history_known_TS: Tensor
    history_recency_FT: Tensor
    history_offsets_B1: Tensor
    labels_BT: Tensor
    weights_BT: Tensor
    longest: int

    def split(self, rows: int) -> Iterator["RankerBatch"]:
        """Return so many rows after another, as views where they can be; in host memory."""
        ends = self.history_offsets_B1.numpy()
        lengths_B = np.diff(ends)
        bags, sequences = _split_jagged(self.bags, rows), _split_jagged(self.sequences, rows)
        for at, bags_part, sequences_part in zip(range(0, len(lengths_B), rows), bags, sequences, strict=True):
            part, entries = slice(at, at + rows), slice(int(ends[at]), int(ends[min(at + rows, len(lengths_B))]))
            yield RankerBatch(
                bags=bags_part,
                sequences=sequences_part,
                dense_BF=self.dense_BF[part],
                item_content_BC=self.item_content_BC[part],
                item_known_BS=self.item_known_BS[part],
                user_content_BC=self.user_content_BC[part],
                user_known_BS=self.user_known_BS[part],
                history_content_TC=self.history_content_TC[entries],
                history_known_TS=self.history_known_TS[entries],
                history_recency_FT=self.history_recency_FT[:, entries],
                history_offsets_B1=self.history_offsets_B1[at : at + rows + 1] - entries.start,
                labels_BT=self.labels_BT[part],
                weights_BT=self.weights_BT[part],
                longest=int(lengths_B[part].max()),
            )

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Return the batch on `device`."""
        return self._mapped(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the batch in page-locked host memory, from which copies to a GPU overlap computation."""
        return self._mapped(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses this batch's memory."""
        self._mapped(lambda value: value.record_stream(stream))

    def _mapped(self, change: Any) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: value if name == "longest" else change(value) for name, value in values.items()}
        return type(self)(**changed)


def _split_jagged(jagged: KeyedJaggedTensor, rows: int) -> Iterator[KeyedJaggedTensor]:
    """Return so many rows of every feature after another."""
    keys, total, ids_N = jagged.keys(), jagged.stride(), jagged.values().numpy()
    lengths_FB = jagged.lengths().numpy().reshape(len(keys), total)
    ends = np.concatenate([[0], np.cumsum(lengths_FB, dtype=np.int64)])
    first_F = np.arange(len(keys)) * total
    for at in range(0, total, rows):
        until = min(at + rows, total)
        parts = [ids_N[first:last] for first, last in zip(ends[first_F + at], ends[first_F + until], strict=True)]
        yield KeyedJaggedTensor(
            keys=keys,
            values=torch.from_numpy(np.concatenate(parts) if parts[1:] else parts[0]),
            lengths=torch.from_numpy(np.ascontiguousarray(lengths_FB[:, at:until]).ravel()),
        )
