"""Top-k k-means: a vector's k nearest centroids, nearest first; nothing learned by gradient.

The clustering baseline of ranking models: cluster ids as a bag of categories. A SID decodes to the nearest centroid;
the other digits name further near centroids and add nothing.
"""

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sidestack.encoder.quantizers.clustering import kmeans
from sidestack.encoder.quantizers.contract import Quantizer, QuantizerConfig, Size, at_least_float32
from sidestack.encoder.sid.spec import SidSpec


class TopkKmeansConfig(QuantizerConfig):
    """Settings of top-k k-means."""

    not_searched: ClassVar[str] = "topk_kmeans decodes its first digit alone, there is nothing to search"
    kind: Literal["topk_kmeans"] = "topk_kmeans"
    clusters: Annotated[int, Field(ge=2, le=2**24)] = 1024
    """Number of centroids."""
    k: Size = 1
    """Number of nearest centroids, one digit each."""
    latent_dim: Size = 32
    """Dimensions of the latent vector."""

    @model_validator(mode="after")
    def _check_clusters(self) -> Self:
        if self.k > self.clusters:
            raise ValueError(f"k {self.k} must be at most clusters {self.clusters}")
        return self

    def build(self) -> "TopkKmeans":
        """Make the quantizer."""
        return TopkKmeans(self)


class TopkKmeans(Quantizer):
    """The quantizer to the k nearest centroids; see the module's text."""

    centroids_CH: Tensor

    def __init__(self, config: TopkKmeansConfig) -> None:
        super().__init__()
        self.config = config
        self.digits, self.latent_dim = config.k, config.latent_dim
        self.register_buffer("centroids_CH", torch.randn(config.clusters, config.latent_dim))

    def encode(self, h_BH: Tensor) -> Tensor:
        """Return the nearest centroids, nearest first: int64 [B, k]."""
        h_BH = at_least_float32(h_BH)
        cost_BC = torch.addmm(self.centroids_CH.square().sum(-1), h_BH, self.centroids_CH.T, alpha=-2)
        return cost_BC.topk(self.config.k, largest=False).indices

    def codewords(self) -> Tensor:
        """Return the centroids for the first digit and zeros for all others: [k, clusters, latent_dim]."""
        table_KCH = self.centroids_CH.new_zeros(self.config.k, *self.centroids_CH.shape)
        table_KCH[0] = self.centroids_CH
        return table_KCH

    def decode(self, digits_BN: Tensor, kept_BN: Tensor | None = None) -> Tensor:
        """Return the nearest centroid, as the base class does, without a table of k times the centroids."""
        h_hat_BH = self.centroids_CH[digits_BN[:, 0]]
        return h_hat_BH if kept_BN is None else h_hat_BH * kept_BN[:, :1]

    def sid_spec(self, fingerprint: str) -> SidSpec:
        """Describe the digits: k clusters in one layer, nearest first; a prefix is a smaller k.

        One layer, because no digit refines another: as k layers, evaluation by depth would decode the same vector k
        times.
        """
        return SidSpec(
            quantizer=self.config.kind,
            levels=1,
            lines=self.config.clusters,
            digits=self.digits,
            depth=1,
            groups=self.digits,
            fingerprint=fingerprint,
        )

    @torch.no_grad()
    def start(self, h_NH: Tensor, generator: torch.Generator) -> None:
        """Set the centroids by k-means of a sample."""
        self.centroids_CH.copy_(kmeans(at_least_float32(h_NH), self.config.clusters, generator))
