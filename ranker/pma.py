"""The user history block: one layer of pooled multihead attention (SIDE paper, section 5; Set Transformer)."""

import math

import torch
from torch import Tensor, nn


class HistoryAttention(nn.Module):
    """U = softmax(Q K^T / sqrt(d)) V with K = V Theta, one head, as the paper writes it.

    The k queries come from the sparse and embedding features of the row. An empty history gives zeros.

    Args of the constructor:
        dim: d, the width of history embeddings and of the result.
        num_queries: k, how many vectors to give a row.
        query_features: width of the features that the queries are derived from.
    """

    def __init__(self, dim: int, num_queries: int, query_features: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_queries = num_queries
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
        query_BKD = self.query(features_BF).view(-1, self.num_queries, self.dim)
        values_BLD = torch.ops.fbgemm.jagged_to_padded_dense(values_TD, [offsets_B1], [max(longest, 1)], 0.0)
        # Q K^T = Q (V Theta)^T = (Q Theta^T) V^T: Theta meets k queries a row, not all l values.
        folded_BKD = query_BKD @ self.theta.t()
        scores_BKL = folded_BKD @ values_BLD.transpose(1, 2) / math.sqrt(self.dim)
        lengths_B = offsets_B1.diff()
        is_padding_BL = torch.arange(values_BLD.shape[1], device=lengths_B.device) >= lengths_B.unsqueeze(1)
        # The lowest finite number, not -inf: a row without history then weighs zeros evenly instead of making NaN.
        lowest = torch.finfo(scores_BKL.dtype).min
        weights_BKL = scores_BKL.masked_fill(is_padding_BL.unsqueeze(1), lowest).softmax(dim=-1)
        history_BKD: Tensor = weights_BKL @ values_BLD
        return history_BKD
