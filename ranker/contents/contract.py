"""What every kind of content offers: what it reads and looks up at a position, and how that becomes a vector.

A kind is a subclass of `Content` in a module of its own. Its content is looked up in tables, whose rows have the
model's width already, or it is a latent vector that `latent` computes; a perceptron (the ad's, the user's) or a matrix
(the history's) takes that to the model's width (`ranker.content`).
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

if TYPE_CHECKING:  # it asks the kinds for their names
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
    """Return whose content stands at a position; a history is of items."""
    return "user" if position == "user" else "item"


@dataclass(frozen=True)
class Place:
    """Where content is asked for: a position of an arm over a dataset.

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
        """Whose content is asked for."""
        return entity_at(self.position)

    @property
    def id_column(self) -> str:
        """The column of the items' or users' own ids."""
        return OWN_IDS[self.position]

    @property
    def num_ids(self) -> int:
        """How many items or users there are."""
        return self.spec.content(self.entity).rows

    @property
    def of_request(self) -> bool:
        """Whether a request has the content once, for all its impressions."""
        return self.position != "item"

    def taken(self) -> tuple[SidSpec, ...]:
        """Return the arm's sets of SIDs that are of the entity.

        Raises:
            SpecError: the dataset lacks one, or none is of the entity.
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
        """Return what the columns of a set are named after (`encoder.sid.sid_columns`)."""
        return sid.event_history_base if self.position == "history" else sid.event_base

    def prefix(self, sid: SidSpec, length: int) -> SidSpec:
        """Return the spec of a prefix that was materialized, or of the whole SID.

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
    """What computes the latent vectors of N rows, requests or history entries; `width` is theirs."""

    width: int

    @abstractmethod
    def forward(self, ids_NC: Tensor, known_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 [N, width], zeros where there is no content, and bool [N]: whether there is some.

        Args:
            ids_NC: int64, of `Content.columns`. known_NS: bool, whether each of `Content.known` is not null.
        """

    def of_embeddings(self, embeddings_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same of new items, whose embeddings came with a request, scaled as the constant's are.

        Asked for only where content takes embeddings (`Content.embeddings`).
        """
        raise NotImplementedError(f"{type(self).__name__} takes no embeddings")


@dataclass(frozen=True)
class Content(ABC):
    """A kind of content at one position: the ad's own, the history's, or the user's.

    Attributes:
        position: where it is. sids: the sets of Semantic IDs that it takes, each by the spec of the whole.
        tables: the id features that it is looked up in, each of a set of `sids`.
        columns: events columns whose ids the model takes as they are, not by a table.
        known: for each set a column that is null where an item has no SID of it; the model gets which are not null.
        embeddings: signals that it takes from the items or users as they are, name -> dimensions.
    """

    takes_sids: ClassVar[bool] = False
    """Whether the kind takes Semantic IDs."""
    color: ClassVar[Color | None] = None
    """Of the arm that is named after the kind; None: one of the colours for other arms."""

    position: Position
    sids: tuple[SidSpec, ...] = ()
    tables: tuple[IdFeature, ...] = ()
    columns: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    embeddings: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    @abstractmethod
    def at(cls, place: Place) -> Self:
        """Lay the kind out: say what it reads and looks up.

        Raises:
            SpecError: the dataset's SIDs do not fit. DataError: the dataset has no such embedding.
        """

    @classmethod
    def looked_up(cls, place: Place, tables: Iterable[IdFeature]) -> Self:
        """Return content that is looked up in tables of SIDs."""
        tables = tuple(tables)
        first: dict[SidSpec, str] = {}
        for table in tables:
            assert table.sid is not None
            first.setdefault(table.sid, table.columns[0])
        # A bag of no id is zeros already; a sequence has to know which of its entries hold a place alone.
        known = tuple(first.values()) if place.position == "history" else ()
        return cls(place.position, tuple(first), tables, known=known)

    @property
    def entity(self) -> Entity:
        """Whose content it is."""
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
        """The bytes an item or user that it costs beside its columns and tables: 2 a dimension of its embeddings."""
        return 2.0 * sum(self.embeddings.values())

    def latent(self, constants: ModelConstants) -> Latent | None:
        """Return what computes the latent vectors; None where the content is looked up in tables."""
        return None

    def projection(self, dim: int) -> nn.Linear | None:
        """Return the layer from the vectors of all tables, side by side, to `dim`; None: they are summed.

        It has no bias, so that no content stays zeros.
        """
        return None

    def with_tables(self, change: Callable[[IdFeature], IdFeature]) -> Self:
        """Return the same with each table's id feature changed."""
        return replace(self, tables=tuple(map(change, self.tables)))
