"""The network between looked-up vectors and logits; it needs neither torchrec nor fbgemm."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sidestack.ranker.blocks import DenseBlock, HistoryBlock, Interaction, Towers
from sidestack.ranker.config import ModelConfig, RankerConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.content import NewItems, OwnContent
from sidestack.ranker.contents.contract import Content
from sidestack.ranker.features import ITEM_IDS, ArmFeatures
from sidestack.ranker.inputs import ModelInputs, Vectors
from sidestack.ranker.layout import rows_of

USER_CONTENT = "the user's content"


class Body(nn.Module):
    """Everything between the looked-up embeddings and the logits (SIDE paper, Figure 3).

    Every arm has the same vectors in the same places, zeros where it has no content for the ad or user. Therefore all
    weights except the content's own have the same shapes and the same initial values in all arms.
    """

    def __init__(self, features: ArmFeatures, config: RankerConfig, constants: ModelConstants) -> None:
        super().__init__()
        model = config.model
        self.in_bfloat16 = config.training.precision == "bfloat16"
        self.ids = tuple(feature.column for feature in features.ids)
        self.dense = DenseBlock(len(features.dense), model, constants.dense_2F) if features.dense else None
        self.content = _own_content(features.item, model, constants)
        self.user_content = _own_content(features.user, model, constants)
        self.has_user_place = features.has_user_place
        query_vectors = len(self.ids) + 1 + self.has_user_place  # ids, the ad's content, and the user's
        # The vectors that the attention queries are made from: all, or the ad's own.
        ads_own = [self.ids.index(ITEM_IDS), len(self.ids)]
        self.asking = ads_own if model.history.pooling == "target" else None
        asking_vectors = query_vectors if self.asking is None else len(self.asking)
        self.history = HistoryBlock(features.history, model, asking_vectors * model.embedding_dim, constants)
        dense_vectors = model.dense_outputs if features.dense else 0
        self.interaction = Interaction(query_vectors + dense_vectors + model.history.queries, model)
        self.towers = Towers(tuple(features.tasks), model)

    def forward(self, inputs: ModelInputs, vectors: Vectors, new: NewItems | None = None) -> Tensor:
        """Return logits [B, tasks], float32 in any precision.

        Args:
            inputs, vectors: of the rows. new: rows with raw embeddings of their own; only serving requests have them.
        """
        with torch.autocast(inputs.dense_BF.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            return self._logits(inputs, *vectors, new).float()

    def _logits(
        self,
        inputs: ModelInputs,
        of_row: Mapping[str, Tensor],
        of_request: Mapping[str, Tensor],
        of_entry: Mapping[str, Tensor],
        new: NewItems | None,
    ) -> Tensor:
        shared = {name: of_request[name] for name in self.ids if name in of_request}
        if self.user_content is not None:
            shared[USER_CONTENT] = self.user_content(inputs.user_content_RC, inputs.user_known_RS, of_request)
        known = {**of_row} | dict(zip(shared, _expand_to_rows([*shared.values()], inputs.request_B), strict=True))
        vectors = [known[name] for name in self.ids]
        none_BD = torch.zeros_like(vectors[0])
        content = self.content
        vectors.append(
            none_BD if content is None else content(inputs.item_content_BC, inputs.item_known_BS, of_row, new)
        )
        if self.has_user_place:
            vectors.append(known.get(USER_CONTENT, none_BD))
        features_BFD = torch.stack(vectors, dim=1)
        asking_BFD = features_BFD if self.asking is None else features_BFD[:, self.asking]
        history_BKD = self.history(asking_BFD.flatten(1), of_entry, inputs)
        vectors = [features_BFD, history_BKD]
        if self.dense is not None:
            vectors.append(self.dense(inputs.dense_BF))
        logits_BT: Tensor = self.towers(self.interaction(torch.cat(vectors, dim=1)))
        return logits_BT


def _expand_to_rows(vectors: list[Tensor], request_B: Tensor) -> tuple[Tensor, ...]:
    """Return vectors [R, D] of requests expanded to rows, each [B, D]."""
    rows_BX = rows_of(torch.cat(vectors, dim=1), request_B)
    return torch.split_with_sizes(rows_BX, [vector.shape[1] for vector in vectors], dim=1)


def _own_content(content: Content, model: ModelConfig, constants: ModelConstants) -> OwnContent | None:
    return None if content.is_none else OwnContent(content, model, constants)
