"""SIDE: a Semantic ID becomes an embedding without an embedding table (SIDE paper, sections 3.3 and 5).

The id is unpacked by division into the digits it was summed from, each digit becomes what it stands for, and a learned
matrix takes that to the model's width. Nothing that is learned is looked up: the cost is t x d weights, whatever the
number of ids.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoder.sid.lookup import LOOKUP_ROWS, DigitLookup
from encoder.sid.spec import SidSpec
from infra.errors import SpecError


class SidUnpack(nn.Module):
    """Unpack SIDs of one line a layer into their latent codes h (the paper's Eq. 5 undone); it has no weights.

    Digit g becomes what its level stands for, g - (L-1)/2 or a centroid under a squashing bound, times its step
    when the codebook has steps and they are asked for, so that the code is the encoder's own up to the directions
    and a common factor: steps are taken over their mean, since the latent's unit is an accident of the encoder's
    training and would set how loudly content enters the ranker.

    Args of the constructor:
        spec: the SIDs' spec, with one line a layer. scale_steps: multiply by the recorded steps.
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
        """Unpack.

        Args:
            sids_NC: int64 ids [N, C], C columns a SID (one unless it does not fit an int64).
            known_N: bool; False where the SID is null, whatever id stands there.

        Returns:
            h_Nt: float32 [N, t], zeros where the SID is null.
        """
        parts = [unpack(ids_N, known_N) for unpack, ids_N in zip(self.columns, sids_NC.unbind(1), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class CodewordUnpack(nn.Module):
    """Unpack SIDs of several lines a layer into the latent vectors they stand for, by the encoder's frozen codebook.

    Values of such a digit have no order, so the digit alone says nothing: its codeword does. The codebook is a
    constant of digits x radix rows, as small for a billion items as for ten. Codewords are taken over their mean
    length (root mean square over a digit's values, mean over digits), for the reason that steps are.

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
    """Return what unpacks a set of SIDs.

    Args:
        spec: the SIDs' spec. scale_steps: see `SidUnpack`.
        codebooks: by the SIDs' name; needed where a layer has several lines.
    """
    return SidUnpack(spec, scale_steps) if spec.lines == 1 else CodewordUnpack(spec, codebooks[spec.name])
