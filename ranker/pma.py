"""The user history block: one layer of pooled multihead attention (SIDE paper, section 5; Set Transformer)."""

import math

import torch
from torch import Tensor, nn

from ranker.jagged import attend


class HistoryAttention(nn.Module):
    """U = softmax(Q K^T / sqrt(d)) V with K = V Theta; with one head as the paper writes it.

    The k queries come from the sparse and embedding features of the row. An empty history gives zeros. Histories stay
    jagged from end to end: nothing is padded, so that one long history costs its own length and no more.

    Args of the constructor:
        dim: d, the width of history embeddings and of the result.
        num_queries: k, how many vectors to give a row.
        query_features: width of the features that the queries are derived from.
        heads: into how many parts queries, keys and values are cut; each attends for itself. They divide d.
    """

    def __init__(self, dim: int, num_queries: int, query_features: int, heads: int = 1) -> None:
        super().__init__()
        assert dim % heads == 0
        self.dim = dim
        self.num_queries = num_queries
        self.heads = heads
        self.query = nn.Linear(query_features, num_queries * dim)
        self.theta = nn.Parameter(torch.empty(dim, dim))

    def forward(self, features_BF: Tensor, values_TD: Tensor, offsets_B1: Tensor, longest: int) -> Tensor:
        """Attend.

        Args:
            features_BF: what the queries come from.
            values_TD: V, the history embeddings of all rows one after another.
            offsets_B1: int [B + 1]; row b owns values offsets[b] to offsets[b + 1].
            longest: the longest history in the batch, known on the host, so that a GPU need not be asked.

        Returns:
            U_BKD: float [B, k, d].
        """
        means_NBD = attend(self._probes(features_BF), values_TD, offsets_B1, longest)
        # Every head has pooled the whole width; its own part of it is what counts.
        shape = (self.num_queries, self.heads, -1, self.heads, self.dim // self.heads)
        return means_NBD.view(shape).diagonal(dim1=1, dim2=3).permute(1, 0, 3, 2).flatten(2)

    def _probes(self, features_BF: Tensor) -> Tensor:
        """Return what a value's scores are its products with: [k * heads, B, d].

        Q K^T = Q (V Theta)^T = (Q Theta^T) V^T: Theta meets k queries a row, not all the values of its history.
        """
        part = self.dim // self.heads
        query_BKHP = self.query(features_BF).view(-1, self.num_queries, self.heads, part)
        theta_DHP = self.theta.view(self.dim, self.heads, part) / math.sqrt(part)
        return torch.einsum("bkhp,dhp->khbd", query_BKHP, theta_DHP).flatten(0, 1)
