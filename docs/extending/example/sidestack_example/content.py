"""A kind of content: raw embeddings, projected to a few dimensions by a fixed random matrix.

It keeps about the distances that `dense` has (Johnson and Lindenstrauss, 1984), in fewer bytes an item.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.contents.contract import Color
from sidestack.ranker.contents.dense import Dense, RawEmbedding

WIDTH = 8


class Projection(RawEmbedding):
    """Projected embeddings by id; it has no weights."""

    matrix_EW: Tensor

    def __init__(self, embeddings_IE: Tensor) -> None:
        width = embeddings_IE.shape[1]
        matrix_EW = torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
        matrix_EW = matrix_EW.to(embeddings_IE.device)  # the meta device, where tables are only planned
        super().__init__(embeddings_IE.float() @ matrix_EW)
        self.register_buffer("matrix_EW", matrix_EW, persistent=False)

    def of_embeddings(self, embeddings_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Project new items' embeddings, which come with a request, as well."""
        return super().of_embeddings(embeddings_NE.float() @ self.matrix_EW)


@dataclass(frozen=True)
class Projected(Dense):
    """It reads what `dense` reads, and computes and costs something else."""

    color = Color(light="#8250df", dark="#c297ff")

    @property
    def embedding_bytes(self) -> float:
        """2 bytes a dimension, of those that are left."""
        return 2.0 * WIDTH

    def latent(self, constants: ModelConstants) -> Projection:
        """Return the lookup by id; a perceptron or a matrix takes its vectors to the model's width."""
        return Projection(constants.embeddings[self.entity])
