"""The interface of a kind of content: what it reads and looks up at a position, and how that becomes a vector.

A kind is a subclass of `Content` in its own module. Its content is looked up in tables, whose rows already have the
model's width, or it is a latent vector computed by `latent`. A perceptron (the ad's, the user's) or a matrix (the
history's) maps the latent vector to the model's width (`ranker.content`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

from torch import Tensor, nn

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.errors import SpecError
from sidestack.infra.tables import DatasetSpec, Entity
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.id_feature import IdFeature

if TYPE_CHECKING:  # circular: `ArmConfig` needs the kinds' names
    from sidestack.ranker.config.arms import ArmConfig

Sids = Mapping[str, SidSpec]
Position = Literal["item", "history", "user"]
OWN_IDS: Mapping[Position, str] = {"item": "item_id", "history": "history_item_ids", "user": "user_id"}
"""The column of the items' or users' own ids at each position."""


class Color(NamedTuple):
    """The colour of a kind's arm in figures, as `#rrggbb`, on a light page and on a dark one."""

    light: str
    dark: str


def entity_at(position: Position) -> Entity:
    """Return the entity whose content is at a position; a history is of items."""
    return "user" if position == "user" else "item"


@dataclass(frozen=True)
class Place:
    """A position of an arm over a dataset, where content is used.

    Attributes:
        kind: the kind's name, for messages. position: the ad's own, the history's, or the user's.
        arm: the arm's settings. sids: the dataset's sets of SIDs by name. spec: the dataset's description.
    """

    kind: str
    position: Position
    arm: "ArmConfig"
    sids: Sids
    spec: DatasetSpec

    @property
    def entity(self) -> Entity:
        """The entity whose content is used."""
        return entity_at(self.position)

    @property
    def id_column(self) -> str:
        """The column of the items' or users' own ids."""
        return OWN_IDS[self.position]

    @property
    def num_ids(self) -> int:
        """The number of items or users."""
        return self.spec.content(self.entity).rows

    @property
    def of_request(self) -> bool:
        """Whether the content is stored once per request, for all its impressions."""
        return self.position != "item"

    def own_sids(self) -> tuple[SidSpec, ...]:
        """Return the arm's sets of SIDs for the entity.

        Raises:
            SpecError: the dataset lacks one, or none is for the entity.
        """
        for name in self.arm.sids:
            if name not in self.sids:
                known = ", ".join(self.sids) or "none"
                raise SpecError(f"arm content {self.kind!r}: the dataset has no SIDs {name!r}; it has {known}")
        taken = tuple(self.sids[name] for name in self.arm.sids if self.sids[name].entity == self.entity)
        if not taken:
            raise SpecError(
                f"arm content {self.kind!r}: sids={list(self.arm.sids)} are none of {self.entity}s, which"
                f" {self.position} asks for"
            )
        return taken

    def stem(self, sid: SidSpec) -> str:
        """Return the stem of a set's column names (`encoder.sid.sid_columns`)."""
        return sid.event_history_base if self.position == "history" else sid.event_base

    def prefix(self, sid: SidSpec, length: int) -> SidSpec:
        """Return the spec of a materialized prefix, or of the whole SID.

        Raises:
            SpecError: the dataset has no such column.
        """
        if length not in (*sid.prefix_lengths, sid.digits):
            known = ", ".join(map(str, sid.prefix_lengths)) or "none"
            raise SpecError(
                f"arm content {self.kind!r}: the SIDs {sid.name!r} have no prefix of {length} digits;"
                f" materialize.prefix_lengths has {known}"
            )
        return sid.of_prefix(length)


class Latent(nn.Module, ABC):
    """A module that computes the latent vectors, `width` wide, of N rows, requests or history entries."""

    width: int

    @abstractmethod
    def forward(self, ids_NC: Tensor, known_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 [N, width], zeros where there is no content, and bool [N]: whether there is some.

        Args:
            ids_NC: int64, of `Content.columns`. known_NS: bool, whether each of `Content.known` is not null.
        """

    def of_embeddings(self, embeddings_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for new items, from embeddings of a serving request, scaled like the constant's.

        Called only if the content takes embeddings (`Content.embeddings`).
        """
        raise NotImplementedError(f"{type(self).__name__} takes no embeddings")


@dataclass(frozen=True)
class Content(ABC):
    """A kind of content at one position: the ad's own, the history's, or the user's.

    Attributes:
        position: where it is. sids: the sets of Semantic IDs that it takes, each by the spec of the whole SID.
        tables: the id features that it is looked up in, each for a set of `sids`.
        columns: events columns whose ids the model takes directly, without a table.
        known: for each set a column that is null where an item has no SID; the model gets a mask of the others.
        embeddings: signals whose raw embeddings it takes from the items or users, name -> dimensions.
    """

    takes_sids: ClassVar[bool] = False
    """Whether the kind takes Semantic IDs."""
    color: ClassVar[Color | None] = None
    """Colour of the arm that is named after the kind; None: one of the colours for other arms."""

    position: Position
    sids: tuple[SidSpec, ...] = ()
    tables: tuple[IdFeature, ...] = ()
    columns: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    embeddings: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    @abstractmethod
    def at(cls, place: Place) -> Self:
        """Return the kind's content at a place: what it reads and looks up.

        Raises:
            SpecError: the dataset's SIDs do not fit. DataError: the dataset has no such embedding.
        """

    @classmethod
    def from_tables(cls, place: Place, tables: Iterable[IdFeature]) -> Self:
        """Return content that is looked up in tables of SIDs."""
        tables = tuple(tables)
        first: dict[SidSpec, str] = {}
        for table in tables:
            assert table.sid is not None
            first.setdefault(table.sid, table.columns[0])
        # An empty bag is zeros already; a sequence needs a mask of its placeholder entries.
        known = tuple(first.values()) if place.position == "history" else ()
        return cls(place.position, tuple(first), tables, known=known)

    @property
    def entity(self) -> Entity:
        """The entity whose content it is."""
        return entity_at(self.position)

    @property
    def is_none(self) -> bool:
        """Whether nothing is read, so that there is nothing to compute."""
        return not (self.tables or self.columns)

    @property
    def codebooks(self) -> tuple[SidSpec, ...]:
        """The sets of SIDs whose codebooks `latent` needs."""
        return ()

    @property
    def embedding_bytes(self) -> float:
        """The bytes per item or user beside its columns and tables: 2 per dimension of its embeddings."""
        return 2.0 * sum(self.embeddings.values())

    def latent(self, constants: ModelConstants) -> Latent | None:
        """Return the module for the latent vectors; None if the content is looked up in tables."""
        return None

    def projection(self, dim: int) -> nn.Linear | None:
        """Return the layer from the concatenated vectors of all tables to `dim`; None: they are summed.

        It has no bias, so that missing content stays zeros.
        """
        return None

    def with_tables(self, change: Callable[[IdFeature], IdFeature]) -> Self:
        """Return a copy with each table's id feature changed."""
        return replace(self, tables=tuple(map(change, self.tables)))
