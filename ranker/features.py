"""What one arm reads and looks up: the single place where columns, tables and id spaces meet.

Reader, model, planner and cost accounting all follow this description, so an arm can not read a column that its
cost does not count, nor own a table that the report does not show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from encoder.sid.columns import event_columns, sid_columns
from encoder.sid.spec import SidSpec
from infra.config import parse
from infra.errors import ConfigError, DataError, SpecError
from infra.snapshot import SNAPSHOT_FILE, Dataset
from infra.tables import DatasetSpec, Entity, TaskSpec, request_schema
from ranker.budget import sid_rows
from ranker.config import ArmConfig, ContentKind, ModelConfig, RankerConfig

BASE_COLUMNS = ("event_time", "user_id", "item_id")
HISTORY_COLUMNS = ("history_item_ids", "history_times")
ITEM_IDS = "item_id"
HISTORY_IDS = "history_item_ids"

Sids = Mapping[str, SidSpec]
Position = Literal["item", "history", "user"]
USER_IDS = "user_id"
OWN_IDS: Mapping[Position, str] = {"item": ITEM_IDS, "history": HISTORY_IDS, "user": USER_IDS}
"""The column of the items' or users' own ids at each position."""
MAX_TABLE_BYTES = 2**63 - 1
"""More bytes than that cannot be addressed, whatever the number of ranks."""


@dataclass(frozen=True)
class IdFeature:
    """One id column and the embedding table it is looked up in.

    Attributes:
        column: the events column, which is also the feature's name; of clusters a name of their own.
        num_ids: ids lie in [0, num_ids); anything else is an error, never a silent zero.
        rows: rows of the table. Fewer than num_ids means hashing by modulo; more, room for ids to come.
        of_request: whether a request has the ids once, for all its impressions.
        sid: the set of Semantic IDs that the ids are of, whose bytes are the arm's own cost.
        clusters: more than 0: the ids are so many first digits of the SID, unpacked from its columns.
        fallback_rows: more than 0: the table has admission, and its first rows are those that ids without a row of
            their own share.
        row_map: of a table with admission the row of each id, int32; None until `ranker.row_maps` has read it. Ids
            beyond it share the fallback rows.
    """

    column: str
    num_ids: int
    rows: int
    of_request: bool
    sid: SidSpec | None = None
    clusters: int = 0
    fallback_rows: int = 0
    row_map: npt.NDArray[np.int32] | None = field(default=None, compare=False, repr=False)

    @property
    def table(self) -> str:
        """The embedding table's name."""
        return f"t_{self.column}"

    @property
    def is_hashed(self) -> bool:
        """Whether ids share rows by modulo of all rows."""
        return self.rows < self.num_ids and not self.has_admission

    @property
    def has_admission(self) -> bool:
        """Whether only admitted ids have rows of their own (`ranker.admission`)."""
        return self.fallback_rows > 0

    @property
    def is_sid(self) -> bool:
        """Whether the table holds Semantic IDs."""
        return self.sid is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The events columns that the ids come from."""
        if not self.clusters:
            return (self.column,)
        assert self.sid is not None
        base = self.column.removesuffix(CLUSTERS)
        return tuple(sid_columns(base, self.sid))[: len(self.sid.of_prefix(self.clusters).chunk_sizes)]

    @property
    def ids_per_entry(self) -> int:
        """How many ids stand for one item."""
        return max(self.clusters, 1)


CLUSTERS = "_clusters"


@dataclass(frozen=True)
class Content:
    """How content reaches one position: the ad's own, the history's, or the user's.

    Attributes:
        kind: the way. sids: the sets of Semantic IDs that it takes, each by the spec of the whole.
        held: of `side`: for each set what is unpacked of it, the whole or a prefix.
        columns: events columns whose ids the model takes as they are, not by a table. Of `side`: those of `held`, set
            after set, more than one a set where its SIDs do not fit one int64. Of `dense`: the item's or user's id.
        known: for each set a column that is null where an item has no SID of it.
        embeddings: signals of `dense`, name -> dimensions.
    """

    position: Position
    kind: ContentKind
    sids: tuple[SidSpec, ...] = ()
    held: tuple[SidSpec, ...] = ()
    columns: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    embeddings: Mapping[str, int] | None = None

    @property
    def entity(self) -> Entity:
        """Whose content it is."""
        return entity_at(self.position)


def entity_at(position: Position) -> Entity:
    """Say whose content stands at a position; a history is of items."""
    return "user" if position == "user" else "item"


@dataclass(frozen=True)
class ArmFeatures:
    """Everything one arm takes from the events.

    Attributes:
        tasks: what is predicted, by label column, with the weights of this training.
        dense: float columns of the dense block.
        bags: id features of the sparse block: ids, context, and the SID tables of the ad and the user.
        sequences: id features of the user's history, aligned with `history_item_ids`, which comes first.
        item: how content reaches the ad's position. history: the history's. user: the user's.
        has_user_place: whether users have a place for content in the model: in every arm, where the dataset has any.
        scale_steps: whether SIDE multiplies by the codebook's steps.
    """

    tasks: Mapping[str, TaskSpec]
    dense: tuple[str, ...]
    bags: tuple[IdFeature, ...]
    sequences: tuple[IdFeature, ...]
    item: Content
    history: Content
    user: Content
    has_user_place: bool
    scale_steps: bool

    @property
    def contents(self) -> tuple[Content, ...]:
        """The content of all positions."""
        return (self.item, self.history, self.user)

    @property
    def sids(self) -> dict[str, SidSpec]:
        """The sets of SIDs that the arm takes, by name."""
        return {sid.name: sid for content in self.contents for sid in content.sids}

    @property
    def sid_columns(self) -> dict[str, SidSpec]:
        """The SID columns read, with the spec each must carry."""
        known = {name: held for sid in self.sids.values() for name, held in event_columns(sid).items()}
        return {column: known[column] for column in self.columns if column in known}

    @property
    def columns(self) -> tuple[str, ...]:
        """The events columns this arm reads, and no other."""
        wanted = [
            *BASE_COLUMNS,
            *self.tasks,
            *HISTORY_COLUMNS,
            *self.dense,
            *(column for feature in (*self.bags, *self.sequences) for column in feature.columns),
            *(column for content in self.contents for column in (*content.columns, *content.known)),
        ]
        return tuple(dict.fromkeys(wanted))

    @property
    def sequence_columns(self) -> tuple[str, ...]:
        """The columns with one entry for every entry of the history."""
        ids = (column for feature in self.sequences for column in feature.columns)
        return tuple(dict.fromkeys([*HISTORY_COLUMNS, *ids, *self.history.columns, *self.history.known]))

    @property
    def tables(self) -> tuple[IdFeature, ...]:
        """The id features of all embedding tables."""
        return (*self.bags, *self.sequences)

    def with_tables(self, change: Callable[[IdFeature], IdFeature]) -> "ArmFeatures":
        """Return the same with each id feature changed."""
        return replace(self, bags=tuple(map(change, self.bags)), sequences=tuple(map(change, self.sequences)))

    @property
    def row_bags(self) -> tuple[IdFeature, ...]:
        """The bags that an impression has of its own."""
        return tuple(bag for bag in self.bags if not bag.of_request)

    @property
    def request_bags(self) -> tuple[IdFeature, ...]:
        """The bags that the impressions of a request share."""
        return tuple(bag for bag in self.bags if bag.of_request)

    def bag_contents(self, entity: Entity) -> tuple[IdFeature, ...]:
        """Return the bags that together are the ad's content, or the user's."""
        return tuple(bag for bag in self.bags if bag.sid is not None and bag.sid.entity == entity)

    @property
    def sequence_contents(self) -> tuple[IdFeature, ...]:
        """The sequences that together are the history's content."""
        return tuple(feature for feature in self.sequences if feature.is_sid)


def arm_features(spec: DatasetSpec, config: RankerConfig, sids: Sids) -> ArmFeatures:
    """Lay out what an arm reads, looks up and predicts.

    Args:
        spec: the dataset's description. config: with the arm chosen.
        sids: the dataset's sets of SIDs by name.

    Raises:
        SpecError: the arm needs SIDs that the dataset lacks, or that it can not take.
        DataError: it needs an embedding that the items lack, or the dataset names no task.
        ConfigError: `task_weights`, `table_rows` or `admission` names what the dataset lacks, or a table is too large.
    """
    arm = config.content
    ids = _id_features(spec, config.model)
    history = ids.pop(HISTORY_IDS)
    item, of_history, user = (_content(position, arm, sids, spec) for position in get_args(Position))
    _require_taken(arm, (item, of_history, user))
    features = ArmFeatures(
        tasks=weighted_tasks(spec, config.training.task_weights),
        dense=spec.all_dense,
        bags=(*ids.values(), *_tables("item", arm, sids, spec), *_tables("user", arm, sids, spec)),
        sequences=(history, *_tables("history", arm, sids, spec)),
        item=item,
        history=of_history,
        user=user,
        has_user_place=bool(spec.user_embeddings) or any(sid.entity == "user" for sid in sids.values()),
        scale_steps=arm.scale_steps,
    )
    for feature in features.tables:
        _require_size(feature, config.model.embedding_dim)
    return features


def weighted_tasks(spec: DatasetSpec, weights: Mapping[str, float]) -> dict[str, TaskSpec]:
    """Return the dataset's tasks, in its order, with the weights that the configuration sets.

    Raises:
        DataError: it names none, or one like a column of predictions. ConfigError: a weight is of no task.
    """
    if not spec.tasks:
        raise DataError("dataset.json: tasks: names none; the ranker predicts at least one")
    for name in weights:
        if name not in spec.tasks:
            raise ConfigError(f"ranker.training.task_weights: {name!r} is no task; tasks are {', '.join(spec.tasks)}")
    taken = {"row", *(f"p_{task}" for task in spec.tasks)}
    for name in spec.tasks:
        if name in taken:
            raise DataError(f"dataset.json: tasks.{name}: must not be named as another column of the predictions")
    return {
        name: task.model_copy(update={"weight": weights.get(name, task.weight)}) for name, task in spec.tasks.items()
    }


def _id_features(spec: DatasetSpec, model: ModelConfig) -> dict[str, IdFeature]:
    """Return the id features that every arm has, by column."""
    num_ids = {USER_IDS: spec.num_users, ITEM_IDS: spec.num_items, **spec.all_sparse, HISTORY_IDS: spec.num_items}
    for setting, columns in (("table_rows", model.table_rows), ("admission", model.admission)):
        for column in columns:
            if column not in num_ids:
                known = ", ".join(num_ids)
                raise ConfigError(f"ranker.model.{setting}: {column!r} is no id column; the dataset has {known}")
    of_requests = request_schema(spec).names
    rows = {**num_ids, **model.table_rows, **{column: one.max_rows for column, one in model.admission.items()}}
    fallback = {column: one.fallback_rows for column, one in model.admission.items()}
    return {
        column: IdFeature(column, number, rows[column], column in of_requests, fallback_rows=fallback.get(column, 0))
        for column, number in num_ids.items()
    }


def _require_size(feature: IdFeature, dim: int) -> None:
    """Check that a table has a row, and no more bytes than can be addressed."""
    if feature.rows < 1:
        raise DataError(f"dataset.json: {feature.column!r} has no ids; its table must have a row")
    if feature.rows * dim * 4 > MAX_TABLE_BYTES:
        admission = f"ranker.model.admission.{feature.column}.max_rows"
        option = "the arm's max_rows" if feature.is_sid else f"ranker.model.table_rows.{feature.column}"
        option = admission if feature.has_admission else option
        raise ConfigError(
            f"the table of {feature.column!r}: {feature.rows} rows of {dim} float32 numbers are more bytes than can be"
            f" addressed, {MAX_TABLE_BYTES}; {option} hashes ids into fewer rows"
        )


def _require_taken(arm: ArmConfig, contents: Sequence[Content]) -> None:
    """Check that every set of SIDs that the arm names enters somewhere, if any does."""
    taken = {sid.name for content in contents for sid in content.sids}
    left = [name for name in arm.sids if taken and name not in taken]
    if left:
        raise SpecError(f"arm: sids={list(arm.sids)}, of which {left[0]!r} enters at no position")


def _content(position: Position, arm: ArmConfig, sids: Sids, spec: DatasetSpec) -> Content:
    kind: ContentKind = getattr(arm, position)
    if kind == "none":
        return Content(position, kind)
    if kind == "dense":
        return Content(position, kind, columns=(OWN_IDS[position],), embeddings=_embeddings(position, arm, spec))
    taken = _taken(position, arm, sids)
    if kind == "side":
        held = tuple(_unpacked_part(sid, arm) for sid in taken)
        columns = [tuple(sid_columns(_base(position, sid), sid)) for sid in held]
        every = tuple(name for names in columns for name in names)
        return Content(position, kind, taken, held, every, known=tuple(names[0] for names in columns))
    # A bag of no id is zeros already; a sequence needs to be told which of its entries hold a place alone.
    first = {feature.sid: feature.columns[0] for feature in reversed(_tables(position, arm, sids, spec))}
    known = tuple(first[sid] for sid in taken) if position == "history" else ()
    return Content(position, kind, taken, known=known)


def _unpacked_part(sid: SidSpec, arm: ArmConfig) -> SidSpec:
    """Return what `side` unpacks of a set: the whole SID, or the one prefix that the arm names."""
    lengths = arm.prefix_lengths or (sid.digits,)
    if len(lengths) > 1:
        raise SpecError(f"arm content 'side': prefix_lengths={list(lengths)}; it unpacks one id, of one length")
    return _prefix("side", sid, lengths[0])


def _prefix(kind: str, sid: SidSpec, length: int) -> SidSpec:
    if length not in (*sid.prefix_lengths, sid.digits):
        known = ", ".join(map(str, sid.prefix_lengths)) or "none"
        raise SpecError(
            f"arm content {kind!r}: the SIDs {sid.name!r} have no prefix of {length} digits; materialize.prefix_lengths"
            f" has {known}"
        )
    return sid.of_prefix(length)


def _embeddings(position: Position, arm: ArmConfig, spec: DatasetSpec) -> dict[str, int]:
    entity, every = entity_at(position), {**spec.embeddings, **spec.user_embeddings}
    for name in arm.embeddings:
        if name not in every:
            known = ", ".join(every) or "none"
            raise DataError(f"arm content 'dense': there is no embedding {name!r}; the dataset has {known}")
    offered = spec.content(entity).embeddings
    chosen = {name: dim for name, dim in offered.items() if not arm.embeddings or name in arm.embeddings}
    if not chosen:
        named = f" of {list(arm.embeddings)}" if arm.embeddings else ""
        raise DataError(f"arm content 'dense': the {entity}s have no embedding{named}")
    return chosen


def _taken(position: Position, arm: ArmConfig, sids: Sids) -> tuple[SidSpec, ...]:
    kind = getattr(arm, position)
    for name in arm.sids:
        if name not in sids:
            known = ", ".join(sids) or "none"
            raise SpecError(f"arm content {kind!r}: the dataset has no SIDs {name!r}; it has {known}")
    entity = entity_at(position)
    taken = tuple(sids[name] for name in arm.sids if sids[name].entity == entity)
    if not taken:
        raise SpecError(f"arm content {kind!r}: sids={list(arm.sids)} are none of {entity}s, which {position} asks for")
    return taken


def _base(position: Position, sid: SidSpec) -> str:
    return sid.event_history_base if position == "history" else sid.event_base


def _tables(position: Position, arm: ArmConfig, sids: Sids, spec: DatasetSpec) -> list[IdFeature]:
    """Return the id features that have an embedding table for the content of a position."""
    kind, number = getattr(arm, position), spec.content(entity_at(position)).rows
    if kind == "kmeans":
        return [_clusters(position, sid, arm) for sid in _taken(position, arm, sids)]
    if kind in ("sid_ngram", "hde"):
        taken = _taken(position, arm, sids)
        return [feature for sid in taken for feature in _prefixes(position, kind, sid, arm, number)]
    return []


def _clusters(position: Position, sid: SidSpec, arm: ArmConfig) -> IdFeature:
    clusters = sid.digits if arm.clusters is None else arm.clusters
    if clusters > sid.digits:
        raise SpecError(f"arm content 'kmeans': clusters={clusters}; the SIDs {sid.name!r} name {sid.digits}")
    if sid.packing != "mixed_radix" or sid.levels > 1:
        raise SpecError(f"arm content 'kmeans': the SIDs {sid.name!r} ({sid.quantizer}) are no clusters' numbers")
    rows = sid_rows(sid.radix, sid.radix, arm.max_rows)  # every cluster has items, or it would be none
    return IdFeature(f"{_base(position, sid)}{CLUSTERS}", sid.radix, rows, position != "item", sid, clusters)


def _prefixes(position: Position, kind: str, sid: SidSpec, arm: ArmConfig, number: int) -> list[IdFeature]:
    """Return the features of the prefixes that `number` items or users have."""
    lengths = arm.prefix_lengths or sid.prefix_lengths
    if not lengths:
        raise SpecError(f"arm content {kind!r}: the dataset's SIDs {sid.name!r} have no prefix columns")
    features = []
    for length in lengths:
        held = _prefix(kind, sid, length)
        columns = list(sid_columns(_base(position, sid), held))
        if len(columns) > 1:
            raise SpecError(
                f"arm content {kind!r}: a prefix of {length} digits takes {len(columns)} columns, must be one"
            )
        first = 1 if sid.packing == "paper_eq5" else 0
        num_ids = sid.radix ** (length + first)
        rows = sid_rows(num_ids, number, arm.max_rows)
        features.append(IdFeature(columns[0], num_ids, rows, position != "item", sid))
    return features


def dataset_sids(dataset: Dataset) -> dict[str, SidSpec]:
    """Return the specs of a snapshot's sets of SIDs, by name.

    Raises:
        ConfigError: the snapshot lists a spec that is not one of ours.
    """
    return {
        name: parse(SidSpec, one.spec, f"{dataset.path / SNAPSHOT_FILE}: sids.{name}")
        for name, one in dataset.snapshot.sids.items()
    }
