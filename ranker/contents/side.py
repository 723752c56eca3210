"""SIDE: a Semantic ID becomes an embedding without an embedding table (SIDE paper, sections 3.3 and 5).

The id is unpacked by division into its digits, each digit is mapped to its value, and a learned matrix maps the values
to the model's width. No learned weight is looked up: the cost is t x d weights, whatever the number of ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidestack.encoder.sid.columns import sid_columns
from sidestack.encoder.sid.lookup import LOOKUP_ROWS, DigitLookup
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.errors import SpecError
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.contents.contract import Color, Content, Latent, Place


@dataclass(frozen=True)
class Side(Content):
    """Semantic IDs, unpacked without a table.

    Attributes:
        held: for each set the unpacked part, the whole SID or a prefix; `columns` are those of `held`, set after set,
            several per set if its SIDs do not fit one int64.
        scale_steps: whether digits are multiplied by the codebook's steps.
    """

    takes_sids = True
    color = Color("#0072b2", "#5cb3f0")

    held: tuple[SidSpec, ...] = ()
    scale_steps: bool = True

    @classmethod
    def at(cls, place: Place) -> Self:
        """Return content that reads the SIDs, or the prefixes that the arm names."""
        taken = place.own_sids()
        held = tuple(_unpacked_part(place, sid) for sid in taken)
        columns = [tuple(sid_columns(place.stem(sid), sid)) for sid in held]
        return cls(
            place.position,
            taken,
            columns=tuple(name for names in columns for name in names),
            known=tuple(names[0] for names in columns),
            held=held,
            scale_steps=place.arm.scale_steps,
        )

    @property
    def codebooks(self) -> tuple[SidSpec, ...]:
        """The sets with several lines per layer."""
        return tuple(sid for sid in self.sids if sid.lines > 1)

    def latent(self, constants: ModelConstants) -> "Unpacked":
        """Return the module that unpacks all sets."""
        return Unpacked(self.held, self.scale_steps, constants.codebooks)


def _unpacked_part(place: Place, sid: SidSpec) -> SidSpec:
    """Return the unpacked part of a set: the whole SID, or the one prefix that the arm names."""
    lengths = place.arm.prefix_lengths or (sid.digits,)
    if len(lengths) > 1:
        raise SpecError(f"arm content {place.kind!r}: prefix_lengths={list(lengths)}; it unpacks one id, of one length")
    return place.prefix(sid, lengths[0])


class Unpacked(Latent):
    """The latent vectors of one or more sets of SIDs, concatenated; it has no weights.

    Args of the constructor:
        held: the unpacked part of each set. scale_steps: see `SidUnpack`. codebooks: see `sid_unpack`.
    """

    def __init__(self, held: tuple[SidSpec, ...], scale_steps: bool, codebooks: Mapping[str, Tensor]) -> None:
        super().__init__()
        sets = [sid_unpack(sid, scale_steps, codebooks) for sid in held]
        self.sets = nn.ModuleList(sets)
        self.sizes = [len(sid.chunk_sizes) for sid in held]
        self.width = sum(one.width for one in sets)

    def forward(self, sids_NC: Tensor, known_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent vectors [N, width], zeros for a null SID, and bool [N]: whether there is any SID.

        Args:
            sids_NC: int64, the columns of all sets. known_NS: bool, whether the SID of each set is known.
        """
        columns = zip(self.sets, torch.split(sids_NC, self.sizes, dim=1), known_NS.unbind(1), strict=True)
        parts = [unpack(part_NC, known_N) for unpack, part_NC, known_N in columns]
        return torch.cat(parts, dim=1) if parts[1:] else parts[0], known_NS.any(1)


class SidUnpack(nn.Module):
    """The latent codes h of SIDs with one line per layer (the inverse of the paper's Eq. 5); it has no weights.

    Digit g becomes its level's value: g - (L-1)/2, or a centroid under a squashing bound. With `scale_steps`, the value
    is multiplied by the codebook's step, if any. The code then equals the encoder's own up to the directions and a
    common factor. Steps are divided by their mean: the latent's unit is an accident of the encoder's training, and
    would otherwise set the scale of content in the ranker.

    Args of the constructor:
        spec: the SIDs' spec, with one line per layer. scale_steps: multiply by the recorded steps.
    """

    def __init__(self, spec: SidSpec, scale_steps: bool) -> None:
        super().__init__()
        assert spec.lines == 1
        self.width = spec.held_digits
        scale = spec.steps if scale_steps and spec.steps else (1.0,) * spec.digits
        scale_t = torch.tensor(scale, dtype=torch.float32)
        scale_t = (scale_t / scale_t.mean())[: spec.held_digits]
        values_tL = torch.tensor(spec.level_values, dtype=torch.float32) * scale_t[:, None]
        self.columns = _lookups(values_tL, spec)

    def forward(self, sids_NC: Tensor, known_N: Tensor) -> Tensor:
        """Return the latent codes.

        Args:
            sids_NC: int64 ids [N, C], C columns per SID (one unless it does not fit an int64).
            known_N: bool; False where the SID is null, whatever the id.

        Returns:
            h_Nt: float32 [N, t], zeros where the SID is null.
        """
        parts = [unpack(ids_N, known_N) for unpack, ids_N in zip(self.columns, sids_NC.unbind(1), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class CodewordUnpack(nn.Module):
    """The latent vectors of SIDs with several lines per layer, from the encoder's frozen codebook.

    Values of such a digit have no order, so a digit is replaced by its codeword. The codebook is a constant of digits x
    radix rows, as small for a billion items as for ten. Codewords are divided by their mean length (root mean square
    over a digit's values, mean over digits), for the same reason as steps in `SidUnpack`.

    Args of the constructor:
        spec: the SIDs' spec. codewords_DRH: float32 [digits, radix, latent_dim]; see `encoder.sid_codebook`.

    Raises:
        SpecError: a digit can take more than `LOOKUP_ROWS` values.
    """

    codewords_MH: Tensor

    def __init__(self, spec: SidSpec, codewords_DRH: Tensor) -> None:
        super().__init__()
        if spec.radix > LOOKUP_ROWS:
            raise SpecError(f"arm content 'side': {spec.radix} values a digit; it unpacks up to {LOOKUP_ROWS}")
        digits, radix, self.width = codewords_DRH.shape
        rows_DR = torch.arange(digits * radix).view(digits, radix)
        self.columns = _lookups(rows_DR, spec)
        length = codewords_DRH.square().sum(-1).mean(-1).sqrt().mean()
        self.register_buffer("codewords_MH", (codewords_DRH / length).flatten(0, 1), persistent=False)

    def forward(self, sids_NC: Tensor, known_N: Tensor) -> Tensor:
        """Return float32 [N, latent_dim], zeros where the SID is null; for the arguments see `SidUnpack.forward`."""
        rows = [unpack(ids_N, known_N) for unpack, ids_N in zip(self.columns, sids_NC.unbind(1), strict=True)]
        latent_NH = functional.embedding_bag(torch.cat(rows, dim=1), self.codewords_MH, mode="sum")
        return latent_NH * known_N.unsqueeze(1)


def _lookups(values_DR: Tensor, spec: SidSpec) -> nn.ModuleList:
    parts = torch.split(values_DR[: spec.held_digits], list(spec.chunk_sizes))
    return nn.ModuleList(DigitLookup(part_DR, spec.packing) for part_DR in parts)


def sid_unpack(spec: SidSpec, scale_steps: bool, codebooks: Mapping[str, Tensor]) -> SidUnpack | CodewordUnpack:
    """Return the module that unpacks a set of SIDs.

    Args:
        spec: the SIDs' spec. scale_steps: see `SidUnpack`.
        codebooks: by the SIDs' name; needed if a layer has several lines.
    """
    return SidUnpack(spec, scale_steps) if spec.lines == 1 else CodewordUnpack(spec, codebooks[spec.name])
