"""A transformer encoder over jagged rows: the entries of a row attend to each other, without padding."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

FEED_FORWARD = 4
"""The feed-forward part's hidden width, in widths of the encoder; what Transformer (Vaswani et al.) has."""


class JaggedEncoder(nn.Module):
    """Pre-norm transformer layers over rows of different lengths.

    Rows of equal length attend together, as one dense batch: no entry is padded, the kernel keeps no matrix of scores,
    and there are never more than sqrt(2 T) groups for T entries. A GPU is asked once a batch for the lengths.

    Args of the constructor:
        dim: d, the width. heads: of the attention; they divide d. layers: how many.
    """

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads) for _ in range(layers))

    def forward(self, values_TD: Tensor, offsets_B1: Tensor) -> Tensor:
        """Return float [T, d]; row b owns entries offsets[b] to offsets[b + 1], before and after."""
        order_T, groups = by_length(offsets_B1, len(values_TD))
        x_TD = values_TD[order_T]
        for layer in self.layers:
            x_TD = layer(x_TD, groups)
        encoded_TD: Tensor = x_TD[order_T.argsort()]
        return encoded_TD


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each on normalized inputs and added to what it was given.

    The norms have no weights: the matrix after each can do all that they would. Both parts are scaled, a factor a
    channel, by vectors that start as zeros (`ranker.initial`), so that the layer starts as the identity and what the
    history holds is heard from the first step.
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

    def forward(self, x_TD: Tensor, groups: list[tuple[int, int]]) -> Tensor:
        """Return float [T, d] for rows in groups of equal length; see `by_length`."""
        x_TD = x_TD + self.attention_scale * self.mix(self._attend(self.project(self.norm(x_TD)), groups))
        more_TD: Tensor = self.network_scale * self.network(self.norm(x_TD))
        return x_TD + more_TD

    def _attend(self, projected_TX: Tensor, groups: list[tuple[int, int]]) -> Tensor:
        """Let entries of a row attend to each other; X holds queries, keys and values, each cut into H heads."""
        width = projected_TX.shape[1] // 3
        parts = []
        for part_NX, (rows, length) in zip(
            torch.split_with_sizes(projected_TX, [r * n for r, n in groups]), groups, strict=True
        ):
            q_RHLP, k_RHLP, v_RHLP = part_NX.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
            attended_RHLP = scaled_dot_product_attention(q_RHLP, k_RHLP, v_RHLP)
            parts.append(attended_RHLP.transpose(1, 2).reshape(-1, width))
        return torch.cat(parts) if parts else projected_TX[:, :width]


def by_length(offsets_B1: Tensor, num_entries: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Order the entries so that rows of equal length lie side by side.

    Args:
        offsets_B1: int64; row b owns entries offsets[b] to offsets[b + 1]. num_entries: T.

    Returns:
        Which entry comes when, int64 [T]; and (rows, length) of every group of rows, empty rows left out.
    """
    lengths_B, order_B = offsets_B1.diff().sort(stable=True)
    shift_B = offsets_B1[:-1][order_B] - (lengths_B.cumsum(0) - lengths_B)
    order_T = torch.arange(num_entries, device=offsets_B1.device)
    order_T = order_T + shift_B.repeat_interleave(lengths_B, output_size=num_entries)
    length_G, rows_G = torch.unique_consecutive(lengths_B, return_counts=True)  # type: ignore[no-untyped-call]
    groups = torch.stack([rows_G, length_G], dim=1).tolist()
    return order_T, [(rows, length) for rows, length in groups if length]
