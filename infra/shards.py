"""Sharded tensors, stored in global coordinates, so that any number of ranks can read them.

A rank writes the parts it holds, cut into blocks to bound memory. Each block is a safetensors file of its own, whose
key holds its tensor and its offset: `name@row,column`. A reader reads from all files what overlaps its own parts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from sidestack.infra.tensors import write_tensors

BLOCK_NUMBERS = 1 << 26


class Shard(NamedTuple):
    """A part of a tensor: the offset of its first element in the whole tensor, and the part itself."""

    offset: tuple[int, ...]
    tensor: Tensor


class Spread(NamedTuple):
    """A tensor that is sharded over the ranks.

    Attributes:
        shape: shape of the whole tensor.
        parts: the parts that this rank holds, possibly none.
        may_grow: whether it may have more rows than the saved tensor. `read_shards` leaves new rows as they are.
    """

    shape: tuple[int, ...]
    parts: Sequence[Shard]
    may_grow: bool = False


Shards = Mapping[str, Spread]
"""Tensors by name."""


class _Stored(NamedTuple):
    """A block on disk."""

    file: Path
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def write_shards(shards: Shards, folder: Path, rank: int) -> None:
    """Write a rank's parts into a folder that all ranks share.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    blocks = ((name, block) for name, spread in shards.items() for part in spread.parts for block in _blocks(part))
    for number, (name, block) in enumerate(blocks):
        key = f"{name}@{','.join(map(str, block.offset))}"
        write_tensors({key: block.tensor}, folder / f"rank-{rank:04d}-{number:05d}.safetensors")


def read_shards(shards: Shards, folder: Path) -> None:
    """Fill a rank's parts, in place, from what any number of ranks wrote.

    Rows beyond those that were saved stay as they are, where a tensor may grow.

    Raises:
        OSError, SafetensorError: a file cannot be read.
        ValueError: an element of a part was never written, or a tensor was saved with another shape.
    """
    stored = _stored(folder)
    for name, (shape, parts, may_grow) in shards.items():
        blocks = stored.get(name, [])
        saved_rows = _require_shape(name, blocks, shape, may_grow)
        for part in parts:
            old_rows = min(max(saved_rows - part.offset[0], 0), len(part.tensor))
            expected = old_rows * math.prod(part.tensor.shape[1:])
            filled = sum(_fill(part, block) for block in blocks)
            if filled != expected:
                raise ValueError(f"{name}: {filled} of the {expected} numbers from {part.offset} are there")


def _require_shape(name: str, blocks: Sequence[_Stored], shape: tuple[int, ...], may_grow: bool) -> int:
    """Check that a tensor has the shape it was saved with, or more rows where it may grow; return the saved rows."""
    if not blocks:
        raise ValueError(f"{name}: was not saved")
    ends = ([at + size for at, size in zip(block.offset, block.shape, strict=True)] for block in blocks)
    saved: tuple[int, ...] = tuple(max(axis) for axis in zip(*ends, strict=True))
    if saved != shape and not (may_grow and saved[1:] == shape[1:] and saved[0] < shape[0]):
        rule = "it must not have fewer rows, nor another width" if may_grow else "it must have the same"
        raise ValueError(f"{name}: was saved with shape {saved}, now has {shape}; {rule}")
    return saved[0]


def _blocks(part: Shard) -> Iterator[Shard]:
    tensor = part.tensor.detach()
    rows = max(1, BLOCK_NUMBERS // max(1, tensor[:1].numel()))
    for first in range(0, len(tensor), rows):
        yield Shard((part.offset[0] + first, *part.offset[1:]), tensor[first : first + rows])


def _stored(folder: Path) -> dict[str, list[_Stored]]:
    found: dict[str, list[_Stored]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                name, _, offset = key.rpartition("@")
                shape = tuple(tensors.get_slice(key).get_shape())
                found.setdefault(name, []).append(_Stored(file, key, tuple(map(int, offset.split(","))), shape))
    return found


def _fill(part: Shard, block: _Stored) -> int:
    """Copy the overlap of a block with a part; return the number of elements copied."""
    if len(block.shape) != part.tensor.dim():
        return 0
    to, of = [], []
    for here, size, there, length in zip(part.offset, part.tensor.shape, block.offset, block.shape, strict=True):
        low, high = max(here, there), min(here + size, there + length)
        if low >= high:
            return 0
        to.append(slice(low - here, high - here))
        of.append(slice(low - there, high - there))
    with safe_open(block.file, "pt") as tensors:
        target = part.tensor.detach()[tuple(to)]
        target.copy_(tensors.get_slice(block.key)[tuple(of)])
    return target.numel()
