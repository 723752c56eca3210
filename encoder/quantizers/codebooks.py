"""Codebooks of free vectors in depth x groups: the shared part of RQ-VAE, residual k-means and product quantization."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from sidestack.encoder.quantizers.clustering import kmeans
from sidestack.encoder.quantizers.contract import Quantizer, QuantizerConfig, Size, at_least_float32
from sidestack.encoder.quantizers.residual import nearest_paths, spread_over_groups, take_codewords
from sidestack.encoder.sid.spec import SidSpec

Share = Annotated[float, Field(ge=0, le=1)]


class CodebookConfig(QuantizerConfig):
    """Settings shared by quantizers with codebooks of free vectors."""

    codes: Annotated[int, Field(ge=2, le=65536)] = 256
    """Codewords per codebook."""
    groups: Size = 1
    """Blocks of the latent vector, quantized independently."""
    group_dim: Size = 32
    """Dimensions of a block."""


class ResidualCodebookConfig(CodebookConfig):
    """Settings shared by quantizers with several layers of codebooks."""

    depth: Size = 3
    """Layers in a block, each quantizing the residual of the layers before."""
    beam: Size = 1
    """Paths kept while encoding; 1 takes every layer's nearest codeword."""
    prefix_dropout: Share = 0.0
    """Share of the training rows that are decoded from a random prefix of layers (Matryoshka training)."""


class Codebooks(Quantizer):
    """depth x groups codebooks [codes, group_dim], set by k-means from a sample, not learned by gradient.

    Args of the constructor:
        kind: the quantizer's name in specs. config: the codebooks' sizes. depth, beam, prefix_dropout: see
            `ResidualCodebookConfig`.
    """

    def __init__(
        self, kind: str, config: CodebookConfig, depth: int = 1, beam: int = 1, prefix_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.kind, self.codes, self.groups, self.group_dim = kind, config.codes, config.groups, config.group_dim
        self.depth, self.beam, self.prefix_dropout = depth, beam, prefix_dropout
        self.digits = depth * config.groups
        self.latent_blocks, self.latent_dim = config.groups, config.groups * config.group_dim
        words_DPRM = torch.randn(depth, config.groups, config.codes, config.group_dim)
        self.codebook_DPRM = nn.Parameter(words_DPRM, requires_grad=False)

    def encode(self, h_BH: Tensor) -> Tensor:
        """Return the codewords' numbers, int64 [B, digits]."""
        return nearest_paths(self.blocks(h_BH), self.codebook_DPRM, self.beam)

    def codewords(self) -> Tensor:
        """Return the codebooks, each in its group's block: [digits, codes, latent_dim]."""
        return spread_over_groups(self.codebook_DPRM)

    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits: `codes` lines of one level, because their values have no order."""
        return SidSpec(
            quantizer=self.kind,
            levels=1,
            lines=self.codes,
            digits=self.digits,
            depth=self.depth,
            groups=self.groups,
            fingerprint=fingerprint,
        )

    @torch.no_grad()
    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Set the codebooks layer by layer, each to the k-means of the residual of the layers before."""
        residual_NPM = self.blocks(h_NH)
        for words_PRM in self.codebook_DPRM:
            for group in range(self.groups):
                words_PRM[group] = kmeans(residual_NPM[:, group], self.codes, generator)
            residual_NPM = residual_NPM - take_codewords(words_PRM, self.nearest(residual_NPM, words_PRM))

    def blocks(self, h_BH: Tensor) -> Tensor:
        """Split vectors into the groups' blocks: [B, groups, group_dim]."""
        return at_least_float32(h_BH).reshape(-1, self.groups, self.group_dim)

    @staticmethod
    def nearest(residual_BPM: Tensor, words_PRM: Tensor) -> Tensor:
        """Return the nearest codewords of one layer: int64 [B, P]."""
        return nearest_paths(residual_BPM, words_PRM[None], beam=1)
