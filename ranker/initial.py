"""Initial weights that depend only on the seed and a parameter's name.

They do not depend on the arm, so weights that two arms share start equal, nor on the number of ranks or the sharding,
so runs can be compared. A table is filled in blocks of rows, each with its own generator. A shard generates only the
blocks it holds: memory stays bounded and no rank generates the whole table.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

BLOCK_ROWS = 8192
OMEGA = "omega"
"""Name of the matrix that maps the history's unpacked SIDs (or raw embeddings) to the model's width."""
TABLE_BOUND = 0.01
"""Table rows start uniform in (-bound, bound): small, so that a row never or rarely seen adds little noise."""


def generator(seed: int, name: str, block: int = 0) -> torch.Generator:
    """Return the random generator of one block of one parameter."""
    text = f"{seed}|{name}|{block}".encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(number)


@torch.no_grad()
def fill_table(shard: Tensor, name: str, seed: int, rows_from: int, columns_from: int, dim: int) -> None:
    """Fill one shard of a table in place.

    Args:
        shard: float [rows, columns], the part of the table at offset (rows_from, columns_from).
        name: the table's parameter name.
        seed: the run's.
        rows_from: the shard's first row in the table. columns_from: likewise for columns.
        dim: columns of the whole table.
    """
    rows, columns = shard.shape
    end = rows_from + rows
    for block in range(rows_from // BLOCK_ROWS, math.ceil(end / BLOCK_ROWS)):
        start = block * BLOCK_ROWS
        values = torch.empty(BLOCK_ROWS, dim).uniform_(
            -TABLE_BOUND, TABLE_BOUND, generator=generator(seed, name, block)
        )
        low, high = max(start, rows_from), min(start + BLOCK_ROWS, end)
        part = values[low - start : high - start, columns_from : columns_from + columns]
        shard[low - rows_from : high - rows_from].copy_(part)


@torch.no_grad()
def fill_dense(module: nn.Module, seed: int) -> None:
    """Fill a module's parameters in place: matrices by Xavier's normal, vectors (biases) with zeros.

    Omega, which replaces a table, starts as small as a table's rows: see docs/architecture.md.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            parameter.zero_()
            continue
        values = torch.empty(parameter.shape)
        if name.endswith(OMEGA):
            values.uniform_(-TABLE_BOUND, TABLE_BOUND, generator=generator(seed, name))
        else:
            nn.init.xavier_normal_(values, generator=generator(seed, name))
        parameter.copy_(values)
