"""RQ-VAE: residual codebooks that train with the network, by gradient or by moving averages.

Source: the paper's [8] (Zeghidour et al., "SoundStream", and Lee et al., "Autoregressive Image Generation using
Residual Quantization"): k-means start, exponential moving averages, restart of dead codes, quantizer dropout.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sidestack.encoder.quantizers.codebooks import Codebooks, ResidualCodebookConfig
from sidestack.encoder.quantizers.residual import take_codewords
from sidestack.encoder.quantizers.usage import Usage, count_values
from sidestack.infra.distributed import World, sum_over_ranks


class RqVaeConfig(ResidualCodebookConfig):
    """Settings of RQ-VAE."""

    kind: Literal["rqvae"] = "rqvae"
    update: Literal["gradient", "ema"] = "gradient"
    """How codewords are updated: by the codebook loss, or to the moving average of the vectors assigned to them."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average per step (`ema` only)."""

    def build(self) -> "RqVae":
        """Make the quantizer."""
        return RqVae(self)


class RqVae(Codebooks):
    """Trainable residual codebooks; see the module's text."""

    average_count_DPR: Tensor
    average_sum_DPRM: Tensor

    def __init__(self, config: RqVaeConfig) -> None:
        super().__init__(config.kind, config, config.depth, config.beam, config.prefix_dropout)
        self.config = config
        self.usage = Usage(self.digits, self.codes)
        self.codebook_DPRM.requires_grad_(config.update == "gradient")
        if config.update == "ema":
            self.register_buffer("average_count_DPR", torch.ones(self.codebook_DPRM.shape[:-1]))
            self.register_buffer("average_sum_DPRM", self.codebook_DPRM.detach().clone())
        # As in `Usage`, not a buffer: these are this rank's own sums.
        self._fresh_sum_DPRM: Tensor | None = None

    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Set the codebooks by k-means, and reset averages and counts."""
        super().start(h_NH, generator)
        self.usage.reset()
        self._renew_averages(torch.ones_like(self.codebook_DPRM[..., 0], dtype=torch.bool))

    @property
    def revives(self) -> bool:
        """Always true: codes may die at any depth."""
        return True

    @torch.no_grad()
    def revive(self, h_NH: Tensor, generator: torch.Generator) -> int:
        """Set each code unused since the last revival and in the sample to the residual of a random row."""
        unused_DPR = (self.usage.counts_NR == 0).view(self.depth, self.groups, self.codes)
        dead_DPR = torch.zeros_like(unused_DPR)
        residual_NPM = self.blocks(h_NH)
        for depth, words_PRM in enumerate(self.codebook_DPRM):
            taken_PR = count_values(self.nearest(residual_NPM, words_PRM), self.codes)
            dead_DPR[depth] = unused_DPR[depth] & (taken_PR == 0)
            for group in range(self.groups):
                codes_C = dead_DPR[depth, group].nonzero().squeeze(-1)
                rows_C = torch.randperm(len(h_NH), generator=generator)[: len(codes_C)].to(h_NH.device)
                # More dead codes than rows: the rest stay dead until the next revival.
                words_PRM[group, codes_C[: len(rows_C)]] = residual_NPM[rows_C, group]
                dead_DPR[depth, group, codes_C[len(rows_C) :]] = False
            residual_NPM = residual_NPM - take_codewords(words_PRM, self.nearest(residual_NPM, words_PRM))
        self.usage.reset()
        self._renew_averages(dead_DPR)
        return int(dead_DPR.sum())

    def observe(self, latent_BH: Tensor, digits_BN: Tensor) -> None:
        """Count the assigned codes and sum the residuals assigned to them."""
        self.usage.count(digits_BN)
        if self.config.update == "ema":
            sum_DPRM = self._sums(self.blocks(latent_BH), digits_BN)
            self._fresh_sum_DPRM = sum_DPRM if self._fresh_sum_DPRM is None else self._fresh_sum_DPRM + sum_DPRM

    @torch.no_grad()
    def after_step(self, world: World) -> None:
        """Reduce the counts over ranks and, under `ema`, move each code to the average of its assigned residuals."""
        count_NR = self.usage.update(world)
        if self.config.update == "gradient":
            return
        fresh = self._fresh_sum_DPRM
        sum_DPRM = sum_over_ranks(world, torch.zeros_like(self.codebook_DPRM) if fresh is None else fresh)
        self._fresh_sum_DPRM = None
        fading = 1 - self.config.ema_decay
        self.average_count_DPR.lerp_(count_NR.view_as(self.average_count_DPR).to(sum_DPRM), fading)
        self.average_sum_DPRM.lerp_(sum_DPRM, fading)
        # An unused code keeps its place: both averages decay equally, and the count is clamped before the division.
        alive_DPR1 = self.average_count_DPR[..., None] > 1e-6
        mean_DPRM = self.average_sum_DPRM / self.average_count_DPR[..., None].clamp(min=1e-6)
        self.codebook_DPRM.copy_(torch.where(alive_DPR1, mean_DPRM, self.codebook_DPRM))

    def _sums(self, residual_BPM: Tensor, digits_BN: Tensor) -> Tensor:
        """Sum each layer's input residuals by assigned code: [D, P, R, M]."""
        sum_DPRM = torch.zeros_like(self.codebook_DPRM)
        for depth, digits_BP in enumerate(torch.split(digits_BN, self.groups, dim=1)):
            for group in range(self.groups):
                sum_DPRM[depth, group].index_add_(0, digits_BP[:, group], residual_BPM[:, group])
            residual_BPM = residual_BPM - take_codewords(self.codebook_DPRM[depth], digits_BP)
        return sum_DPRM

    def _renew_averages(self, which_DPR: Tensor) -> None:
        if self.config.update == "ema":
            self.average_count_DPR[which_DPR] = 1.0
            self.average_sum_DPRM[which_DPR] = self.codebook_DPRM.detach()[which_DPR]
