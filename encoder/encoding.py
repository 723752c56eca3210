"""Encoding rows with a loaded encoder: signals in, SIDs out, each the same in any batch and on any machine's cores."""

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

A matrix product may add up in another order for another number of rows or threads, and a last bit
decides a code that lies on a border. So a row is always encoded in a block of this many rows, at
the place in it that its row group gives it, by one thread: its id then depends on nothing else,
not on the batch size, nor on the number of ranks. More speed comes from more ranks.
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
        spec: how digits become ids; its digits are the bundle's.
        batch: the items' signals, beginning at a block's border.
        block_rows: rows of a block; another number than `BLOCK_ROWS` must have been found to give the same.

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
    """Let torch use one thread, so that the order in which a product adds up is the same on any machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
