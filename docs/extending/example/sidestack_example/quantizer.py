"""Sign hash: the sides of random hyperplanes on which a vector lies; nothing learned by gradient.

Source: Charikar, "Similarity Estimation Techniques from Rounding Algorithms" (random hyperplane LSH). It is what
iterative quantization (`itq`) is before its rotation is fitted, and so its baseline.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from sidestack.encoder.quantizers.contract import Quantizer, QuantizerConfig, Size, at_least_float32
from sidestack.encoder.sid.spec import SidSpec


class SignHashConfig(QuantizerConfig):
    """Settings of the sign hash."""

    kind: Literal["sign_hash"] = "sign_hash"
    digits: Size = 16
    """Bits: hyperplanes, at right angles to each other."""
    latent_dim: Size = 32
    """Dimensions of the latent vector, at least as many as bits."""

    @model_validator(mode="after")
    def _normals_exist(self) -> Self:
        if self.digits > self.latent_dim:
            raise ValueError(f"digits {self.digits} must be at most latent_dim {self.latent_dim}")
        return self

    def build(self) -> "SignHash":
        """Make the quantizer."""
        return SignHash(self)


class SignHash(Quantizer):
    """h_hat = mean + sum_n (+1 or -1) * a_n * normal_n, with a_n the mean distance from hyperplane n."""

    mean_H: Tensor
    normals_NH: Tensor
    distance_N: Tensor

    def __init__(self, config: SignHashConfig) -> None:
        super().__init__()
        self.config = config
        self.digits, self.latent_dim = config.digits, config.latent_dim
        # Buffers, so that checkpoints keep them and the fingerprint of the SIDs covers them.
        self.register_buffer("mean_H", torch.zeros(config.latent_dim))
        self.register_buffer("normals_NH", torch.eye(config.digits, config.latent_dim))
        self.register_buffer("distance_N", torch.ones(config.digits))

    def encode(self, h_BH: Tensor) -> Tensor:
        """Return the sides on which vectors lie: int64 [B, digits], 1 where the normal points."""
        return (self._distances(h_BH) > 0).to(torch.int64)

    def codewords(self) -> Tensor:
        """Return each side's vector; the mean comes with the first digit: [digits, 2, latent_dim]."""
        above_NH = self.normals_NH * self.distance_N[:, None]
        table_NRH = torch.stack([-above_NH, above_NH], dim=1)
        table_NRH[0] += self.mean_H
        return table_NRH

    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits: one layer of two-level digits beside each other."""
        return SidSpec(
            quantizer=self.config.kind,
            levels=2,
            digits=self.digits,
            depth=1,
            groups=self.digits,
            steps=tuple((2 * self.distance_N).tolist()),
            fingerprint=fingerprint,
        )

    @torch.no_grad()
    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Draw the hyperplanes, through the mean of a sample, and measure the sample's distances from them."""
        h_NH = at_least_float32(h_NH)
        drawn_HN = torch.randn(self.latent_dim, self.digits, generator=generator, dtype=torch.float64)
        self.mean_H.copy_(h_NH.mean(0))
        self.normals_NH.copy_(torch.linalg.qr(drawn_HN).Q.T)
        self.distance_N.copy_(self._distances(h_NH).abs().mean(0))

    def _distances(self, h_BH: Tensor) -> Tensor:
        return (at_least_float32(h_BH) - self.mean_H) @ self.normals_NH.T
