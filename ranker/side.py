"""SIDE: a Semantic ID becomes an embedding without an embedding table (SIDE paper, sections 3.3 and 5).

The id is unpacked by division into the digits it was summed from, the digits are centred, and a learned matrix takes
them to the model's width. Nothing that is learned is looked up: the cost is t x d weights, whatever the number of ids.
"""

import torch
from torch import Tensor, nn

from encoder.sid import DigitLookup, SidSpec


class SidUnpack(nn.Module):
    """Unpack SIDs into their latent codes h (the paper's Eq. 5 undone); it has no weights.

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
        self.num_digits = spec.held_digits
        scale = spec.steps if scale_steps and spec.steps else (1.0,) * spec.digits
        scale_t = torch.tensor(scale, dtype=torch.float32)
        scale_t = (scale_t / scale_t.mean())[: spec.held_digits]
        values_tL = torch.tensor(spec.level_values, dtype=torch.float32) * scale_t[:, None]
        parts = torch.split(values_tL, list(spec.chunk_sizes))
        self.columns = nn.ModuleList(DigitLookup(part_tL, spec.packing) for part_tL in parts)

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


class Side(nn.Module):
    """Unpack SIDs and project them: e = h Omega (section 5), without a bias, so that a null SID gives zeros.

    Args of the constructor:
        spec, scale_steps: see `SidUnpack`. dim: the model's width d.
    """

    def __init__(self, spec: SidSpec, scale_steps: bool, dim: int) -> None:
        super().__init__()
        self.unpack = SidUnpack(spec, scale_steps)
        self.omega = nn.Parameter(torch.empty(self.unpack.num_digits, dim))

    def forward(self, sids_NC: Tensor, known_N: Tensor) -> Tensor:
        """Give float32 [N, d], zeros where the SID is null; for the arguments see `SidUnpack.forward`."""
        h_Nt: Tensor = self.unpack(sids_NC, known_N)
        return h_Nt @ self.omega
