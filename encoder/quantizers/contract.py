"""What every quantizer offers: digits of a latent vector, the vector they stand for, and losses.

Quantization runs in float32 whatever the precision around it: a rounding decision taken in
bfloat16 would give another code than the one materialized.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

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
    def codewords(self) -> Tensor:
        """Give what every value of every digit adds to h_hat: [digits, radix, latent_dim], with gradient."""

    def decode(self, digits_BN: Tensor, kept_BN: Tensor | None = None) -> Tensor:
        """Give the vectors that digits stand for, the sums of their codewords (Eq. 4), with gradient.

        Args:
            digits_BN: integers in [0, radix), [B, digits].
            kept_BN: bool [B, digits]; a digit that is not kept adds nothing, so that a prefix is
                decoded by keeping its digits alone. None keeps all.

        Returns:
            h_hat_BH: [B, latent_dim].
        """
        table_NRH = self.codewords()
        num_digits, radix, _ = table_NRH.shape
        rows_BN = digits_BN + torch.arange(num_digits, device=digits_BN.device) * radix
        weights_BN = None if kept_BN is None else kept_BN.to(table_NRH.dtype)
        return functional.embedding_bag(rows_BN, table_NRH.flatten(0, 1), mode="sum", per_sample_weights=weights_BN)

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
