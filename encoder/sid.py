"""The Semantic ID: what its digits are, how they become int64 ids, and how a column says so.

This is the contract between the encoder, which writes SID columns, and the ranker, which reads
them; it imports no other module of the encoder. A SID is a row of n digits, each in [0, radix),
depth-major (all groups of the coarsest depth first), so that a prefix is a coarser code. Ids are
summed in int64 from integer digits, never from floats, which are exact only up to 24 bits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import pyarrow as pa
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from infra.config import Config
from infra.errors import SpecError

Packing = Literal["mixed_radix", "paper_eq5"]
Bound = Literal["clamp", "tanh", "ifsq"]

METADATA_KEY = b"sidestack.sid"
ITEM_BASE = "sid"
EVENT_ITEM_BASE = "item_sid"
EVENT_HISTORY_BASE = "history_sids"

_INT64_VALUES = 2**63  # ids are never negative


def max_digits(radix: int, packing: Packing = "mixed_radix") -> int:
    """Count the digits that one int64 column holds, by exact integer arithmetic.

    Args:
        radix: values a digit can take (levels, times lines where K > 1), at least 2.
        packing: `paper_eq5` starts at radix^1, which costs one digit.
    """
    digits, values = 0, radix if packing == "paper_eq5" else 1
    while values * radix <= _INT64_VALUES:
        digits, values = digits + 1, values * radix
    return digits


def pack_digits(digits_ND: Tensor, radix: int, packing: Packing = "mixed_radix") -> Tensor:
    """Sum digits into one int64 id a row.

    Args:
        digits_ND: integers in [0, radix), [N, D], the coarsest digit first.
        radix: values a digit can take.
        packing: `mixed_radix`: sum of g_i * radix^(D-1-i), the first digit most significant.
            `paper_eq5`: paper Eq. 5, sum of g_k * radix^k for k = 1..D, as printed.

    Returns:
        ids_N: int64 [N].

    Raises:
        SpecError: digits are not integers or outside [0, radix), or do not fit int64.
    """
    num_digits = digits_ND.shape[-1]
    _require_fit(num_digits, radix, packing)
    if digits_ND.is_floating_point() or digits_ND.is_complex():
        raise SpecError(f"digits are {digits_ND.dtype}; ids are summed from integer digits only")
    digits_ND = digits_ND.to(torch.int64)
    if digits_ND.numel():
        low, high = int(digits_ND.min()), int(digits_ND.max())
        if low < 0 or high >= radix:
            raise SpecError(f"digit {low if low < 0 else high} is outside [0, {radix})")
    weights_D = torch.tensor(_weights(num_digits, radix, packing), device=digits_ND.device)
    return (digits_ND * weights_D).sum(-1)


def unpack_ids(ids_N: Tensor, radix: int, num_digits: int, packing: Packing = "mixed_radix") -> Tensor:
    """Undo `pack_digits` by floor division and modulo (paper section 3.3).

    Args:
        ids_N: int64, any shape [...].
        radix: values a digit can take.
        num_digits: digits an id holds.
        packing: as packed.

    Returns:
        digits_ND: int64 [..., num_digits], in [0, radix).

    Raises:
        SpecError: the digits do not fit int64, or an id is outside what they can spell.
    """
    _require_fit(num_digits, radix, packing)
    first = 1 if packing == "paper_eq5" else 0
    if ids_N.numel():
        low, high = int(ids_N.min()), int(ids_N.max())
        if low < 0 or high >= radix ** (num_digits + first):
            wrong = low if low < 0 else high
            raise SpecError(f"id {wrong} is no SID of {num_digits} digits with {radix} values each")
    digits_ND = torch.empty((*ids_N.shape, num_digits), dtype=torch.int64, device=ids_N.device)
    rest_N = ids_N // radix if packing == "paper_eq5" else ids_N
    order = range(num_digits) if packing == "paper_eq5" else range(num_digits - 1, -1, -1)
    for i in order:
        above_N = rest_N // radix
        torch.sub(rest_N, above_N * radix, out=digits_ND[..., i])
        rest_N = above_N
    return digits_ND


def _require_fit(num_digits: int, radix: int, packing: Packing) -> None:
    limit = max_digits(radix, packing)
    if not 1 <= num_digits <= limit:
        raise SpecError(f"{num_digits} digits of {radix} values: one int64 column holds 1 to {limit} ({packing})")


def _weights(num_digits: int, radix: int, packing: Packing) -> list[int]:
    if packing == "paper_eq5":
        return [radix**k for k in range(1, num_digits + 1)]
    return [radix ** (num_digits - 1 - i) for i in range(num_digits)]


class SidSpec(Config):
    """What the ids in a SID column mean; it travels in the metadata of every such column.

    A SID with more digits than int64 holds is split, in order, into several columns ("chunks").
    """

    quantizer: str
    """The kind of quantizer that made the digits, for people."""
    levels: Annotated[int, Field(ge=2)]
    """Levels L of the scalar quantizer; level l stands for q_l = l - (L-1)/2."""
    lines: Annotated[int, Field(ge=1)] = 1
    """Lines K of a layer; a digit is k * L + l."""
    digits: Annotated[int, Field(ge=1)]
    """Digits of the whole SID: depth * groups."""
    depth: Annotated[int, Field(ge=1)]
    """Residual layers."""
    groups: Annotated[int, Field(ge=1)]
    """Product groups, the blocks of the latent vector that are quantized beside each other."""
    order: Literal["depth_major"] = "depth_major"
    """Digit d * groups + p belongs to depth d and group p."""
    packing: Packing = "mixed_radix"
    """How digits are summed into ids; see `pack_digits`."""
    prefix_lengths: tuple[int, ...] = ()
    """The prefixes, in digits, that are written as columns of their own."""
    steps: tuple[float, ...] = ()
    """The step a of every digit, where a digit has one: the codeword's length is a * q_l."""
    bound: Bound = "clamp"
    """How values beyond the outermost level were brought in."""
    null: Literal["null"] = "null"
    """An item without any signal has a null SID; id 0 is a real code."""
    prefix: int | None = None
    """The number of leading digits this column holds; None: the whole SID."""
    chunk: int = 0
    """The number of this column among those its digits are split into."""
    fingerprint: str
    """SHA-256 over codebook and encoder weights: equal ids mean equal codes only under one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.depth * self.groups != self.digits:
            raise ValueError(f"digits {self.digits} must be depth {self.depth} x groups {self.groups}")
        lengths = self.prefix_lengths
        if list(lengths) != sorted(set(lengths)) or any(not 1 <= p <= self.digits for p in lengths):
            raise ValueError(f"prefix_lengths {lengths} must rise within 1..{self.digits}")
        if len(self.steps) not in (0, self.digits):
            raise ValueError(f"{len(self.steps)} steps given for {self.digits} digits")
        if self.prefix is not None and not 1 <= self.prefix <= self.digits:
            raise ValueError(f"prefix {self.prefix} must be in 1..{self.digits}")
        if not 0 <= self.chunk < len(self.chunk_sizes):
            raise ValueError(f"chunk {self.chunk} must be in 0..{len(self.chunk_sizes) - 1}")
        return self

    @property
    def radix(self) -> int:
        """Values a digit can take: lines * levels."""
        return self.lines * self.levels

    @property
    def centre(self) -> float:
        """The level, possibly half-way between two, that stands for 0: (L-1)/2."""
        return (self.levels - 1) / 2

    @property
    def held_digits(self) -> int:
        """Digits of the SID this spec is about: the prefix, or all."""
        return self.prefix or self.digits

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Digits in each of the columns that the held digits are split into."""
        limit = max_digits(self.radix, self.packing)
        full, rest = divmod(self.held_digits, limit)
        return (limit,) * full + ((rest,) if rest else ())

    def of_prefix(self, length: int) -> "SidSpec":
        """Give the spec of the columns that hold the first `length` digits.

        Raises:
            SpecError: `length` is outside 1..digits.
        """
        if not 1 <= length <= self.digits:
            raise SpecError(f"prefix length {length} must be in 1..{self.digits}")
        prefix = None if length == self.digits else length
        return self.model_copy(update={"prefix": prefix, "chunk": 0})

    def of_chunk(self, chunk: int) -> "SidSpec":
        """Give the spec of one of the columns that the held digits are split into."""
        assert 0 <= chunk < len(self.chunk_sizes)
        return self.model_copy(update={"chunk": chunk})

    def pack(self, digits_ND: Tensor) -> Tensor:
        """Sum the held digits into ids, by `pack_digits` chunk by chunk.

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

    def unpack(self, ids_NC: Tensor) -> Tensor:
        """Undo `pack`.

        Args:
            ids_NC: int64 [N, number of chunks], without nulls.

        Returns:
            digits_ND: int64 [N, held_digits] in [0, radix).

        Raises:
            SpecError: wrong number of chunks, or see `unpack_ids`.
        """
        self._require_chunks(ids_NC)
        columns = zip(ids_NC.unbind(-1), self.chunk_sizes, strict=True)
        parts = [unpack_ids(ids_N, self.radix, size, self.packing) for ids_N, size in columns]
        return torch.cat(parts, dim=-1)

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
            # The shortened chunk keeps its low powers; a full one is left alone, for its modulus
            # would be one digit more than int64 holds.
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


def sid_columns(base: str, spec: SidSpec) -> dict[str, SidSpec]:
    """Name the columns that hold the digits of `spec`, one a chunk: `base`, `base_1`, ...

    A prefix's columns are named `base_prefix_<p>`, `base_prefix_<p>_1`, ...

    Returns:
        column name -> the spec that its metadata must carry.
    """
    stem = base if spec.prefix is None else f"{base}_prefix_{spec.prefix}"
    chunks = range(len(spec.chunk_sizes))
    return {f"{stem}_{c}" if c else stem: spec.of_chunk(c) for c in chunks}


def item_columns(spec: SidSpec) -> dict[str, SidSpec]:
    """Give all SID columns of the items table: name -> the spec in its metadata."""
    return sid_columns(ITEM_BASE, spec)


def event_columns(spec: SidSpec) -> dict[str, SidSpec]:
    """Give all SID columns of the events tables, prefixes included: name -> its spec."""
    shorter = [spec.of_prefix(p) for p in spec.prefix_lengths if p < spec.digits]
    columns: dict[str, SidSpec] = {}
    for base in (EVENT_ITEM_BASE, EVENT_HISTORY_BASE):
        for held in (spec, *shorter):
            columns |= sid_columns(base, held)
    return columns


def with_sid_metadata(field: pa.Field, spec: SidSpec) -> pa.Field:
    """Write the spec into a field's metadata, beside what is there."""
    metadata: Mapping[bytes, bytes] = field.metadata or {}
    return field.with_metadata({**metadata, METADATA_KEY: spec.model_dump_json().encode()})


def read_sid_spec(field: pa.Field) -> SidSpec:
    """Read the spec from a field's metadata.

    Raises:
        SpecError: the field carries none, or not one of ours.
    """
    text = (field.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise SpecError(f"column {field.name!r} carries no SID spec ({METADATA_KEY.decode()})")
    try:
        return SidSpec.model_validate_json(text)
    except ValidationError as error:
        raise SpecError(f"column {field.name!r}: its SID spec is not valid: {error}") from error


def require_spec(schema: pa.Schema, column: str, expected: SidSpec, path: Path) -> None:
    """Check that a file's SID column is of the spec and codebook that was asked for.

    Args:
        schema: the file's Arrow schema. column: the SID column's name.
        expected: the spec of exactly this column, as `item_columns` or `event_columns` gives it.
        path: the file, for the message.

    Raises:
        SpecError: names file, column, both fingerprints and what differs.
    """
    if column not in schema.names:
        raise SpecError(f"{path}: SID column {column!r} is missing; the file has {schema.names}")
    try:
        found = read_sid_spec(schema.field(column))
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    ours, theirs = expected.model_dump(), found.model_dump()
    differing = [f"{k}: {theirs[k]!r}, not {ours[k]!r}" for k in ours if ours[k] != theirs[k]]
    if differing:
        raise SpecError(
            f"{path}: column {column!r} has SIDs of fingerprint {found.fingerprint[:16]}…, the one"
            f" asked for is {expected.fingerprint[:16]}…; " + "; ".join(differing)
        )
