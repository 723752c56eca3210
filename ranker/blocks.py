"""The blocks of the ranking model (SIDE paper, section 5 and Figure 3), each a module over dense tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidestack.infra.errors import DataError
from sidestack.ranker.config import ModelConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.content import HistoryContent, perceptron
from sidestack.ranker.contents.contract import Content
from sidestack.ranker.features import HISTORY_IDS
from sidestack.ranker.inputs import ModelInputs
from sidestack.ranker.pma import HistoryAttention
from sidestack.ranker.transformer import HistoryEncoder

MOST_DEVIATIONS = 5.0
"""Dense features are clamped to this many standard deviations from their mean."""


def compressed(dense_BF: Tensor) -> Tensor:
    """Return sign(x) log(1 + |x|): counts and amounts have long tails, and some features can be negative."""
    return dense_BF.sign() * dense_BF.abs().log1p()


class DenseBlock(nn.Module):
    """The dense features as one vector v, mapped to r vectors D_1(v) ... D_r(v) of width d.

    v is compressed and standardized by constants of the training rows, which are saved with the model.

    Args of the constructor:
        num_dense: F, the features. model: the sizes.
        moments_2F: mean and 1 / standard deviation of the compressed features; None: 0 and 1.
    """

    moments_2F: Tensor

    def __init__(self, num_dense: int, model: ModelConfig, moments_2F: Tensor | None = None) -> None:
        super().__init__()
        self.dim = model.embedding_dim
        if moments_2F is None:
            moments_2F = torch.stack([torch.zeros(num_dense), torch.ones(num_dense)])
        self.register_buffer("moments_2F", moments_2F)
        self.layers = perceptron((num_dense, model.dense_hidden, model.dense_outputs * self.dim))

    def forward(self, dense_BF: Tensor) -> Tensor:
        """Return float [B, r, d]."""
        mean_F, scale_F = self.moments_2F
        # Later rows may be far outside the range of training, as counts grow.
        standard_BF = ((compressed(dense_BF) - mean_F) * scale_F).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        outputs_BN: Tensor = self.layers(standard_BF)
        return outputs_BN.view(len(dense_BF), -1, self.dim)


class HistoryBlock(nn.Module):
    """The user's history as k vectors: V = item embedding + content + recency, pooled by attention.

    Optionally, a transformer encoder runs before the pooling (`HistoryConfig`); the paper has none.
    """

    def __init__(self, content: Content, model: ModelConfig, query_features: int, constants: ModelConstants) -> None:
        super().__init__()
        dim = model.embedding_dim
        self.gap = nn.Linear(1, dim)
        # Vectors, so that they start as zeros (`ranker.initial`): a random start costs up to .8 % of NE.
        self.since_entry = nn.Parameter(torch.zeros(dim))
        self.rank = nn.Parameter(torch.zeros(dim))
        self.content = None if content.is_none else HistoryContent(content, model, constants)
        history = model.history
        self.encoder = HistoryEncoder(dim, history.heads, history.encoder_layers) if history.encoder_layers else None
        self.attention = HistoryAttention(dim, history.queries, query_features, history.heads)

    def forward(self, query_BF: Tensor, embedded: Mapping[str, Tensor], inputs: ModelInputs) -> Tensor:
        """Return U, float [B, k, d]; zeros for a row without history."""
        # [T, d] is the model's largest tensor, so passes over it are costly: products are added in place.
        values_TD = torch.addmm(embedded[HISTORY_IDS], *self._recency(inputs.history_recency_FT))
        if self.content is not None:
            values_TD = self.content(values_TD, inputs, embedded)
        if self.encoder is not None:
            values_TD = self.encoder(values_TD, inputs.layout)
        history_BKD: Tensor = self.attention(query_BF, values_TD, inputs.layout)
        return history_BKD

    def _recency(self, recency_FT: Tensor) -> tuple[Tensor, Tensor]:
        """Return two matrices whose product [T, d] embeds the recency of entries; see `ModelInputs`."""
        with_one = functional.pad(recency_FT, (0, 0, 1, 0), value=1.0)
        return with_one.t(), torch.stack([self.gap.bias, self.gap.weight[:, 0], self.since_entry, self.rank])


class LowRankCross(nn.Module):
    """A low-rank DCNv2 (Wang et al. 2021): x' = x0 * (W V x + b) + x, layer after layer.

    Its weights are named as in `torchrec.modules.crossnet.LowRankCrossNet`. A served model has no torchrec.
    """

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        self.W_kernels = nn.ParameterList(torch.empty(width, rank) for _ in range(layers))
        self.V_kernels = nn.ParameterList(torch.empty(rank, width) for _ in range(layers))
        self.bias = nn.ParameterList(torch.zeros(width) for _ in range(layers))

    def forward(self, x_BN: Tensor) -> Tensor:
        """Return float [B, width]."""
        first_BN = x_BN
        for down, up, bias in zip(self.V_kernels, self.W_kernels, self.bias, strict=True):
            crossed_BN = functional.linear(functional.linear(x_BN, down), up)
            x_BN = first_BN * (crossed_BN + bias) + x_BN
        return x_BN


class Interaction(nn.Module):
    """All feature vectors concatenated, crossed by a low-rank DCNv2, then the layers shared by all tasks."""

    def __init__(self, num_vectors: int, model: ModelConfig) -> None:
        super().__init__()
        width = num_vectors * model.embedding_dim
        self.cross = LowRankCross(width, model.cross_layers, model.cross_rank)
        self.over_arch = perceptron((width, *model.over_arch))

    def forward(self, vectors_BND: Tensor) -> Tensor:
        """Return float [B, last width of over_arch]."""
        shared_BH: Tensor = self.over_arch(self.cross(vectors_BND.flatten(1)))
        return shared_BH.relu()


class Towers(nn.Module):
    """One small perceptron per task, from the shared representation to a logit."""

    def __init__(self, tasks: tuple[str, ...], model: ModelConfig) -> None:
        super().__init__()
        for task in tasks:
            if hasattr(nn.ModuleDict(), task):
                raise DataError(f"dataset.json: tasks.{task}: is an attribute of torch's modules; name it otherwise")
        widths = (model.over_arch[-1], model.tower_hidden, 1)
        self.tasks = nn.ModuleDict({task: perceptron(widths) for task in tasks})

    def forward(self, shared_BH: Tensor) -> Tensor:
        """Return logits [B, tasks], in the order of `tasks`."""
        return torch.cat([tower(shared_BH) for tower in self.tasks.values()], dim=1)
