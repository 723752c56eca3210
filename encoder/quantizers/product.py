"""Product quantization: k-means of every block of the vector by itself; nothing learned by gradient.

Source: paper section 2 (ii), [6].
"""

from typing import Annotated, Literal

from pydantic import Field

from encoder.quantizers.codebooks import CodebookConfig, Codebooks


class ProductConfig(CodebookConfig):
    """Settings of product quantization."""

    kind: Literal["product"] = "product"
    groups: Annotated[int, Field(ge=1)] = 3
    """Blocks of the latent vector, one digit each."""
    group_dim: Annotated[int, Field(ge=1)] = 8
    """Dimensions of a block."""

    def build(self) -> Codebooks:
        """Make the quantizer."""
        return Codebooks(self.kind, self)
