"""A transformer encoder over histories: the entries of a history attend to each other."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sidestack.ranker.layout import HistoryLayout, padded_entries, rows_of

FEED_FORWARD = 4
"""The feed-forward part's hidden width, as a multiple of the encoder's, as in Transformer (Vaswani et al.)."""


class HistoryEncoder(nn.Module):
    """Pre-norm transformer layers over the histories of a batch.

    Attention runs over padded groups of histories of similar length, in a kernel without a matrix of scores. All else
    is computed entry by entry, without padding.

    Args of the constructor:
        dim: d, the width. heads: attention heads; must divide d. layers: how many.
    """

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads) for _ in range(layers))

    def forward(self, values_TD: Tensor, layout: HistoryLayout) -> Tensor:
        """Return the encoded values of the histories, float [T, d]."""
        for layer in self.layers:
            values_TD = layer(values_TD, layout)
        return values_TD


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each on normalized inputs and with a residual connection.

    The norms have no weights: the matrix after each can represent them. Both parts are scaled per channel by vectors
    that start as zeros (`ranker.initial`). So the layer starts as the identity, and passes the history on from the
    first step.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        assert dim % heads == 0
        self.heads = heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.project = nn.Linear(dim, 3 * dim)
        self.mix = nn.Linear(dim, dim)
        self.network = nn.Sequential(nn.Linear(dim, FEED_FORWARD * dim), nn.ReLU(), nn.Linear(FEED_FORWARD * dim, dim))
        self.attention_scale = nn.Parameter(torch.zeros(dim))
        self.network_scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x_TD: Tensor, layout: HistoryLayout) -> Tensor:
        """Return float [T, d]."""
        x_TD = x_TD + self.attention_scale * self.mix(self._attend(self.project(self.norm(x_TD)), layout))
        more_TD: Tensor = self.network_scale * self.network(self.norm(x_TD))
        return x_TD + more_TD

    def _attend(self, projected_TX: Tensor, layout: HistoryLayout) -> Tensor:
        """Return the self-attention within each history; X holds queries, keys and values, each cut into H heads."""
        width = projected_TX.shape[1] // 3
        parts = []
        for padded_GLX, group in zip(padded_entries(projected_TX, layout), layout.groups, strict=True):
            parts_GL3HP = padded_GLX.view(*group.entries_GL.shape, 3, self.heads, -1)
            q_GHLP, k_GHLP, v_GHLP = parts_GL3HP.permute(2, 0, 3, 1, 4).unbind()
            is_entry_G11L = group.is_entry_GL[:, None, None]
            attended_GHLP = scaled_dot_product_attention(q_GHLP, k_GHLP, v_GHLP, attn_mask=is_entry_G11L)
            parts.append(attended_GHLP.transpose(1, 2).reshape(-1, width))
        return rows_of(torch.cat(parts), layout.place_T) if parts else projected_TX[:, :width]
