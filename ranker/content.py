"""Content at one position: in every arm, vectors of the model's width, zeros where an item has no content.

The kind of content defines how they are made (`ranker.contents.contract`). A perceptron (the ad's, the user's) or a
matrix (the history's) maps a latent vector to the model's width; table lookups have that width already.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sidestack.ranker.config import ModelConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.contents.contract import Content
from sidestack.ranker.id_feature import IdFeature
from sidestack.ranker.inputs import ModelInputs


def perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    """Return linear layers of the widths given, input first, with a ReLU between each two."""
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class NewItems(NamedTuple):
    """Rows of items that are not in the constant of raw embeddings, with the embeddings of these items.

    Attributes:
        rows_N: the rows, int64. embeddings_NE: in the constant's format (`ModelConstants.embeddings`).
    """

    rows_N: Tensor
    embeddings_NE: Tensor


class OwnContent(nn.Module):
    """The content of a row's ad, or of a request's user, as one vector.

    A latent vector through a two-layer perceptron of its own (r = 1), or embeddings of its ids.
    """

    def __init__(self, content: Content, model: ModelConfig, constants: ModelConstants) -> None:
        super().__init__()
        self.names = [table.column for table in content.tables]
        self.latent = content.latent(constants)
        self.layers: nn.Sequential | None = None
        if self.latent is not None:
            self.layers = perceptron((self.latent.width, model.content_hidden, model.embedding_dim))
        self.projection = content.projection(model.embedding_dim)

    def forward(
        self, content_NC: Tensor, known_NS: Tensor, bags: Mapping[str, Tensor], new: NewItems | None = None
    ) -> Tensor:
        """Return float [N, d], zeros where there is no content.

        Args:
            content_NC: ids of N rows or requests that the content takes without a table. known_NS: which are known.
            bags: pooled embeddings [N, d] by feature. new: rows whose latent vectors come from these embeddings.
        """
        if self.latent is None:
            return _combined([bags[name] for name in self.names], self.projection)
        assert self.layers is not None
        latent_NF, known_N = self.latent(content_NC, known_NS)
        if new is not None:
            new_NF, is_known_N = self.latent.of_embeddings(new.embeddings_NE)
            latent_NF = latent_NF.index_copy(0, new.rows_N, new_NF)
            known_N = known_N.index_copy(0, new.rows_N, is_known_N)
        content_ND: Tensor = self.layers(latent_NF) * known_N.unsqueeze(1)
        return content_ND


class HistoryContent(nn.Module):
    """The history's content: the latent vectors times Omega, or embeddings of the items' ids."""

    def __init__(self, content: Content, model: ModelConfig, constants: ModelConstants) -> None:
        super().__init__()
        dim = model.embedding_dim
        self.tables = content.tables
        self.places = [content.sids.index(table.sid) for table in self.tables if table.sid is not None]
        self.latent = content.latent(constants)
        self.omega = None if self.latent is None else nn.Parameter(torch.empty(self.latent.width, dim))
        self.projection = content.projection(dim)

    def forward(self, values_TD: Tensor, inputs: ModelInputs, sequences: Mapping[str, Tensor]) -> Tensor:
        """Return float [T, d]: the values plus the content, which is zeros where an item has none.

        Args:
            values_TD: the entries' vectors without content; may be overwritten. inputs: of T history entries.
            sequences: embeddings [T x ids an entry, d] by feature.
        """
        if self.latent is None:
            tables, known_TS = zip(self.tables, self.places, strict=True), inputs.history_known_TS
            parts = [_pooled(sequences[table.column], table) * known_TS[:, s : s + 1] for table, s in tables]
            return values_TD + _combined(parts, self.projection)
        latent_TF, _ = self.latent(inputs.history_content_TC, inputs.history_known_TS)
        assert self.omega is not None
        # In place: the copy of the values that `torch.addmm` makes takes as long as the product. Not by autocast.
        return values_TD.addmm_(latent_TF.to(values_TD.dtype), self.omega.to(values_TD.dtype))


def _pooled(values_ND: Tensor, table: IdFeature) -> Tensor:
    many = table.ids_per_entry
    return values_ND if many == 1 else values_ND.view(-1, many, values_ND.shape[1]).sum(1)


def _combined(parts: list[Tensor], projection: nn.Linear | None) -> Tensor:
    if projection is None:
        return torch.stack(parts).sum(0)
    projected: Tensor = projection(torch.cat(parts, dim=1))
    return projected
