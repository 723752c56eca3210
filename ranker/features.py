"""The columns an arm reads and the tables it looks up: the single place where columns, tables and id spaces meet.

Reader, model, planner and cost accounting all use this description. So every column that an arm reads is in its cost,
and every table is in the report.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sidestack.encoder.sid.columns import event_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError, DataError, SpecError
from sidestack.infra.snapshot import SNAPSHOT_FILE, Dataset
from sidestack.infra.tables import DatasetSpec, Entity, TaskSpec, request_schema
from sidestack.ranker.config import ArmConfig, ModelConfig, RankerConfig
from sidestack.ranker.constants import NeededConstants
from sidestack.ranker.contents import content_kinds
from sidestack.ranker.contents.contract import OWN_IDS, Content, Place, Sids
from sidestack.ranker.id_feature import IdFeature

BASE_COLUMNS = ("event_time", "user_id", "item_id")
HISTORY_COLUMNS = ("history_item_ids", "history_times")
ITEM_IDS, HISTORY_IDS, USER_IDS = OWN_IDS["item"], OWN_IDS["history"], OWN_IDS["user"]
MAX_TABLE_BYTES = 2**63 - 1
"""A larger table cannot be addressed, whatever the number of ranks."""


@dataclass(frozen=True)
class ArmFeatures:
    """Everything one arm takes from the events.

    Attributes:
        tasks: the predicted tasks, by label column, with the weights of this training.
        dense: float columns of the dense block.
        ids: id features that every arm has: ids and context. history_ids: that of the history's items.
        item: the content at the ad's position. history: at the history's. user: at the user's.
        has_user_place: whether the model has a place for users' content: in every arm, if the dataset has such content.
    """

    tasks: Mapping[str, TaskSpec]
    dense: tuple[str, ...]
    ids: tuple[IdFeature, ...]
    history_ids: IdFeature
    item: Content
    history: Content
    user: Content
    has_user_place: bool

    @property
    def contents(self) -> tuple[Content, ...]:
        """The content of all positions."""
        return (self.item, self.history, self.user)

    @property
    def bags(self) -> tuple[IdFeature, ...]:
        """The id features of the sparse block: ids, context, and the tables of the ad's and the user's content."""
        return (*self.ids, *self.item.tables, *self.user.tables)

    @property
    def sequences(self) -> tuple[IdFeature, ...]:
        """The id features of the user's history, aligned with `history_item_ids`, which comes first."""
        return (self.history_ids, *self.history.tables)

    @property
    def constants(self) -> NeededConstants:
        """The constants that the content needs; the ad and the history use the same embeddings."""
        return NeededConstants(
            tuple(dict.fromkeys(sid for content in self.contents for sid in content.codebooks)),
            {content.entity: content.embeddings for content in self.contents if content.embeddings},
        )

    @property
    def sids(self) -> dict[str, SidSpec]:
        """The sets of SIDs that the arm takes, by name."""
        return {sid.name: sid for content in self.contents for sid in content.sids}

    @property
    def sid_columns(self) -> dict[str, SidSpec]:
        """The SID columns read, each with the spec that it must have."""
        known = {name: held for sid in self.sids.values() for name, held in event_columns(sid).items()}
        return {column: known[column] for column in self.columns if column in known}

    @property
    def columns(self) -> tuple[str, ...]:
        """Exactly the events columns that this arm reads."""
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
        """Return a copy with each id feature changed."""
        item, history, user = (content.with_tables(change) for content in self.contents)
        ids, history_ids = tuple(map(change, self.ids)), change(self.history_ids)
        return replace(self, ids=ids, history_ids=history_ids, item=item, history=history, user=user)

    @property
    def row_bags(self) -> tuple[IdFeature, ...]:
        """The bags that each impression has of its own."""
        return tuple(bag for bag in self.bags if not bag.of_request)

    @property
    def request_bags(self) -> tuple[IdFeature, ...]:
        """The bags that the impressions of a request share."""
        return tuple(bag for bag in self.bags if bag.of_request)


def arm_features(spec: DatasetSpec, config: RankerConfig, sids: Sids) -> ArmFeatures:
    """Return the columns, tables and tasks of an arm.

    Args:
        spec: the dataset's description. config: with the arm chosen.
        sids: the dataset's sets of SIDs by name.

    Raises:
        SpecError: the arm needs SIDs that the dataset lacks, or that the arm cannot take.
        DataError: it needs an embedding that the items lack, or the dataset names no task.
        ConfigError: `task_weights`, `table_rows` or `admission` has an unknown name, or a table is too large.
    """
    ids = _id_features(spec, config.model)
    history_ids = ids.pop(HISTORY_IDS)
    item, history, user = _contents(spec, config.content, sids)
    features = ArmFeatures(
        tasks=weighted_tasks(spec, config.training.task_weights),
        dense=spec.all_dense,
        ids=tuple(ids.values()),
        history_ids=history_ids,
        item=item,
        history=history,
        user=user,
        has_user_place=bool(spec.user_embeddings) or any(sid.entity == "user" for sid in sids.values()),
    )
    for feature in features.tables:
        _require_size(feature, config.model.embedding_dim)
    return features


def weighted_tasks(spec: DatasetSpec, weights: Mapping[str, float]) -> dict[str, TaskSpec]:
    """Return the dataset's tasks, in its order, with the weights that the configuration sets.

    Raises:
        DataError: it has no task, or one named like a column of predictions. ConfigError: a weight names no task.
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
    """Check that a table has at least one row, and no more bytes than can be addressed."""
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


def _contents(spec: DatasetSpec, arm: ArmConfig, sids: Sids) -> list[Content]:
    """Return the arm's content at every position, and check that the positions agree."""
    places = [Place(kind, position, arm, sids, spec) for position, kind in arm.kinds.items()]
    contents = [content_kinds()[place.kind].at(place) for place in places]
    taken = {sid.name for content in contents for sid in content.sids}
    left = [name for name in arm.sids if taken and name not in taken]
    if left:
        raise SpecError(f"arm: sids={list(arm.sids)}: {left[0]!r} is used at no position")
    embeddings: dict[Entity, Mapping[str, int]] = {}
    for content in contents:
        if content.embeddings and embeddings.setdefault(content.entity, content.embeddings) != content.embeddings:
            raise SpecError(
                f"arm content {arm.kinds[content.position]!r}: takes the embeddings {', '.join(content.embeddings)};"
                f" another position takes {', '.join(embeddings[content.entity])}, must be the same"
            )
    return contents


def dataset_sids(dataset: Dataset) -> dict[str, SidSpec]:
    """Return the specs of a snapshot's sets of SIDs, by name.

    Raises:
        ConfigError: the snapshot lists an invalid spec.
    """
    return {
        name: parse(SidSpec, one.spec, f"{dataset.path / SNAPSHOT_FILE}: sids.{name}")
        for name, one in dataset.snapshot.sids.items()
    }
