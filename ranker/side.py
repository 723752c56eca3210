"""SIDE: a Semantic ID becomes an embedding without a table (SIDE paper, sections 3.3 and 5).

The id is unpacked by floor division and modulo into the digits it was summed from, the digits are centred, and a
learned matrix takes them to the model's width. Nothing is looked up: the cost is t x d weights, whatever the
number of ids.
"""

import torch
from torch import Tensor, nn

from encoder.sid import SidSpec


class SidUnpack(nn.Module):
    """Unpack SIDs into their latent codes h (the paper's Eq. 5 undone); it has no weights.

    Digit g becomes g - (L-1)/2, times its step when the codebook has steps and they are asked for, so that the code
    is the encoder's own up to the directions and a common factor: steps are taken over their mean, since the latent's
    unit is an accident of the encoder's training and would set how loudly content enters the ranker.

    Args of the constructor:
        spec: the SIDs' spec, with one line a layer. scale_steps: multiply by the recorded steps.
    """

    scale_t: Tensor
    shift_t: Tensor

    def __init__(self, spec: SidSpec, scale_steps: bool) -> None:
        super().__init__()
        assert spec.lines == 1
        self.spec = spec
        self.num_digits = spec.held_digits
        scale = spec.steps if scale_steps and spec.steps else (1.0,) * spec.digits
        scale_t = torch.tensor(scale, dtype=torch.float32)
        scale_t = (scale_t / scale_t.mean())[: spec.held_digits]
        # Constants of the spec, not state: they are rebuilt from it and stay out of checkpoints.
        self.register_buffer("scale_t", scale_t, persistent=False)
        self.register_buffer("shift_t", -spec.centre * scale_t, persistent=False)

    def forward(self, sids_NC: Tensor, known_N: Tensor) -> Tensor:
        """Unpack.

        Args:
            sids_NC: int64 ids [N, C], C columns a SID (one unless it does not fit an int64).
            known_N: bool; False where the SID is null, whatever id stands there.

        Returns:
            h_Nt: float32 [N, t], zeros where the SID is null.
        """
        digits_tN = sids_NC.new_empty((self.num_digits, len(sids_NC)), dtype=torch.float32)
        first = 0
        for ids_N, size in zip(sids_NC.unbind(1), self.spec.chunk_sizes, strict=True):
            self._unpack_into(digits_tN[first : first + size], ids_N)
            first += size
        h_Nt = torch.addcmul(self.shift_t, digits_tN.t(), self.scale_t)
        return h_Nt * known_N.unsqueeze(1)

    def _unpack_into(self, digits_tN: Tensor, ids_N: Tensor) -> None:
        # One division a digit, each over a contiguous row: the remainder comes from the quotient.
        radix, is_eq5 = self.spec.radix, self.spec.packing == "paper_eq5"
        rest_N = torch.div(ids_N, radix, rounding_mode="trunc") if is_eq5 else ids_N
        order = range(len(digits_tN)) if is_eq5 else range(len(digits_tN) - 1, -1, -1)
        for i in order:
            quotient_N = torch.div(rest_N, radix, rounding_mode="trunc")
            digits_tN[i] = torch.sub(rest_N, quotient_N, alpha=radix)
            rest_N = quotient_N


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
