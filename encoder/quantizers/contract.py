"""What every quantizer offers: digits of a latent vector, the vector they stand for, and losses.

Quantization runs in float32 whatever the precision around it: a rounding decision taken in
bfloat16 would give another code than the one materialized.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from encoder.sid import SidSpec


class Quantized(NamedTuple):
    """A quantized batch, as training needs it.

    Attributes:
        latent: [B, H], the bounded latent vectors, with gradient to the encoder.
        h_hat: [B, H], the vectors the digits stand for, with gradient to the codebook.
        digits: int64 [B, N], each in [0, radix).
    """

    latent: Tensor
    h_hat: Tensor
    digits: Tensor

    @property
    def straight_through(self) -> Tensor:
        """s = h - stop_gradient(h - h_hat), paper section 4: h_hat's value, h's gradient."""
        return self.latent - (self.latent - self.h_hat).detach()

    def codebook_loss(self) -> Tensor:
        """(stop_gradient(h) - h_hat)^2 by row, [B]: moves the codebook to the vectors.

        The mean over dimensions, not the sum, so that a weight means the same for any width: with
        the sum, a commitment weight of 0.25 freezes the codes of 24 dimensions soon after the start.
        """
        return (self.latent.detach() - self.h_hat).square().mean(-1)

    def commitment_loss(self) -> Tensor:
        """(h - stop_gradient(h_hat))^2 by row, [B], mean over dimensions: keeps vectors near their codes."""
        return (self.latent - self.h_hat.detach()).square().mean(-1)


class Quantizer(nn.Module, ABC):
    """Base of the quantizers; shapes: h_BH [B, latent_dim], digits_BN [B, digits].

    A quantizer is one module of the fusion network: it trains with it, and its parameters and
    buffers are the codebook that the SID fingerprint covers.
    """

    latent_dim: int
    digits: int

    def forward(self, h_BH: Tensor) -> Quantized:
        """Quantize a batch for training."""
        with torch.autocast(h_BH.device.type, enabled=False):
            latent_BH = self.latent(at_least_float32(h_BH))
            with torch.no_grad():
                digits_BN = self.encode(h_BH)
            return Quantized(latent_BH, self.decode(digits_BN), digits_BN)

    def latent(self, h_BH: Tensor) -> Tensor:
        """Give the vectors that are rounded: h itself, unless a bound squashes it."""
        return h_BH

    @abstractmethod
    def encode(self, h_BH: Tensor) -> Tensor:
        """Give the digits of latent vectors: int64 [B, digits], depth-major."""

    @abstractmethod
    def decode(self, digits_BN: Tensor) -> Tensor:
        """Give the vectors that digits stand for: float32 [B, latent_dim]."""

    @abstractmethod
    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits, under the fingerprint of the bundle this quantizer is part of."""

    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Set the codebook from a sample of latent vectors, the same on every rank; nothing to set: nothing done."""

    def revive(self, h_NH: Tensor, generator: torch.Generator) -> int:
        """Restart the parts of the codebook that a sample leaves unused; give their number."""
        return 0


def at_least_float32(h_BH: Tensor) -> Tensor:
    """Raise half precisions to float32; leave float32 and float64 as they are."""
    return h_BH.to(torch.promote_types(h_BH.dtype, torch.float32))
