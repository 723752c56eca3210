"""Content at one position: whatever the arm, vectors of the model's width, zeros where an item has no content.

What is unpacked or raw (`side`, `dense`) is a latent vector, which a perceptron (the ad's, the user's) or a matrix
(the history's) takes to the model's width. What is looked up (`kmeans`, `sid_ngram`, `hde`) has that width already.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.config import ModelConfig
from ranker.features import ArmFeatures, Content, IdFeature
from ranker.frozen import Frozen
from ranker.inputs import ModelInputs
from ranker.side import sid_unpack


def perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    """Return linear layers of the widths given, input first, with a ReLU between each two."""
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class NewItems(NamedTuple):
    """Rows whose items the constant of raw embeddings does not have, though their embeddings are known.

    Attributes:
        rows_N: the rows, int64. embeddings_NE: as the constant would have them (`ranker.frozen.Frozen.embeddings`).
    """

    rows_N: Tensor
    embeddings_NE: Tensor


class Unpacked(nn.Module):
    """The latent vectors of one or more sets of SIDs, side by side; it has no weights."""

    def __init__(self, content: Content, scale_steps: bool, frozen: Frozen) -> None:
        super().__init__()
        sets = [sid_unpack(sid, scale_steps, frozen.codebooks) for sid in content.held]
        self.sets = nn.ModuleList(sets)
        self.sizes = [len(sid.chunk_sizes) for sid in content.held]
        self.width = sum(one.width for one in sets)

    def forward(self, sids_NC: Tensor, known_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent vectors [N, width], zeros for a null SID, and bool [N]: whether there is any SID.

        Args:
            sids_NC: int64, the columns of all sets. known_NS: bool, whether the SID of each set is known.
        """
        columns = zip(self.sets, torch.split(sids_NC, self.sizes, dim=1), known_NS.unbind(1), strict=True)
        parts = [unpack(part_NC, known_N) for unpack, part_NC, known_N in columns]
        return torch.cat(parts, dim=1) if parts[1:] else parts[0], known_NS.any(1)


class RawEmbedding(nn.Module):
    """The items' or users' embeddings as they are, from a constant that every rank holds; it has no weights."""

    embeddings_IE: Tensor
    known_I: Tensor

    def __init__(self, embeddings_IE: Tensor) -> None:
        super().__init__()
        self.width = embeddings_IE.shape[1]
        self.register_buffer("embeddings_IE", embeddings_IE, persistent=False)
        self.register_buffer("known_I", embeddings_IE.ne(0).any(1), persistent=False)

    def forward(self, ids_N1: Tensor, known_N0: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 [N, width], zeros where there is no embedding, and bool [N]: whether there is one.

        Args:
            ids_N1: int64, the items' or users' own ids. known_N0: of no use; the constant says what is known.
        """
        ids_N = ids_N1[:, 0]
        return self.embeddings_IE.index_select(0, ids_N).float(), self.known_I.index_select(0, ids_N)


def latent_of(features: ArmFeatures, content: Content, frozen: Frozen) -> Unpacked | RawEmbedding | None:
    """Return what makes a position's latent vectors; None where its content is looked up."""
    if content.kind == "side":
        return Unpacked(content, features.scale_steps, frozen)
    return RawEmbedding(frozen.embeddings[content.entity]) if content.kind == "dense" else None


class OwnContent(nn.Module):
    """What a row has once, the ad's content, or a request, the user's: one vector.

    A latent vector through a two-layer perceptron of its own (r = 1), or embeddings of its ids.
    """

    def __init__(self, features: ArmFeatures, content: Content, model: ModelConfig, frozen: Frozen) -> None:
        super().__init__()
        self.names = [feature.column for feature in features.bag_contents(content.entity)]
        self.latent = latent_of(features, content, frozen)
        self.layers: nn.Sequential | None = None
        if self.latent is not None:
            self.layers = perceptron((self.latent.width, model.content_hidden, model.embedding_dim))
        self.projection = _projection(content, self.names, model.embedding_dim)

    def forward(
        self, content_NC: Tensor, known_NS: Tensor, bags: Mapping[str, Tensor], new: NewItems | None = None
    ) -> Tensor:
        """Return float [N, d], zeros where there is no content.

        Args:
            content_NC: the ids of N rows, or of N requests, that are taken as they are. known_NS: which are known.
            bags: pooled embeddings [N, d] by feature. new: rows whose latent vectors are these.
        """
        if self.latent is None:
            return _combined([bags[name] for name in self.names], self.projection)
        assert self.layers is not None
        latent_NF, known_N = self.latent(content_NC, known_NS)
        if new is not None:
            latent_NF = latent_NF.index_copy(0, new.rows_N, new.embeddings_NE.float())
            known_N = known_N.index_copy(0, new.rows_N, new.embeddings_NE.ne(0).any(1))
        content_ND: Tensor = self.layers(latent_NF) * known_N.unsqueeze(1)
        return content_ND


class HistoryContent(nn.Module):
    """The history's content: the latent vectors times Omega, or embeddings of the items' ids."""

    def __init__(self, features: ArmFeatures, model: ModelConfig, frozen: Frozen) -> None:
        super().__init__()
        dim = model.embedding_dim
        self.tables = features.sequence_contents
        self.places = [features.history.sids.index(table.sid) for table in self.tables if table.sid is not None]
        self.latent = latent_of(features, features.history, frozen)
        self.omega = None if self.latent is None else nn.Parameter(torch.empty(self.latent.width, dim))
        self.projection = _projection(features.history, self.tables, dim)

    def forward(self, values_TD: Tensor, inputs: ModelInputs, sequences: Mapping[str, Tensor]) -> Tensor:
        """Return float [T, d]: the values plus the content, which is zeros where an item has none.

        Args:
            values_TD: what entries are without content; may be overwritten. inputs: of T history entries.
            sequences: embeddings [T x ids an entry, d] by feature.
        """
        if self.latent is None:
            tables, known_TS = zip(self.tables, self.places, strict=True), inputs.history_known_TS
            parts = [_pooled(sequences[table.column], table) * known_TS[:, s : s + 1] for table, s in tables]
            return values_TD + _combined(parts, self.projection)
        latent_TF, _ = self.latent(inputs.history_content_TC, inputs.history_known_TS)
        assert self.omega is not None
        # In place: a copy of the values first, as `torch.addmm` makes, takes as long as the product. Not by autocast.
        return values_TD.addmm_(latent_TF.to(values_TD.dtype), self.omega.to(values_TD.dtype))


def _projection(content: Content, tables: Sequence[object], dim: int) -> nn.Linear | None:
    """Return the layer of a hierarchical discrete embedding; without a bias, so that no content stays zeros."""
    return nn.Linear(len(tables) * dim, dim, bias=False) if content.kind == "hde" else None


def _pooled(values_ND: Tensor, table: IdFeature) -> Tensor:
    many = table.ids_per_entry
    return values_ND if many == 1 else values_ND.view(-1, many, values_ND.shape[1]).sum(1)


def _combined(parts: list[Tensor], projection: nn.Linear | None) -> Tensor:
    if projection is None:
        return torch.stack(parts).sum(0)
    projected: Tensor = projection(torch.cat(parts, dim=1))
    return projected
