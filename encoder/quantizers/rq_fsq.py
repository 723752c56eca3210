"""RQ-FSQ: layers of finite scalar quantization, each of the residual of the layers before, in two readings.

Source: "Quantizing Intent", which names the method without code. `scale`: a layer rounds the same dimensions at
L^-depth of the first layer's scale. All layers together are one even grid of L^depth cells, and a layer's digits are
the cell's digits in base L. `project`: a layer rounds coordinates of the residual in a learned basis of its own.
"""

from abc import abstractmethod
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sidestack.encoder.quantizers.contract import Quantizer, QuantizerConfig, Size, at_least_float32
from sidestack.encoder.quantizers.scalar import (
    best_step,
    centred_levels,
    squash,
    suited_spread,
    thresholds_and_values,
    uneven_values,
)
from sidestack.encoder.sid.spec import Bound, SidSpec


class RqFsqConfig(QuantizerConfig):
    """Settings of RQ-FSQ."""

    kind: Literal["rq_fsq"] = "rq_fsq"
    reading: Literal["scale", "project"] = "scale"
    """`scale`: the same dimensions, finer with each layer. `project`: a learned basis for each layer."""
    levels: Annotated[int, Field(ge=2, le=256)] = 3
    """Levels L of every digit."""
    dims: Size = 5
    """Digits per layer."""
    depth: Size = 3
    """Number of layers."""
    latent_dim: Size | None = None
    """Dimensions of the latent vector, at least `dims`. None: `dims`, as always in the reading `scale`."""
    bound: Bound = "clamp"
    """Treatment of values beyond the outermost level; `scale` bounds the vector, `project` every coordinate."""
    prefix_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training rows that are decoded from a random prefix of layers (Matryoshka training)."""

    @model_validator(mode="after")
    def _check_basis(self) -> Self:
        width = self.latent_dim or self.dims
        if width < self.dims or (self.reading == "scale" and width != self.dims):
            rule = "equal" if self.reading == "scale" else "be at least"
            raise ValueError(f"latent_dim {width} must {rule} dims {self.dims} in the reading {self.reading!r}")
        return self

    def build(self) -> "RqFsq":
        """Make the quantizer of the reading."""
        return ScaledRqFsq(self) if self.reading == "scale" else ProjectedRqFsq(self)


class RqFsq(Quantizer):
    """Base of the two readings."""

    def __init__(self, config: RqFsqConfig) -> None:
        super().__init__()
        self.config = config
        self.depth, self.prefix_dropout = config.depth, config.prefix_dropout
        self.digits = config.depth * config.dims
        self.latent_dim = config.latent_dim or config.dims

    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits: as many groups as a layer has digits."""
        return SidSpec(
            quantizer=self.config.kind,
            levels=self.config.levels,
            digits=self.digits,
            depth=self.depth,
            groups=self.config.dims,
            bound=self.config.bound,
            steps=self.steps(),
            values=self.values(),
            fingerprint=fingerprint,
        )

    @abstractmethod
    def steps(self) -> tuple[float, ...]:
        """Return every digit's step: a codeword's length is the step times its level's value."""

    def values(self) -> tuple[float, ...]:
        """Return the levels' values, where they are not q_l."""
        return ()


class ScaledRqFsq(RqFsq):
    """RQ-FSQ by scale: layer d rounds the residual to q_l * s_d, s_d = L^-d / ((L-1)/2); h is bounded as in FSQ."""

    scale_D: Tensor
    values_L: Tensor

    def __init__(self, config: RqFsqConfig) -> None:
        super().__init__(config)
        radius = (config.levels - 1) / 2
        scale_D = torch.tensor([config.levels**-depth / radius for depth in range(config.depth)], dtype=torch.float64)
        self.commitment_scale = 0.1
        # All layers together are one scalar quantizer of L^depth levels (beyond 4096 the spread hardly changes).
        self.latent_spread = suited_spread(min(config.levels**config.depth, 4096), config.bound)
        self.register_buffer("scale_D", scale_D.float())
        self.register_buffer("values_L", centred_levels(config.levels).float())

    def latent(self, h_BH: Tensor) -> Tensor:
        """Squash to [-1, 1] (`clamp`: unchanged; the commitment loss keeps it in range)."""
        return squash(h_BH, self.config.bound)

    def encode(self, h_BH: Tensor) -> Tensor:
        """Round layer by layer: int64 [B, digits] in [0, L)."""
        residual_BN = self.latent(at_least_float32(h_BH))
        top, digits = self.config.levels - 1, []
        for scale in self.scale_D:
            level_BN = (residual_BN / scale + top / 2).round().clamp(0, top).to(torch.int64)
            residual_BN = residual_BN - self.values_L[level_BN] * scale
            digits.append(level_BN)
        return torch.cat(digits, dim=1)

    def codewords(self) -> Tensor:
        """Return each level's value in its own dimension: [digits, L, dims]."""
        value_DL = self.scale_D[:, None] * self.values_L
        axes_NN = torch.eye(self.config.dims, device=value_DL.device)
        return (value_DL[:, None, :, None] * axes_NN[None, :, None, :]).flatten(0, 1)

    def steps(self) -> tuple[float, ...]:
        """Return each layer's scale, once for each of its digits."""
        return tuple(self.scale_D.repeat_interleave(self.config.dims).tolist())


class ProjectedRqFsq(RqFsq):
    """RQ-FSQ by projection: layer d, with offset b and basis V [dims, H], rounds the z of r - b ~ z V to levels.

    The coordinates z are the least-squares solution, by V's pseudo-inverse. So only V is learned, by the codebook loss;
    a separate encoding matrix would have no gradient.
    """

    thresholds: Tensor
    values_L: Tensor

    def __init__(self, config: RqFsqConfig) -> None:
        super().__init__(config)
        self.basis_DNH = nn.Parameter(torch.randn(config.depth, config.dims, self.latent_dim))
        self.offset_DH = nn.Parameter(torch.zeros(config.depth, self.latent_dim))
        thresholds, values = thresholds_and_values(config.levels, config.bound)
        self.register_buffer("thresholds", thresholds.float())
        self.register_buffer("values_L", values.float())

    def encode(self, h_BH: Tensor) -> Tensor:
        """Round the residual's coordinates, layer by layer: int64 [B, digits] in [0, L)."""
        residual_BH = at_least_float32(h_BH)
        inverse_DHN = torch.linalg.pinv(self.basis_DNH.detach())
        digits = []
        for depth, inverse_HN in enumerate(inverse_DHN):
            level_BN, residual_BH = self._round(residual_BH, depth, inverse_HN)
            digits.append(level_BN)
        return torch.cat(digits, dim=1)

    def codewords(self) -> Tensor:
        """Return q_l times the basis vectors; a layer's first digit includes its offset: [digits, L, latent_dim]."""
        table_DNLH = self.basis_DNH[:, :, None] * self.values_L[:, None]
        is_first_N = torch.arange(self.config.dims, device=table_DNLH.device) == 0
        table_DNLH = table_DNLH + self.offset_DH[:, None, None] * is_first_N[:, None, None]
        return table_DNLH.flatten(0, 1)

    def steps(self) -> tuple[float, ...]:
        """Return the lengths of the basis vectors."""
        return tuple(self.basis_DNH.detach().norm(dim=-1).flatten().tolist())

    def values(self) -> tuple[float, ...]:
        """Return the centroids of the cells of a squashed line."""
        return uneven_values(self.config.levels, self.config.bound)

    @torch.no_grad()
    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Set each layer's offset to the residuals' mean, and its basis to their principal axes, one step long each."""
        residual_NH = at_least_float32(h_NH)
        for depth in range(self.depth):
            mean_H = residual_NH.mean(0)
            centred_NH = (residual_NH - mean_H).double()
            variance_H, axes_HH = torch.linalg.eigh(centred_NH.T @ centred_NH / len(centred_NH))
            spread_N = variance_H[-self.config.dims :].flip(0).clamp(min=1e-12).sqrt()
            axes_NH = axes_HH.T[-self.config.dims :].flip(0)
            largest_N1 = axes_NH.abs().argmax(1, keepdim=True)
            axes_NH = axes_NH * axes_NH.gather(1, largest_N1).sign()  # fix the sign of the axis
            step_N1 = spread_N[:, None] * best_step(self.config.levels, self.config.bound)
            self.offset_DH[depth] = mean_H
            self.basis_DNH[depth] = (axes_NH * step_N1).to(self.basis_DNH)
            residual_NH = self._round(residual_NH, depth, torch.linalg.pinv(self.basis_DNH[depth]))[1]

    def _round(self, residual_BH: Tensor, depth: int, inverse_HN: Tensor) -> tuple[Tensor, Tensor]:
        """Return one layer's levels, int64 [B, dims], and the residual, [B, H]."""
        centred_BH = residual_BH - self.offset_DH[depth]
        level_BN = torch.bucketize(centred_BH @ inverse_HN, self.thresholds)
        return level_BN, centred_BH - self.values_L[level_BN] @ self.basis_DNH[depth]
