"""Finite scalar quantization: every latent dimension is rounded to L levels independently.

Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple"; in the paper, [11]. It
has no codebook to learn, and L=2 is lookup-free quantization.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sidestack.encoder.quantizers.contract import Quantizer, QuantizerConfig, Size, at_least_float32
from sidestack.encoder.quantizers.scalar import centred_levels, squash, suited_spread
from sidestack.encoder.sid.spec import Bound, SidSpec


class FsqConfig(QuantizerConfig):
    """Settings of FSQ."""

    kind: Literal["fsq"] = "fsq"
    levels: Annotated[int, Field(ge=2, le=256)] = 3
    """Levels L of every dimension."""
    digits: Size = 15
    """Latent dimensions, one digit each."""
    bound: Bound = "clamp"
    """How a dimension is mapped to [-1, 1] before rounding."""

    def build(self) -> "Fsq":
        """Make the quantizer."""
        return Fsq(self)


class Fsq(Quantizer):
    """FSQ over [-1, 1]: level l decodes to q_l / ((L-1)/2), for odd and even L alike.

    Unlike in the structured quantizer, the levels of a squashing bound are not centroids. Commitment loss and decoder
    use the squashed latent vector. On the squashed line the cells are even and their values are the midpoints. The
    network learns the distribution of h within the cells, and the decoder is trained on these values.
    """

    def __init__(self, config: FsqConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_dim = self.digits = config.digits
        self.radius = (config.levels - 1) / 2
        self.commitment_scale = 0.1
        self.latent_spread = suited_spread(config.levels, config.bound)
        # A buffer, so that the fingerprint of a codebook without parameters still covers it.
        values_L = (centred_levels(config.levels) / self.radius).float()
        self.values_L: Tensor
        self.register_buffer("values_L", values_L)

    def latent(self, h_BH: Tensor) -> Tensor:
        """Squash to [-1, 1] (`clamp`: unchanged; the commitment loss keeps it in range)."""
        return squash(h_BH, self.config.bound)

    def encode(self, h_BH: Tensor) -> Tensor:
        """Round every dimension to its level: int64 [B, digits] in [0, L)."""
        scaled_BH = self.latent(at_least_float32(h_BH)) * self.radius + self.radius
        return scaled_BH.round().clamp(0, self.config.levels - 1).to(torch.int64)

    def codewords(self) -> Tensor:
        """Return each level's value in [-1, 1], in the digit's own dimension: [digits, L, digits]."""
        axes_NN = torch.eye(self.digits, device=self.values_L.device)
        return self.values_L[None, :, None] * axes_NN[:, None, :]

    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits: one depth, as many groups as dimensions."""
        return SidSpec(
            quantizer=self.config.kind,
            levels=self.config.levels,
            digits=self.digits,
            depth=1,
            groups=self.digits,
            bound=self.config.bound,
            steps=(1 / self.radius,) * self.digits,
            fingerprint=fingerprint,
        )
