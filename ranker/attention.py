"""Attention of rows to the histories of their requests, by torch's fused kernel over groups of similar size."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sidestack.ranker.layout import HistoryLayout, padded_entries, padded_rows, rows_of


def attend(probes_BND: Tensor, values_TD: Tensor, layout: HistoryLayout) -> Tensor:
    """Return each row's N attention outputs: its history's values, weighted by the softmax of their scores.

    The scores are the products of values and probes. A value is gathered once per request, whatever the number of its
    rows, and no matrix of scores is kept.

    Args:
        probes_BND: N vectors of each row. values_TD: the values of all histories. Under autocast they may be
            bfloat16; the sums over many entries are taken in float32.
        layout: which rows attend to which values.

    Returns:
        float32 [B, N, D]; zeros for a row without history.
    """
    with torch.autocast(values_TD.device.type, enabled=False):
        probes_BX, values_TD = probes_BND.float().flatten(1), values_TD.float()
        vectors, dim = probes_BND.shape[1:]
        if not layout.groups:  # zeros with a gradient: ranks must average the gradients of the same parameters
            return probes_BX.view(-1, vectors, dim) * 0 + values_TD.sum() * 0
        parts = []
        padded = zip(padded_rows(probes_BX, layout), padded_entries(values_TD, layout), layout.groups, strict=True)
        for probes_GMX, values_GLD, group in padded:
            probes_G1QD, values_G1LD = probes_GMX.view(len(probes_GMX), 1, -1, dim), values_GLD.unsqueeze(1)
            is_entry_G11L = group.is_entry_GL[:, None, None]
            means_G1QD = scaled_dot_product_attention(
                probes_G1QD, values_G1LD, values_G1LD, attn_mask=is_entry_G11L, scale=1.0
            )
            parts.append(means_G1QD.reshape(-1, vectors * dim))
        parts.append(probes_BX.new_zeros(1, vectors * dim))
        return rows_of(torch.cat(parts), layout.place_B).view(-1, vectors, dim)
