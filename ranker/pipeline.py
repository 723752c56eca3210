"""torchrec's pipeline, with one id exchange per step instead of two for every collection and sharding type."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.dist_data import KJTAllToAllTensorsAwaitable
from torchrec.distributed.embedding_sharding import KJTSplitsAllToAllMeta
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext

from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.model import StepOutput


class RankerPipeline(TrainPipelineSparseDist[RankerBatch, StepOutput]):  # type: ignore[misc]
    """`TrainPipelineSparseDist` with one message for the numbers of ids to expect, and one for the ids.

    torchrec fuses only the first: it sends the ids, and the number of ids of each lookup, in two messages for every
    collection of tables and every sharding type among its tables.
    """

    def wait_sparse_data_dist(self, context: TrainPipelineContext) -> None:
        """Wait for the number of ids from each rank, and start the exchange of all ids."""
        requests = [request for _, fused in context.fused_splits_awaitables for request in fused._awaitables]
        names = [name for fused, _ in context.fused_splits_awaitables for name in fused]
        # None on one rank, and none in the very first step, where torchrec has not replaced the forwards yet.
        metas = [one for one in requests if isinstance(one, KJTSplitsAllToAllMeta) and one.pg.size() > 1]
        tensors = [meta.input_tensors for meta in metas]
        for meta in metas:
            meta.input_tensors = []  # torchrec starts an exchange for each tensor in the list
        super().wait_sparse_data_dist(context)
        if metas:
            lists = [context.input_dist_tensors_requests[name].awaitables for name in names]
            waiting = [one for each in lists for one in each if isinstance(one, KJTAllToAllTensorsAwaitable)]
            with self._stream_context(self._data_dist_stream):
                _IdExchange(waiting, tensors)


class _IdExchange:
    """One all-to-all of several integer tensors, as int64: for each rank its parts of the tensors, in turn.

    Args of the constructor:
        waiting: torchrec's awaitables, which receive the exchanged tensors. tensors: those to send, of each awaitable.
    """

    def __init__(self, waiting: list[KJTAllToAllTensorsAwaitable], tensors: list[list[Tensor]]) -> None:
        self._waiting = waiting
        self._tensors = tensors
        group = waiting[0]._pg
        sent_XR = [split for one in waiting for split in one._input_splits_list]
        self._received_XR = [split for one in waiting for split in one._output_splits_list]
        parts_XR = [
            torch.split(tensor.long(), split)
            for tensor, split in zip((tensor for each in tensors for tensor in each), sent_XR, strict=True)
        ]
        sent = torch.cat([part for parts_X in zip(*parts_XR, strict=True) for part in parts_X])
        self._received = sent.new_empty(sum(map(sum, self._received_XR)))
        self._work: dist.Work | None = dist.all_to_all_single(
            self._received,
            sent,
            [sum(sizes_X) for sizes_X in zip(*self._received_XR, strict=True)],
            [sum(sizes_X) for sizes_X in zip(*sent_XR, strict=True)],
            group=group,
            async_op=True,
        )
        for one in waiting:
            one._awaitables = [cast(dist.Work, self)]

    def wait(self) -> None:
        """Wait for the message, and distribute its parts; a no-op after the first call."""
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        sizes_RX = list(zip(*self._received_XR, strict=True))
        parts = iter(torch.split(self._received, [size for sizes_X in sizes_RX for size in sizes_X]))
        parts_RX = [[next(parts) for _ in sizes_X] for sizes_X in sizes_RX]
        received_X = iter([torch.cat(parts_R) for parts_R in zip(*parts_RX, strict=True)])
        for one, tensors in zip(self._waiting, self._tensors, strict=True):
            one._output_tensors = [next(received_X).to(tensor.dtype) for tensor in tensors]
