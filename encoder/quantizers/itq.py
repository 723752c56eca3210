"""Iterative quantization: the signs of rotated principal projections; nothing learned by gradient.

Source: paper section 2, [4] (Gong et al.), fitted by faiss.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from sidestack.encoder.quantizers.clustering import itq_rotation
from sidestack.encoder.quantizers.contract import Quantizer, QuantizerConfig, Size, at_least_float32
from sidestack.encoder.sid.spec import SidSpec


class ItqConfig(QuantizerConfig):
    """Settings of ITQ."""

    kind: Literal["itq"] = "itq"
    digits: Size = 24
    """Bits: the number of principal axes, which are rotated and cut at 0."""
    latent_dim: Size = 32
    """Dimensions of the latent vector, at least as many as bits."""

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        if self.digits > self.latent_dim:
            raise ValueError(f"digits {self.digits} must be at most latent_dim {self.latent_dim}, one axis each")
        return self

    def build(self) -> "Itq":
        """Make the quantizer."""
        return Itq(self)


class Itq(Quantizer):
    """h_hat = mean + sum_n a_n * (+1 or -1) * axis_n, with a_n the mean length of the projection on axis n."""

    mean_H: Tensor
    axes_NH: Tensor
    step_N: Tensor

    def __init__(self, config: ItqConfig) -> None:
        super().__init__()
        self.config = config
        self.digits, self.latent_dim = config.digits, config.latent_dim
        self.register_buffer("mean_H", torch.zeros(config.latent_dim))
        self.register_buffer("axes_NH", torch.eye(config.digits, config.latent_dim))
        self.register_buffer("step_N", torch.full((config.digits,), 2.0))

    def encode(self, h_BH: Tensor) -> Tensor:
        """Return the sign of each projection: int64 [B, digits], 1 above 0."""
        return (self._projections(h_BH) > 0).to(torch.int64)

    def codewords(self) -> Tensor:
        """Return each bit's vector; the first digit's include the mean: [digits, 2, latent_dim]."""
        half_NH = self.axes_NH * self.step_N[:, None] / 2
        table_NRH = torch.stack([-half_NH, half_NH], dim=1)
        table_NRH[0] += self.mean_H
        return table_NRH

    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits: one depth, as many groups as bits."""
        return SidSpec(
            quantizer=self.config.kind,
            levels=2,
            digits=self.digits,
            depth=1,
            groups=self.digits,
            steps=tuple(self.step_N.tolist()),
            fingerprint=fingerprint,
        )

    @torch.no_grad()
    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Fit mean, axes and lengths to a sample."""
        h_NH = at_least_float32(h_NH)
        self.mean_H.copy_(h_NH.mean(0))
        self.axes_NH.copy_(itq_rotation(h_NH - self.mean_H, self.digits, generator))
        self.step_N.copy_(2 * self._projections(h_NH).abs().mean(0))

    def _projections(self, h_BH: Tensor) -> Tensor:
        return (at_least_float32(h_BH) - self.mean_H) @ self.axes_NH.T
