"""The user history block: one layer of pooled multihead attention (SIDE paper, section 5; Set Transformer)."""

import math

import torch
from torch import Tensor, nn

from sidestack.ranker.attention import attend
from sidestack.ranker.layout import HistoryLayout


class HistoryAttention(nn.Module):
    """U = softmax(Q K^T / sqrt(d)) V with K = V Theta; with one head as the paper writes it.

    The k queries come from the sparse and embedding features of the row, keys and values from its request. An empty
    history gives zeros.

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

    def forward(self, features_BF: Tensor, values_TD: Tensor, layout: HistoryLayout) -> Tensor:
        """Attend.

        Args:
            features_BF: what the queries come from.
            values_TD: V, the history embeddings of all requests one after another.
            layout: which rows attend to which values.

        Returns:
            U_BKD: float [B, k, d].
        """
        means_BND = attend(self._probes(features_BF), values_TD, layout)
        # Every head has pooled the whole width; its own part of it is what counts.
        shape = (-1, self.num_queries, self.heads, self.heads, self.dim // self.heads)
        return means_BND.view(shape).diagonal(dim1=2, dim2=3).transpose(2, 3).flatten(2)

    def _probes(self, features_BF: Tensor) -> Tensor:
        """Return what a value's scores are its products with: [B, k * heads, d].

        Q K^T = Q (V Theta)^T = (Q Theta^T) V^T: Theta meets k queries a row, not all the values of its history.
        """
        part = self.dim // self.heads
        query_BKHP = self.query(features_BF).view(-1, self.num_queries, self.heads, part)
        theta_DHP = self.theta.view(self.dim, self.heads, part) / math.sqrt(part)
        return torch.einsum("bkhp,dhp->bkhd", query_BKHP, theta_DHP).flatten(1, 2)
