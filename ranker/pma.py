"""The user history block: one layer of pooled multihead attention (SIDE paper, section 5; Set Transformer)."""

import math

import torch
from torch import Tensor, nn

from sidestack.ranker.attention import attend
from sidestack.ranker.layout import HistoryLayout


class HistoryAttention(nn.Module):
    """U = softmax(Q K^T / sqrt(d)) V with K = V Theta; with one head, as in the paper.

    The k queries come from the sparse and embedding features of the row, keys and values from its request. The output
    for an empty history is zeros.

    Args of the constructor:
        dim: d, the width of history embeddings and of the result.
        num_queries: k, how many vectors a row gets.
        query_features: width of the features that the queries are computed from.
        heads: number of attention heads; must divide d.
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
        """Return the attention of each row's queries to its history.

        Args:
            features_BF: the features that the queries are computed from.
            values_TD: V, the concatenated history embeddings of all requests.
            layout: which rows attend to which values.

        Returns:
            U_BKD: float [B, k, d].
        """
        means_BND = attend(self._probes(features_BF), values_TD, layout)
        # Every head has pooled the whole width; only its own part is kept.
        shape = (-1, self.num_queries, self.heads, self.heads, self.dim // self.heads)
        return means_BND.view(shape).diagonal(dim1=2, dim2=3).transpose(2, 3).flatten(2)

    def _probes(self, features_BF: Tensor) -> Tensor:
        """Return Q Theta^T, whose products with the values are the scores: [B, k * heads, d].

        Q K^T = Q (V Theta)^T = (Q Theta^T) V^T: Theta multiplies k queries per row, not all the values of its history.
        """
        part = self.dim // self.heads
        query_BKHP = self.query(features_BF).view(-1, self.num_queries, self.heads, part)
        theta_DHP = self.theta.view(self.dim, self.heads, part) / math.sqrt(part)
        return torch.einsum("bkhp,dhp->bkhd", query_BKHP, theta_DHP).flatten(1, 2)
