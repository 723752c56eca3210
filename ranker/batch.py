"""One batch as the model takes it, able to move between devices and CUDA streams."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from sidestack.infra.lane import Batch
from sidestack.ranker.inputs import ModelInputs
from sidestack.ranker.layout import Integers, history_layout


@dataclass
class RankerBatch(ModelInputs, Pipelineable):  # type: ignore[misc]
    """One rank's part of a global batch: inputs, ids to look up, and labels.

    Attributes:
        bags: ids of the sparse block that each row has, by feature.
        request_bags: ids of the sparse block that each of the R requests has, by feature.
        sequences: ids of the history by request, by feature; every feature has the same lengths.
        labels_BT: 0 or 1 by task, 0 where the label is not known.
        weights_BT: 1 where the label is known and the row is not padding, else 0.
        counts_2T: float64, over all ranks of the global batch: the number of labels in the loss, and of positives
            among them, by task; None: this part is the whole.
        source: the rows that it was made from, for callers that need more than tensors; never on a GPU.
    """

    bags: KeyedJaggedTensor
    request_bags: KeyedJaggedTensor
    sequences: KeyedJaggedTensor
    labels_BT: Tensor
    weights_BT: Tensor
    counts_2T: Tensor | None = None
    source: Batch | None = None

    def split(self, rows: int) -> Iterator["RankerBatch"]:
        """Yield consecutive parts of `rows` rows each, as views where possible; in host memory."""
        request_B, lengths_R = self.request_B.numpy(), self.history_lengths_R.numpy()
        ends_R1 = np.concatenate([[0], np.cumsum(lengths_R)])
        of_rows = [(at, min(at + rows, len(request_B))) for at in range(0, len(request_B), rows)]
        of_requests = [(int(request_B[low]), int(request_B[high - 1]) + 1) for low, high in of_rows]
        jagged = zip(
            _split_jagged(self.bags, of_rows),
            _split_jagged(self.request_bags, of_requests),
            _split_jagged(self.sequences, of_requests),
            strict=True,
        )
        for (low, high), (first, last), (bags, request_bags, sequences) in zip(
            of_rows, of_requests, jagged, strict=True
        ):
            part, own, entries = slice(low, high), slice(first, last), slice(int(ends_R1[first]), int(ends_R1[last]))
            yield RankerBatch(
                bags=bags,
                request_bags=request_bags,
                sequences=sequences,
                dense_BF=self.dense_BF[part],
                item_content_BC=self.item_content_BC[part],
                item_known_BS=self.item_known_BS[part],
                user_content_RC=self.user_content_RC[own],
                user_known_RS=self.user_known_RS[own],
                history_content_TC=self.history_content_TC[entries],
                history_known_TS=self.history_known_TS[entries],
                history_recency_FT=self.history_recency_FT[:, entries],
                history_lengths_R=self.history_lengths_R[own],
                request_B=self.request_B[part] - first,
                layout=history_layout(lengths_R[own], np.bincount(request_B[part] - first)),
                labels_BT=self.labels_BT[part],
                weights_BT=self.weights_BT[part],
            )

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Return the batch on `device`."""
        return self._mapped(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the batch in pinned host memory, so that copies to a GPU overlap computation."""
        return self._mapped(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Record for the allocator that `stream` uses this batch's memory."""
        self._mapped(lambda value: value.record_stream(stream))

    def _mapped(self, change: Callable[[Any], Any]) -> Self:
        values = {name: getattr(self, name) for name in (field.name for field in fields(self)) if name != "source"}
        return type(self)(**{name: _map_tensors(value, change) for name, value in values.items()}, source=self.source)


def _map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the changed tensor, or a tuple with all of its tensors changed."""
    if value is None:
        return None
    if not isinstance(value, tuple):
        return change(value)
    parts = [_map_tensors(part, change) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _split_jagged(jagged: KeyedJaggedTensor, bounds: list[tuple[int, int]]) -> Iterator[KeyedJaggedTensor]:
    """Yield, for each (first, end) of the bounds, the ids of every feature."""
    keys, total, ids_N = jagged.keys(), jagged.stride(), jagged.values().numpy()
    lengths_FB: Integers = jagged.lengths().numpy().reshape(len(keys), total)
    ends = np.concatenate([[0], np.cumsum(lengths_FB, dtype=np.int64)])
    first_F = np.arange(len(keys)) * total
    for low, high in bounds:
        parts = [ids_N[first:last] for first, last in zip(ends[first_F + low], ends[first_F + high], strict=True)]
        yield KeyedJaggedTensor(
            keys=keys,
            values=torch.from_numpy(np.concatenate(parts) if parts[1:] else parts[0]),
            lengths=torch.from_numpy(np.ascontiguousarray(lengths_FB[:, low:high]).ravel()),
        )
