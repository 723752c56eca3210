"""Residual k-means: layers of k-means, each of the residual of the layers before; nothing learned by gradient.

Source: paper section 2 (i). By the straight-through gradient, the network still learns vectors that it quantizes well.
"""

from typing import Literal

from sidestack.encoder.quantizers.codebooks import Codebooks, ResidualCodebookConfig


class ResidualKmeansConfig(ResidualCodebookConfig):
    """Settings of residual k-means."""

    kind: Literal["residual_kmeans"] = "residual_kmeans"

    def build(self) -> Codebooks:
        """Make the quantizer."""
        return Codebooks(self.kind, self, self.depth, self.beam, self.prefix_dropout)
