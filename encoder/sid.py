"""The Semantic ID: what its digits are, how they become int64 ids, and how a column says so.

This is the contract between the encoder, which writes SID columns, and the ranker, which reads
them; it imports no other module of the encoder. A SID is a row of n digits, each in [0, radix),
depth-major (all groups of the coarsest depth first), so that a prefix is a coarser code. Ids are
summed in int64 from integer digits, never from floats, which are exact only up to 24 bits.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from infra.config import VERSION, Config, parse_written
from infra.errors import SpecError
from infra.tables import Entity

Packing = Literal["mixed_radix", "paper_eq5"]
Bound = Literal["clamp", "tanh", "ifsq"]
Ids = TypeVar("Ids", Tensor, npt.NDArray[np.int64])

METADATA_KEY = b"sidestack.sid"
_VERSION_KEY = b"sidestack.version"
DEFAULT_NAME = "sid"
"""The name of the SIDs of a run's one encoder; others may stand beside them, each set under a name of its own."""

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
        low, high = (int(bound) for bound in torch.aminmax(digits_ND))
        if low < 0 or high >= radix:
            raise SpecError(f"digit {low if low < 0 else high} is outside [0, {radix})")
    weights_D = torch.tensor(_weights(num_digits, radix, packing), device=digits_ND.device)
    return (digits_ND * weights_D).sum(-1)


def unpack_ids(
    ids_N: Tensor, radix: int, num_digits: int, packing: Packing = "mixed_radix", dtype: torch.dtype = torch.int64
) -> Tensor:
    """Undo `pack_digits`: floor division and modulo (paper section 3.3), by look-up where the radix allows it.

    Args:
        ids_N: int64, any shape [...].
        radix: values a digit can take.
        num_digits: digits an id holds.
        packing: as packed.
        dtype: what to give the digits in; a byte a digit (torch.uint8) is the fastest to write.

    Returns:
        digits_ND: [..., num_digits], in [0, radix).

    Raises:
        SpecError: the digits do not fit int64, or an id is outside what they can spell.
    """
    _require_fit(num_digits, radix, packing)
    first = 1 if packing == "paper_eq5" else 0
    if ids_N.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids_N))
        if low < 0 or high >= radix ** (num_digits + first):
            wrong = low if low < 0 else high
            raise SpecError(f"id {wrong} is no SID of {num_digits} digits with {radix} values each")
    if radix > LOOKUP_ROWS:
        numbers_ND = ids_N.new_empty((*ids_N.shape, num_digits))
        _cut_into(numbers_ND, ids_N // radix**first, radix, packing)
        return numbers_ND.to(dtype)
    digits_ND: Tensor = _digit_lookup(radix, num_digits, packing, dtype, ids_N.device)(ids_N)
    return digits_ND


LOOKUP_ROWS = 1 << 13
"""The most numbers whose digits a look-up table holds: 6,561 of 8 ternary digits are 210 kB in float32, which stay in
a core's second cache."""
_IDS_AT_A_TIME = 1 << 14
"""Ids unpacked at a time on a CPU, so that what lies between two steps stays in the cache too."""


class DigitLookup(nn.Module):
    """What every digit of an id stands for, several digits by one look-up; it has no weights.

    An id is cut by division into numbers of k digits each, and row r of a table holds what the k digits of r stand
    for. k is a power of two: rows of 8 to 64 bytes are copied in one move. An id's last or first number may have
    digits to spare; their columns are left out of the result, which is then a view.

    Args of the constructor:
        values_DR: what value r of digit i stands for, any dtype, [num_digits, radix]; radix at most `LOOKUP_ROWS`.
        packing: how the digits are summed into ids; they must fit one int64.
    """

    table_Tk: Tensor

    def __init__(self, values_DR: Tensor, packing: Packing) -> None:
        super().__init__()
        self.num_digits, self.radix = values_DR.shape
        self.packing = packing
        self.width = max(k for k in (1, 2, 4, 8) if self.radix**k <= LOOKUP_ROWS)
        self.numbers = -(-self.num_digits // self.width)
        self.rows = self.radix**self.width
        # Constants, not state: they are made again from the spec and stay out of checkpoints.
        self.register_buffer("table_Tk", self._table(values_DR), persistent=False)

    def forward(self, ids_N: Tensor, known_N: Tensor | None = None) -> Tensor:
        """Unpack.

        Args:
            ids_N: int64, any shape [...], each in the range that the digits can spell where it is known.
            known_N: bool [...]; where False the result is zeros, whatever the id. None: all are known.

        Returns:
            [..., num_digits], in the values' dtype.
        """
        shape = (*ids_N.shape, self.numbers * self.width)
        first = 0 if self.packing == "paper_eq5" else shape[-1] - self.num_digits
        gather = self._gather_by_blocks if ids_N.device.type == "cpu" else self._gather
        out = gather(ids_N.reshape(-1), None if known_N is None else known_N.reshape(-1))
        return out.view(shape)[..., first : first + self.num_digits]

    def _gather(self, ids_N: Tensor, known_N: Tensor | None) -> Tensor:
        rows_NC = ids_N.new_empty(len(ids_N), self.numbers)
        _cut_into(rows_NC, self._whole(ids_N), self.rows, self.packing, apart=True)
        if known_N is not None:
            rows_NC.masked_fill_(~known_N[:, None], len(self.table_Tk) - 1)
        return self.table_Tk.index_select(0, rows_NC.view(-1))

    def _gather_by_blocks(self, ids_N: Tensor, known_N: Tensor | None) -> Tensor:
        """Do the same with numpy, whose division and copies of short rows are three times as fast on a CPU."""
        out_NCk = self.table_Tk.new_empty(len(ids_N), self.numbers, self.width)
        table_Tk, out, ids = self.table_Tk.numpy(), out_NCk.numpy(), ids_N.numpy()
        known = None if known_N is None else known_N.numpy()
        rows_BC = np.empty((min(len(ids), _IDS_AT_A_TIME), self.numbers), np.int64)
        for start in range(0, len(ids), _IDS_AT_A_TIME):
            block = slice(start, min(start + _IDS_AT_A_TIME, len(ids)))
            part_BC = rows_BC[: block.stop - start]
            _cut_into(part_BC, self._whole(ids[block]), self.rows, self.packing, apart=True)
            if known is not None:
                part_BC[np.flatnonzero(~known[block])] = len(table_Tk) - 1
            # `clip` needs no buffer between table and result; nothing is clipped but what an unknown id may hold.
            np.take(table_Tk, part_BC, axis=0, out=out[block], mode="clip")
        return out_NCk

    def _whole(self, ids_N: Ids) -> Ids:
        return ids_N // self.radix if self.packing == "paper_eq5" else ids_N

    def _table(self, values_DR: Tensor) -> Tensor:
        """Return a block of rows for each of an id's numbers, and a last row of zeros for ids that are not known."""
        spare = self.numbers * self.width - self.num_digits
        pad = (0, 0, 0, spare) if self.packing == "paper_eq5" else (0, 0, spare, 0)
        values_CkR = functional.pad(values_DR, pad).view(self.numbers, self.width, self.radix)
        digits_Rk = values_DR.new_empty(self.rows, self.width, dtype=torch.int64)
        _cut_into(digits_Rk, torch.arange(self.rows), self.radix, self.packing)
        table_CRk = torch.stack([values_CkR[:, i, digits_Rk[:, i]] for i in range(self.width)], dim=-1)
        return functional.pad(table_CRk.flatten(0, 1), (0, 0, 0, 1))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # the first to ask may be in inference, the next in training
def _digit_lookup(
    radix: int, num_digits: int, packing: Packing, dtype: torch.dtype, device: torch.device
) -> DigitLookup:
    return DigitLookup(torch.arange(radix, dtype=dtype).expand(num_digits, -1), packing).to(device)


def _cut_into(numbers_NC: Ids, ids_N: Ids, size: int, packing: Packing, apart: bool = False) -> None:
    """Cut ids into numbers in [0, size), each from the quotient of the one before; arrays and tensors alike.

    Args:
        numbers_NC: where they go, [..., C]; the most significant first, or last under `paper_eq5`.
        ids_N: [...], below size**C. size: one more than the largest number.
        packing: the digits' order. apart: add i * size to number i, so that no two have a value in common.
    """
    count = numbers_NC.shape[-1]
    places = range(count) if packing == "paper_eq5" else range(count - 1, -1, -1)
    rest_N = ids_N
    for place in places:
        start = place if apart else 0
        if place == places[-1]:
            numbers_NC[..., place] = rest_N + start * size
        else:
            above_N = rest_N // size
            numbers_NC[..., place] = rest_N - (above_N - start) * size
            rest_N = above_N


def _require_fit(num_digits: int, radix: int, packing: Packing) -> None:
    limit = max_digits(radix, packing)
    if not 1 <= num_digits <= limit:
        raise SpecError(f"{num_digits} digits of {radix} values: one int64 column holds 1 to {limit} ({packing})")


def _weights(num_digits: int, radix: int, packing: Packing) -> list[int]:
    if packing == "paper_eq5":
        return [radix**k for k in range(1, num_digits + 1)]
    return [radix ** (num_digits - 1 - i) for i in range(num_digits)]


def prefixes_fit(lengths: Sequence[int], digits: int) -> bool:
    """Tell whether lengths of prefixes rise within 1..digits."""
    return list(lengths) == sorted(set(lengths)) and all(1 <= length <= digits for length in lengths)


class SidSpec(Config):
    """What the ids in a SID column mean; it travels in the metadata of every such column.

    A SID with more digits than int64 holds is split, in order, into several columns ("chunks").
    """

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$", max_length=100)] = DEFAULT_NAME
    """The name of this set of SIDs among those of a dataset, which its columns are named after."""
    entity: Entity = "item"
    """Whose SIDs they are: the items', which the history has, too, or the users'."""
    quantizer: str
    """The kind of quantizer that made the digits, for people."""
    levels: Annotated[int, Field(ge=1)]
    """Levels L of the scalar quantizer; level l stands for q_l = l - (L-1)/2. L=1: codewords without order, a
    codebook's digits, each a "line" of one point."""
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
    """The step a of every digit, where a digit has one: the codeword's length is a times its level's value."""
    values: tuple[float, ...] = ()
    """What each level stands for in steps, where that is not q_l: the centroids of cells that a bound has squashed."""
    bound: Bound = "clamp"
    """How values beyond the outermost level were brought in."""
    null: Literal["null"] = "null"
    """An item without any signal has a null SID; id 0 is a real code."""
    prefix: int | None = None
    """The number of leading digits this column holds; None: the whole SID."""
    chunk: int = 0
    """The number of this column among those its digits are split into."""
    fingerprint: str
    """SHA-256 over codebook and weights of the encoder that began the generation: equal ids mean equal codes only under
    one. An encoder that was refreshed with the codebook frozen keeps it (`encoder.refresh`)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
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
        """The level, possibly half-way between two, that stands for 0: (L-1)/2."""
        return (self.levels - 1) / 2

    @property
    def level_values(self) -> tuple[float, ...]:
        """What level l stands for in steps: q_l = l - (L-1)/2, unless the spec says otherwise."""
        return self.values or tuple(level - self.centre for level in range(self.levels))

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


def content_columns(spec: SidSpec) -> dict[str, SidSpec]:
    """Return all SID columns of the items table, or of the users': name -> the spec in its metadata."""
    return sid_columns(spec.name, spec)


def event_columns(spec: SidSpec) -> dict[str, SidSpec]:
    """Return all SID columns of the events tables, prefixes included: name -> its spec."""
    return {name: held for base in spec.event_bases for name, held in position_columns(base, spec).items()}


def position_columns(base: str, spec: SidSpec) -> dict[str, SidSpec]:
    """Return the SID columns of one position in the events tables, by its stem, likewise."""
    shorter = [spec.of_prefix(p) for p in spec.prefix_lengths if p < spec.digits]
    return {name: part for held in (spec, *shorter) for name, part in sid_columns(base, held).items()}


def with_sid_metadata(field: pa.Field, spec: SidSpec) -> pa.Field:
    """Write the spec, and the version of sidestack that writes it, into a field's metadata, beside what is there."""
    metadata: Mapping[bytes, bytes] = field.metadata or {}
    written = {METADATA_KEY: spec.model_dump_json().encode(), _VERSION_KEY: VERSION.encode()}
    return field.with_metadata({**metadata, **written})


def read_sid_spec(field: pa.Field) -> SidSpec:
    """Read the spec from a field's metadata; what an older version did not write has its default.

    Raises:
        SpecError: the field carries none, or one that cannot be read; names the version that wrote it and the one that
            reads it.
    """
    metadata: Mapping[bytes, bytes] = field.metadata or {}
    if METADATA_KEY not in metadata:
        raise SpecError(f"column {field.name!r} carries no SID spec ({METADATA_KEY.decode()})")
    version = metadata.get(_VERSION_KEY, b"").decode()
    try:
        return parse_written(SidSpec, json.loads(metadata[METADATA_KEY]), "spec", version)
    except ValueError as error:
        raise SpecError(f"column {field.name!r}: its SID spec is not valid: {error}") from error


def require_spec(schema: pa.Schema, column: str, expected: SidSpec, path: Path) -> None:
    """Check that a file's SID column is of the spec and codebook that was asked for.

    Args:
        schema: the file's Arrow schema. column: the SID column's name.
        expected: the spec of exactly this column, as `content_columns` or `event_columns` gives it.
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
