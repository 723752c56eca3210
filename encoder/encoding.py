"""Encode rows with a loaded encoder: signals in, SIDs out, independent of the batch and of the number of CPU cores."""

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from sidestack.encoder.bundle import EncoderBundle
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL
from sidestack.encoder.signals import SignalBatch, signal_batch

BLOCK_ROWS = 256
"""Rows that pass through the network at a time, always.

A matrix product may sum in another order for another number of rows or threads, and the last bit decides a code on a
border between two cells. So a row is always encoded by one thread, in a block of this many rows, at the position that
its row group determines. Its id then does not depend on the batch size or the number of ranks. For more speed, use
more ranks.
"""


def encode_table(bundle: EncoderBundle, spec: SidSpec, table: pa.Table, batch_size: int) -> npt.NDArray[np.int64]:
    """Return the SIDs of a row group, encoded batch by batch: int64 [N, chunks]."""
    rows = -(-batch_size // BLOCK_ROWS) * BLOCK_ROWS  # whole blocks: see BLOCK_ROWS
    starts = range(0, table.num_rows, rows)
    batches = (signal_batch(table.slice(start, rows), bundle.signals) for start in starts)
    parts = [encode(bundle, spec, batch) for batch in batches]
    return np.concatenate([np.empty((0, len(spec.chunk_sizes)), np.int64), *parts])


def encode(
    bundle: EncoderBundle, spec: SidSpec, batch: SignalBatch, block_rows: int = BLOCK_ROWS
) -> npt.NDArray[np.int64]:
    """Return the SIDs of a batch, block by block, so that each is the same in any batch.

    Args:
        bundle: the encoder.
        spec: how digits become ids; it must have the bundle's digits.
        batch: the items' signals, beginning at a block's border.
        block_rows: rows of a block; a number other than `BLOCK_ROWS` must be known to give the same ids.

    Returns:
        int64 [N, chunks]; `NULL` where every signal is missing.
    """
    device = bundle.model.weights_K.device
    with torch.inference_mode(), one_thread():
        blocks = batch.to(device).blocks(block_rows)
        digits_ND = torch.cat([bundle.model.digits(block.padded(block_rows))[: len(block)] for block in blocks])
        ids_NC = spec.pack(digits_ND).cpu()
        ids_NC[~batch.any_present] = NULL
    return ids_NC.numpy()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, so that matrix products sum in the same order on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
