"""Product quantization: k-means of each block of the vector independently; nothing learned by gradient.

Source: paper section 2 (ii), [6].
"""

from typing import Literal

from sidestack.encoder.quantizers.codebooks import CodebookConfig, Codebooks
from sidestack.encoder.quantizers.contract import Size


class ProductConfig(CodebookConfig):
    """Settings of product quantization."""

    kind: Literal["product"] = "product"
    groups: Size = 3
    """Blocks of the latent vector, one digit each."""
    group_dim: Size = 8
    """Dimensions of a block."""

    def build(self) -> Codebooks:
        """Make the quantizer."""
        return Codebooks(self.kind, self)
