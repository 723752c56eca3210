"""The spec of a set of SIDs: levels, lines, digits, packing, prefixes, and the encoder that made them."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sidestack.encoder.sid.lookup import unpack_ids
from sidestack.encoder.sid.packing import Packing, max_digits, pack_digits
from sidestack.infra.config import Config
from sidestack.infra.errors import SpecError
from sidestack.infra.tables import Entity

Bound = Literal["clamp", "tanh", "ifsq"]

DEFAULT_NAME = "sid"
"""The name of the SIDs of a run with one encoder; further sets have names of their own."""


def prefixes_fit(lengths: Sequence[int], digits: int) -> bool:
    """Return whether prefix lengths are strictly increasing within 1..digits."""
    return list(lengths) == sorted(set(lengths)) and all(1 <= length <= digits for length in lengths)


class SidSpec(Config):
    """The meaning of the ids in a SID column, stored in the metadata of every such column.

    A SID with more digits than int64 holds is split, in order, into several columns ("chunks").
    """

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$", max_length=100)] = DEFAULT_NAME
    """The name of this set among a dataset's sets of SIDs; its columns are named after it."""
    entity: Entity = "item"
    """The entity that has these SIDs: items, which also make up the history, or users."""
    quantizer: str
    """The kind of quantizer that made the digits, for information only."""
    levels: Annotated[int, Field(ge=1)]
    """Levels L of the scalar quantizer; level l has the value q_l = l - (L-1)/2. L=1: the digits of a codebook, whose
    codewords have no order; each is a "line" of one point."""
    lines: Annotated[int, Field(ge=1)] = 1
    """Lines K per layer; a digit is k * L + l."""
    digits: Annotated[int, Field(ge=1)]
    """Digits of the whole SID: depth * groups."""
    depth: Annotated[int, Field(ge=1)]
    """Number of residual layers."""
    groups: Annotated[int, Field(ge=1)]
    """Number of product groups, the blocks of the latent vector that are quantized independently."""
    order: Literal["depth_major"] = "depth_major"
    """Digit d * groups + p belongs to depth d and group p."""
    packing: Packing = "mixed_radix"
    """How digits are packed into ids; see `pack_digits`."""
    prefix_lengths: tuple[int, ...] = ()
    """The lengths, in digits, of the prefixes that are written as separate columns."""
    steps: tuple[float, ...] = ()
    """The step a of every digit, where a digit has one: the codeword's length is a times its level's value."""
    values: tuple[float, ...] = ()
    """The value of each level in steps, where it is not q_l: the centroids of the cells of a squashing bound."""
    bound: Bound = "clamp"
    """Treatment of values beyond the outermost level."""
    null: Literal["null"] = "null"
    """An item without any signal has a null SID; id 0 is a real code."""
    prefix: int | None = None
    """The number of leading digits this column holds; None: the whole SID."""
    chunk: int = 0
    """The index of this column among the columns that the digits are split into."""
    fingerprint: str
    """SHA-256 over codebook and weights of the encoder that began the generation. Equal ids mean equal codes only under
    equal fingerprints. An encoder refreshed with a frozen codebook keeps it (`encoder.refresh`)."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.radix < 2:
            raise ValueError(f"levels {self.levels} x lines {self.lines} must be at least 2 values a digit")
        if self.depth * self.groups != self.digits:
            raise ValueError(f"digits {self.digits} must be depth {self.depth} x groups {self.groups}")
        lengths = self.prefix_lengths
        if not prefixes_fit(lengths, self.digits):
            raise ValueError(f"prefix_lengths {lengths} must rise within 1..{self.digits}")
        if len(self.steps) not in (0, self.digits):
            raise ValueError(f"{len(self.steps)} steps given for {self.digits} digits")
        if len(self.values) not in (0, self.levels):
            raise ValueError(f"{len(self.values)} values given for {self.levels} levels")
        if self.prefix is not None and not 1 <= self.prefix <= self.digits:
            raise ValueError(f"prefix {self.prefix} must be in 1..{self.digits}")
        if not 0 <= self.chunk < len(self.chunk_sizes):
            raise ValueError(f"chunk {self.chunk} must be in 0..{len(self.chunk_sizes) - 1}")
        return self

    @property
    def event_base(self) -> str:
        """The stem of the events' columns for the advertised item, or the user: `item_sid`, `user_sid`."""
        return f"{self.entity}_{self.name}"

    @property
    def event_history_base(self) -> str:
        """The stem of the events' columns for the items in the history: `history_sids`."""
        assert self.entity == "item", "a history is of items"
        return f"history_{self.name}s"

    @property
    def event_bases(self) -> tuple[str, ...]:
        """The stems of all its columns in the events."""
        return (self.event_base, self.event_history_base) if self.entity == "item" else (self.event_base,)

    @property
    def radix(self) -> int:
        """Values a digit can take: lines * levels."""
        return self.lines * self.levels

    @property
    def centre(self) -> float:
        """The level with value 0, possibly half-way between two levels: (L-1)/2."""
        return (self.levels - 1) / 2

    @property
    def level_values(self) -> tuple[float, ...]:
        """The value of each level l in steps: `values` if set, else q_l = l - (L-1)/2."""
        return self.values or tuple(level - self.centre for level in range(self.levels))

    @property
    def held_digits(self) -> int:
        """The number of digits that this spec describes: the prefix, or all."""
        return self.prefix or self.digits

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """The number of digits in each of the columns that the held digits are split into."""
        limit = max_digits(self.radix, self.packing)
        full, rest = divmod(self.held_digits, limit)
        return (limit,) * full + ((rest,) if rest else ())

    def of_prefix(self, length: int) -> "SidSpec":
        """Return the spec of the columns that hold the first `length` digits.

        Raises:
            SpecError: `length` is outside 1..digits.
        """
        if not 1 <= length <= self.digits:
            raise SpecError(f"prefix length {length} must be in 1..{self.digits}")
        prefix = None if length == self.digits else length
        return self.model_copy(update={"prefix": prefix, "chunk": 0})

    def of_chunk(self, chunk: int) -> "SidSpec":
        """Return the spec of one of the columns that the held digits are split into."""
        assert 0 <= chunk < len(self.chunk_sizes)
        return self.model_copy(update={"chunk": chunk})

    def pack(self, digits_ND: Tensor) -> Tensor:
        """Pack the held digits into ids, chunk by chunk, with `pack_digits`.

        Args:
            digits_ND: integers in [0, radix), [N, held_digits].

        Returns:
            ids_NC: int64 [N, number of chunks].

        Raises:
            SpecError: wrong number of digits, or see `pack_digits`.
        """
        if digits_ND.shape[-1] != self.held_digits:
            raise SpecError(f"{digits_ND.shape[-1]} digits given, the spec has {self.held_digits}")
        parts = torch.split(digits_ND, list(self.chunk_sizes), dim=-1)
        return torch.stack([pack_digits(part, self.radix, self.packing) for part in parts], dim=-1)

    def unpack(self, ids_NC: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        """Undo `pack`.

        Args:
            ids_NC: int64 [N, number of chunks], without nulls.
            dtype: see `unpack_ids`.

        Returns:
            digits_ND: [N, held_digits] in [0, radix).

        Raises:
            SpecError: wrong number of chunks, or see `unpack_ids`.
        """
        self._require_chunks(ids_NC)
        columns = zip(ids_NC.unbind(-1), self.chunk_sizes, strict=True)
        parts = [unpack_ids(ids_N, self.radix, size, self.packing, dtype) for ids_N, size in columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def cut(self, ids_NC: Tensor, length: int) -> Tensor:
        """Shorten ids to their first digits, by one floor division (Eq. 5 packing: one modulo).

        Args:
            ids_NC: int64 [N, number of chunks], without nulls.
            length: digits to keep, 1..held_digits.

        Returns:
            int64 [N, chunks of the shorter SID], as `of_prefix(length)` describes.

        Raises:
            SpecError: wrong number of chunks, or `length` out of range.
        """
        self._require_chunks(ids_NC)
        if not 1 <= length <= self.held_digits:
            raise SpecError(f"prefix length {length} must be in 1..{self.held_digits}")
        kept = self.of_prefix(length).chunk_sizes
        last, size = kept[-1], self.chunk_sizes[len(kept) - 1]
        out_NC = ids_NC[..., : len(kept)].clone()
        if self.packing == "paper_eq5":
            # The shortened chunk keeps its low powers. A full chunk is left alone, because its modulus
            # would have one digit more than int64 holds.
            if last < size:
                out_NC[..., -1] %= self.radix ** (last + 1)
        else:
            out_NC[..., -1] //= self.radix ** (size - last)
        return out_NC

    def _require_chunks(self, ids_NC: Tensor) -> None:
        if ids_NC.dtype != torch.int64 or ids_NC.shape[-1] != len(self.chunk_sizes):
            raise SpecError(
                f"ids are {ids_NC.dtype} in {ids_NC.shape[-1]} columns; the spec has int64 in {len(self.chunk_sizes)}"
            )
