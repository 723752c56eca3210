"""The structured quantizer, in groups x depth; K=1 line of L=3 levels is Discrete PCA.

Source: paper Eq. 1-4. A layer has K lines; line k has a unit direction u_k, an offset b_k and a
step a_k > 0; its codewords are b_k + a_k * q_l * u_k. The latent vector is split into `groups`
blocks (disjoint blocks are the paper's orthogonal codebooks); in each block each of `depth` layers
quantizes the residual of the layers before.
"""

from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from sidestack.encoder.quantizers.clustering import kmeans
from sidestack.encoder.quantizers.contract import Knobs, Quantizer, QuantizerConfig, Size, at_least_float32
from sidestack.encoder.quantizers.lines import Line, fitted_line, refitted_lines
from sidestack.encoder.quantizers.recursion import Layers, encode_by_recursion
from sidestack.encoder.quantizers.residual import nearest_paths, spread_over_groups, take_codewords
from sidestack.encoder.quantizers.scalar import best_step, thresholds_and_values, uneven_values
from sidestack.encoder.quantizers.usage import Usage, count_values
from sidestack.encoder.sid.spec import Bound, SidSpec
from sidestack.infra.distributed import World


class StructuredConfig(QuantizerConfig):
    """Settings of the structured quantizer; the defaults are DPCA at 15 ternary digits."""

    kind: Literal["structured"] = "structured"
    levels: Annotated[int, Field(ge=2, le=256)] = 3
    """Levels L per line."""
    lines: Size = 1
    """Lines K per layer."""
    groups: Size = 3
    """Blocks of the latent vector, quantized independently."""
    depth: Size = 5
    """Layers in a block, each quantizing the residual of the layers before."""
    group_dim: Size = 8
    """Dimensions of a block."""
    assign: Literal["line", "codeword"] = "line"
    """`line` is Eq. 2: nearest line, then level. `codeword` takes the nearest codeword."""
    bound: Bound = "clamp"
    """Treatment of values beyond the outermost level."""
    directions: Literal["pca", "random"] = "pca"
    """Initial directions: principal axes of the first sample's residuals, or random."""
    refits: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of times that the start reassigns its sample to a layer and refits the layer's lines in closed form."""
    beam: Size = 1
    """Paths kept while encoding; 1 takes every layer's nearest line or codeword."""
    prefix_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training rows that are decoded from a random prefix of layers (Matryoshka training)."""

    @model_validator(mode="after")
    def _check_beam(self) -> Self:
        if self.beam > 1 and self.assign != "codeword":
            raise ValueError(f"beam {self.beam} compares codewords: it needs assign: codeword, not {self.assign}")
        return self

    def build(self) -> "Structured":
        """Make the quantizer."""
        return Structured(self)

    @property
    def knobs(self) -> Knobs:
        """Levels, depth, groups and lines."""
        return Knobs(self.levels, self.depth, self.groups, self.lines)

    def with_knobs(self, knobs: Knobs) -> dict[str, Any]:
        """Return the settings with other levels, depth and groups; more groups make smaller blocks of one vector."""
        turned = {"levels": knobs.levels, "depth": knobs.depth, "groups": knobs.groups}
        return {**self.model_dump(), **turned, "group_dim": -(-self.groups * self.group_dim // knobs.groups)}


class Codebook(NamedTuple):
    """A normalized codebook: unit directions u [D,P,K,M], offsets b [D,P,K,M], steps a [D,P,K]."""

    u: Tensor
    b: Tensor
    a: Tensor


class Structured(Quantizer):
    """The structured quantizer; see the module's text. Dimensions: D depth, P groups, K lines."""

    def __init__(self, config: StructuredConfig) -> None:
        super().__init__()
        self.config = config
        self.depth, self.prefix_dropout = config.depth, config.prefix_dropout
        self.digits = config.depth * config.groups
        self.latent_blocks, self.latent_dim = config.groups, config.groups * config.group_dim
        layers = (config.depth, config.groups, config.lines)
        self.direction_DPKM = nn.Parameter(torch.randn(*layers, config.group_dim))
        self.offset_DPKM = nn.Parameter(torch.zeros(*layers, config.group_dim))
        self.log_step_DPK = nn.Parameter(torch.zeros(*layers))
        thresholds, values = thresholds_and_values(config.levels, config.bound)
        if config.assign == "codeword":
            thresholds = (values[1:] + values[:-1]) / 2  # the nearest value, whatever the bound
        self.thresholds: Tensor
        self.values_L: Tensor
        self.register_buffer("thresholds", thresholds.float())
        self.register_buffer("values_L", values.float())
        if self.revives:
            self.usage = Usage(self.digits, config.lines * config.levels)

    def codebook(self) -> Codebook:
        """Return directions of unit length, offsets and steps, with gradient."""
        u_DPKM = functional.normalize(self.direction_DPKM, dim=-1)
        return Codebook(u_DPKM, self.offset_DPKM, self.log_step_DPK.exp())

    def encode(self, h_BH: Tensor) -> Tensor:
        """Return the digits k * L + l, int64 [B, digits]; by one matrix product where K=1."""
        if self.config.beam > 1:
            return nearest_paths(self._blocks(h_BH), self._words(), self.config.beam)
        if self.config.lines == 1:
            return self.encode_by_one_product(h_BH)
        return self.encode_by_residuals(h_BH)

    def encode_by_residuals(self, h_BH: Tensor) -> Tensor:
        """Encode layer by layer, as in the paper; any K. The reference for `encode_by_one_product`."""
        residual_BPM = self._blocks(h_BH)
        book = self.codebook()
        digits = []
        for depth, words_PRM in enumerate(self._words()):
            digit_BP = self._nearest(residual_BPM, book, depth)
            residual_BPM = residual_BPM - take_codewords(words_PRM, digit_BP)
            digits.append(digit_BP)
        return torch.cat(digits, dim=-1)

    def encode_by_one_product(self, h_BH: Tensor) -> Tensor:
        """Encode with K=1 by one matrix product and a recursion on one number per digit (`recursion.py`)."""
        assert self.config.lines == 1
        layers = Layers(*(part.squeeze(2) for part in self.codebook()))
        even = self.config.bound == "clamp"
        return encode_by_recursion(at_least_float32(h_BH), layers, self.thresholds, self.values_L, even=even)

    def codewords(self) -> Tensor:
        """Return b_k + a_k * q_l * u_k, in its group's block and 0 elsewhere: [digits, K * L, latent_dim]."""
        return spread_over_groups(self._words())

    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits; steps are published where K=1, depth-major."""
        config = self.config
        steps = self.codebook().a.flatten().tolist() if config.lines == 1 else ()
        return SidSpec(
            quantizer=config.kind,
            levels=config.levels,
            lines=config.lines,
            digits=self.digits,
            depth=config.depth,
            groups=config.groups,
            bound=config.bound,
            steps=tuple(steps),
            values=uneven_values(config.levels, config.bound),
            fingerprint=fingerprint,
        )

    @torch.no_grad()
    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Set offsets, directions and steps layer by layer from the residuals of a sample."""
        residual_NPM = self._blocks(h_NH)
        for depth in range(self.config.depth):
            for group in range(self.config.groups):
                self._start_lines(depth, group, residual_NPM[:, group], generator)
            for _ in range(self.config.refits):
                self._refit(depth, residual_NPM)
            residual_NPM = self._next_residual(residual_NPM, depth)
        if self.revives:
            self.usage.reset()

    @property
    def revives(self) -> bool:
        """Whether a layer has several lines, which may die."""
        return self.config.lines > 1

    @torch.no_grad()
    def revive(self, h_NH: Tensor, generator: torch.Generator) -> int:
        """Restart each line unused since the last revival and in the sample, from the sample's residuals at its layer.

        Each is fitted to the N / K rows nearest to a random row.
        """
        if not self.revives:
            return 0
        residual_NPM = self._blocks(h_NH)
        unused_DPK = self._sum_by_line(self.usage.counts_NR).view(self.depth, self.config.groups, -1) == 0
        revived = 0
        for depth in range(self.config.depth):
            taken_NR = count_values(self._nearest(residual_NPM, self.codebook(), depth), self.usage.counts_NR.shape[1])
            dead_PK = unused_DPK[depth] & (self._sum_by_line(taken_NR) == 0)
            for group, line in dead_PK.nonzero().tolist():
                self._restart_line(depth, group, line, residual_NPM[:, group], generator)
            revived += int(dead_PK.sum())
            residual_NPM = self._next_residual(residual_NPM, depth)
        self.usage.reset()
        return revived

    def observe(self, latent_BH: Tensor, digits_BN: Tensor) -> None:
        """Count the assigned codewords."""
        if self.revives:
            self.usage.count(digits_BN)

    def after_step(self, world: World) -> None:
        """Reduce the counts over ranks."""
        if self.revives:
            self.usage.update(world)

    def _sum_by_line(self, counts_NR: Tensor) -> Tensor:
        """Sum counts of codewords [..., K * L] over each line's levels: [..., K]."""
        return counts_NR.view(*counts_NR.shape[:-1], self.config.lines, self.config.levels).sum(-1)

    def _words(self) -> Tensor:
        """Return b_k + a_k * q_l * u_k: [D, P, K * L, M]."""
        u_DPKM, b_DPKM, a_DPK = self.codebook()
        line_DPKLM = a_DPK[..., None, None] * self.values_L[:, None] * u_DPKM[..., None, :]
        return (b_DPKM[..., None, :] + line_DPKLM).flatten(2, 3)

    def _blocks(self, h_BH: Tensor) -> Tensor:
        return at_least_float32(h_BH).reshape(-1, self.config.groups, self.config.group_dim)

    def _nearest(self, residual_BPM: Tensor, book: Codebook, depth: int) -> Tensor:
        """Return the digit k * L + l of every block at one depth, [B, P].

        With x = r - b, |x|^2 = |r|^2 - 2 <r, b> + |b|^2 and <x, u> = <r, u> - <b, u>: one matrix product with all
        offsets and directions, and no [B, P, K, M] differences. |r|^2 is the same for every line, and left out.
        """
        u_PKM, b_PKM, a_PK = book.u[depth], book.b[depth], book.a[depth]
        both_PMK = torch.cat([u_PKM, b_PKM], dim=1).transpose(1, 2)
        u_PBK, b_PBK = torch.bmm(residual_BPM.transpose(0, 1), both_PMK).chunk(2, dim=-1)
        along_PBK = u_PBK - (b_PKM * u_PKM).sum(-1)[:, None]
        level_PBK = torch.bucketize(along_PBK / a_PK[:, None], self.thresholds)
        distance_PBK = b_PKM.square().sum(-1)[:, None] - 2 * b_PBK - along_PBK.square()
        if self.config.assign == "codeword":
            distance_PBK += (along_PBK - a_PK[:, None] * self.values_L[level_PBK]).square()
        line_PB1 = distance_PBK.argmin(-1, keepdim=True)
        return (line_PB1 * self.config.levels + level_PBK.gather(-1, line_PB1)).squeeze(-1).T

    def _next_residual(self, residual_NPM: Tensor, depth: int) -> Tensor:
        digit_NP = self._nearest(residual_NPM, self.codebook(), depth)
        return residual_NPM - take_codewords(self._words()[depth], digit_NP)

    def _start_lines(self, depth: int, group: int, x_NM: Tensor, generator: torch.Generator) -> None:
        """Fit a layer's lines in one group to residuals: each to one k-means cluster, a single line to all."""
        if self.config.lines == 1:
            self._restart_line(depth, group, 0, x_NM, generator)
            return
        centres_KM = kmeans(x_NM, self.config.lines, generator)
        owner_N = nearest_paths(x_NM[:, None], centres_KM[None, None], beam=1).squeeze(-1)
        for line, centre_M in enumerate(centres_KM):
            own_NM = x_NM[owner_N == line]
            self._fit_line(
                depth, group, line, own_NM if len(own_NM) > 1 else self._nearest_rows(centre_M, x_NM), generator
            )

    def _restart_line(self, depth: int, group: int, line: int, x_NM: Tensor, generator: torch.Generator) -> None:
        """Fit a line to the N / K residuals nearest to a random one."""
        centre_M = x_NM[int(torch.randint(len(x_NM), (1,), generator=generator))]
        self._fit_line(depth, group, line, self._nearest_rows(centre_M, x_NM), generator)

    def _nearest_rows(self, centre_M: Tensor, x_NM: Tensor) -> Tensor:
        share = min(max(len(x_NM) // self.config.lines, 2), len(x_NM))
        return x_NM[(x_NM - centre_M).square().sum(-1).topk(share, largest=False).indices]

    def _fit_line(self, depth: int, group: int, line: int, x_NM: Tensor, generator: torch.Generator) -> None:
        offset_M, u_M, spread = fitted_line(x_NM, generator if self.config.directions == "random" else None)
        step = spread * best_step(self.config.levels, self.config.bound)
        self._set_lines(depth, group, line, Line(offset_M, u_M, step))

    def _refit(self, depth: int, residual_NPM: Tensor) -> None:
        """Assign residuals to a layer's codewords, and fit each line to the residuals assigned to it."""
        digit_NP = self._nearest(residual_NPM, self.codebook(), depth)
        for group in range(self.config.groups):
            line_N, level_N = digit_NP[:, group] // self.config.levels, digit_NP[:, group] % self.config.levels
            lines, fit = refitted_lines(residual_NPM[:, group], line_N, self.values_L[level_N], self.config.lines)
            self._set_lines(depth, group, lines, fit)

    def _set_lines(self, depth: int, group: int, lines: Tensor | int, fit: Line) -> None:
        dtype = self.offset_DPKM.dtype
        self.offset_DPKM[depth, group, lines] = fit.offset.to(dtype)
        self.direction_DPKM[depth, group, lines] = fit.direction.to(dtype)
        self.log_step_DPK[depth, group, lines] = fit.length.to(dtype).clamp(min=1e-6).log()
