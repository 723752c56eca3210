"""The items' or users' raw embeddings, looked up by id in a constant that every rank holds."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from sidestack.infra.errors import DataError
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.contents.contract import Color, Content, Latent, Place


class RawEmbedding(Latent):
    """Embeddings by id; it has no weights."""

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
            ids_N1: int64, the items' or users' own ids. known_N0: unused; the constant has which ids are known.
        """
        ids_N = ids_N1[:, 0]
        return self.embeddings_IE.index_select(0, ids_N).float(), self.known_I.index_select(0, ids_N)

    def of_embeddings(self, embeddings_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for new items' embeddings."""
        return embeddings_NE.float(), embeddings_NE.ne(0).any(1)


@dataclass(frozen=True)
class Dense(Content):
    """Raw embeddings: the arm's `embeddings`, or all."""

    color = Color("#009e73", "#3fcf9f")

    @classmethod
    def at(cls, place: Place) -> Self:
        """Return content that reads the item's or user's own id."""
        return cls(place.position, columns=(place.id_column,), embeddings=_embeddings(place))

    def latent(self, constants: ModelConstants) -> RawEmbedding:
        """Return the lookup by id."""
        return RawEmbedding(constants.embeddings[self.entity])


def _embeddings(place: Place) -> dict[str, int]:
    asked, spec = place.arm.embeddings, place.spec
    every = {**spec.embeddings, **spec.user_embeddings}
    for name in asked:
        if name not in every:
            known = ", ".join(every) or "none"
            raise DataError(f"arm content {place.kind!r}: there is no embedding {name!r}; the dataset has {known}")
    offered = spec.content(place.entity).embeddings
    chosen = {name: dim for name, dim in offered.items() if not asked or name in asked}
    if not chosen:
        named = f" of {list(asked)}" if asked else ""
        raise DataError(f"arm content {place.kind!r}: the {place.entity}s have no embedding{named}")
    return chosen
