"""The structured quantizer, in groups x depth; K=1 line of L=3 levels is Discrete PCA.

Source: paper Eq. 1-4. A layer has K lines; line k has a unit direction u_k, an offset b_k and a
step a_k > 0; its codewords are b_k + a_k * q_l * u_k. The latent vector is split into `groups`
blocks (disjoint blocks are the paper's orthogonal codebooks); in each block `depth` layers
quantize what the layers before have left over.
"""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from encoder.quantizers.contract import Quantizer, at_least_float32
from encoder.quantizers.scalar import best_step, thresholds_and_values
from encoder.sid import Bound, SidSpec
from infra.config import Config


class StructuredConfig(Config):
    """Settings of the structured quantizer; the defaults are DPCA at 15 ternary digits."""

    kind: Literal["structured"] = "structured"
    levels: Annotated[int, Field(ge=2, le=256)] = 3
    """Levels L on a line."""
    lines: Annotated[int, Field(ge=1)] = 1
    """Lines K of a layer."""
    groups: Annotated[int, Field(ge=1)] = 3
    """Blocks of the latent vector, quantized beside each other."""
    depth: Annotated[int, Field(ge=1)] = 5
    """Layers in a block, each quantizing what the ones before left over."""
    group_dim: Annotated[int, Field(ge=1)] = 8
    """Dimensions of a block."""
    assign: Literal["line", "codeword"] = "line"
    """`line` is Eq. 2: nearest line, then level. `codeword` takes the nearest codeword."""
    bound: Bound = "clamp"
    """What happens beyond the outermost level."""
    directions: Literal["pca", "random"] = "pca"
    """Where directions start: principal axes of the first sample's residuals, or anywhere."""

    def build(self) -> "Structured":
        """Make the quantizer."""
        return Structured(self)


class Codebook(NamedTuple):
    """A codebook in use: unit directions u [D,P,K,M], offsets b [D,P,K,M], steps a [D,P,K]."""

    u: Tensor
    b: Tensor
    a: Tensor


class Structured(Quantizer):
    """The structured quantizer; see the module's text. Dimensions: D depth, P groups, K lines."""

    def __init__(self, config: StructuredConfig) -> None:
        super().__init__()
        self.config = config
        self.digits = config.depth * config.groups
        self.latent_dim = config.groups * config.group_dim
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

    def codebook(self) -> Codebook:
        """Give directions of unit length, offsets and steps, with gradient."""
        u_DPKM = functional.normalize(self.direction_DPKM, dim=-1)
        return Codebook(u_DPKM, self.offset_DPKM, self.log_step_DPK.exp())

    def encode(self, h_BH: Tensor) -> Tensor:
        """Give the digits k * L + l, int64 [B, digits]; by one matrix product where K=1."""
        if self.config.lines == 1:
            return self.encode_by_one_product(h_BH)
        return self.encode_by_residuals(h_BH)

    def encode_by_residuals(self, h_BH: Tensor) -> Tensor:
        """Encode as the paper tells it, layer after layer; any K. The reference of the other."""
        residual_BPM = self._blocks(h_BH)
        book = self.codebook()
        digits = []
        for depth in range(self.config.depth):
            digit_BP = self._nearest(residual_BPM, book, depth)
            residual_BPM = residual_BPM - self._codewords(digit_BP, book, depth)
            digits.append(digit_BP)
        return torch.cat(digits, dim=-1)

    def encode_by_one_product(self, h_BH: Tensor) -> Tensor:
        """Encode with K=1 by Z = U h once, then Z_j -= a_d c_d <u_d, u_j> down the depth.

        The residual before layer j is h minus what was taken before, so its projection on u_j is
        h's minus theirs: the serial part works on one number a digit, not on vectors.
        """
        assert self.config.lines == 1
        u_DPKM, b_DPKM, a_DPK = self.codebook()
        u_DPM, b_DPM, a_DP = u_DPKM.squeeze(2), b_DPKM.squeeze(2), a_DPK.squeeze(2)
        overlap_DDP = torch.einsum("dpm,jpm->djp", u_DPM, u_DPM) * a_DP[:, None]
        # A layer's own offset and those of all layers before are constants of its projection.
        constant_DP = (b_DPM.cumsum(0) * u_DPM).sum(-1)
        product_DPB = torch.einsum("dpm,bpm->dpb", u_DPM, self._blocks(h_BH)).contiguous()
        z_DPB = product_DPB - constant_DP[..., None]
        levels_DPB = torch.empty(z_DPB.shape, dtype=torch.int64, device=z_DPB.device)
        for d in range(self.config.depth):
            t_PB = z_DPB[d] / a_DP[d, :, None]
            levels_DPB[d] = torch.bucketize(t_PB, self.thresholds)
            taken_PB = self.values_L[levels_DPB[d]]
            z_DPB[d + 1 :] -= overlap_DDP[d, d + 1 :, :, None] * taken_PB
        return levels_DPB.flatten(0, 1).T.contiguous()

    def codewords(self) -> Tensor:
        """Give b_k + a_k * q_l * u_k, in its group's block and 0 elsewhere: [digits, K * L, latent_dim]."""
        config, book = self.config, self.codebook()
        line_DPKLM = book.a[..., None, None] * self.values_L[:, None] * book.u[..., None, :]
        word_DPRM = (book.b[..., None, :] + line_DPKLM).flatten(2, 3)
        blocks_PP = torch.eye(config.groups, device=word_DPRM.device)
        table_DPRPM = word_DPRM[:, :, :, None, :] * blocks_PP[:, None, :, None]
        return table_DPRPM.reshape(self.digits, -1, self.latent_dim)

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
            fingerprint=fingerprint,
        )

    @torch.no_grad()
    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Set offsets, directions and steps layer by layer from the residuals of a sample."""
        everything_PK = torch.ones(self.config.groups, self.config.lines, dtype=torch.bool)
        residual_NPM = self._blocks(h_NH)
        for depth in range(self.config.depth):
            self._restart(depth, everything_PK, residual_NPM, generator)
            residual_NPM = self._left_over(residual_NPM, depth)

    @torch.no_grad()
    def revive(self, h_NH: Tensor, generator: torch.Generator) -> int:
        """Restart every line that no vector of the sample takes, from the residuals it meets."""
        residual_NPM = self._blocks(h_NH)
        revived = 0
        for depth in range(self.config.depth):
            digit_NP = self._nearest(residual_NPM, self.codebook(), depth)
            lines_NPK = functional.one_hot(digit_NP // self.config.levels, self.config.lines)
            dead_PK = lines_NPK.sum(0) == 0
            self._restart(depth, dead_PK, residual_NPM, generator)
            revived += int(dead_PK.sum())
            residual_NPM = self._left_over(residual_NPM, depth)
        return revived

    def _blocks(self, h_BH: Tensor) -> Tensor:
        return at_least_float32(h_BH).reshape(-1, self.config.groups, self.config.group_dim)

    def _nearest(self, residual_BPM: Tensor, book: Codebook, depth: int) -> Tensor:
        """Give the digit k * L + l of every block at one depth, [B, P]."""
        u_PKM, b_PKM, a_PK = book.u[depth], book.b[depth], book.a[depth]
        x_BPKM = residual_BPM[:, :, None] - b_PKM
        along_BPK = (x_BPKM * u_PKM).sum(-1)
        level_BPK = torch.bucketize(along_BPK / a_PK, self.thresholds)
        distance_BPK = x_BPKM.square().sum(-1) - along_BPK.square()
        if self.config.assign == "codeword":
            distance_BPK += (along_BPK - a_PK * self.values_L[level_BPK]).square()
        line_BP1 = distance_BPK.argmin(-1, keepdim=True)
        return (line_BP1 * self.config.levels + level_BPK.gather(-1, line_BP1)).squeeze(-1)

    def _codewords(self, digit_BP: Tensor, book: Codebook, depth: int) -> Tensor:
        """Give b_k + a_k * q_l * u_k of every block at one depth, [B, P, M]."""
        line_BP = digit_BP // self.config.levels
        value_BP = self.values_L[digit_BP % self.config.levels]
        group_P = torch.arange(self.config.groups, device=digit_BP.device)
        u_BPM = book.u[depth][group_P, line_BP]
        length_BP = book.a[depth][group_P, line_BP] * value_BP
        return book.b[depth][group_P, line_BP] + length_BP[..., None] * u_BPM

    def _left_over(self, residual_NPM: Tensor, depth: int) -> Tensor:
        book = self.codebook()
        return residual_NPM - self._codewords(self._nearest(residual_NPM, book, depth), book, depth)

    def _restart(self, depth: int, which_PK: Tensor, residual_NPM: Tensor, generator: torch.Generator) -> None:
        """Fit the chosen lines of a layer to residuals: each to its N / K nearest of one at random."""
        share = max(len(residual_NPM) // self.config.lines, 2)
        for group, line in which_PK.nonzero().tolist():
            x_NM = residual_NPM[:, group]
            centre_M = x_NM[int(torch.randint(len(x_NM), (1,), generator=generator))]
            near_N = (x_NM - centre_M).square().sum(-1).topk(share, largest=False).indices
            offset_M, u_M, step = self._fitted_line(x_NM[near_N], generator)
            self.offset_DPKM[depth, group, line] = offset_M
            self.direction_DPKM[depth, group, line] = u_M
            self.log_step_DPK[depth, group, line] = step.clamp(min=1e-6).log()

    def _fitted_line(self, x_NM: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Give mean, direction, and the step that suits a normal law of the spread along it."""
        offset_M = x_NM.mean(0)
        centred_NM = (x_NM - offset_M).double()
        if self.config.directions == "random":
            u_M = functional.normalize(torch.randn(x_NM.shape[1], generator=generator, dtype=torch.float64), dim=0)
        else:
            u_M = torch.linalg.eigh(centred_NM.T @ centred_NM).eigenvectors[:, -1]
            u_M = u_M * u_M[u_M.abs().argmax()].sign()  # an axis has two senses; take one for good
        spread = (centred_NM @ u_M.to(x_NM.device)).std()
        return offset_M, u_M.to(x_NM), (spread * best_step(self.config.levels, self.config.bound)).to(x_NM)
