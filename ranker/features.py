"""What one arm reads and looks up: the single place where columns, tables and id spaces meet.

Reader, model, planner and cost accounting all follow this description, so an arm can not read a column that its
cost does not count, nor own a table that the report does not show.
"""

from dataclasses import dataclass
from pathlib import Path

from encoder.sid import (
    EVENT_HISTORY_BASE,
    EVENT_ITEM_BASE,
    SidSpec,
    event_columns,
    read_sid_spec,
    require_spec,
    sid_columns,
)
from infra.errors import SpecError
from infra.parquet import open_parquet
from infra.tables import Dataset, DatasetSpec
from ranker.config import ArmConfig

BASE_COLUMNS = ("event_time", "user_id", "item_id", "click", "conversion")
HISTORY_COLUMNS = ("history_item_ids", "history_times")
HISTORY_IDS = "history_item_ids"


@dataclass(frozen=True)
class IdFeature:
    """One id column and the embedding table it is looked up in.

    Attributes:
        column: the events column, which is also the feature's name.
        num_ids: ids lie in [0, num_ids); anything else is an error, never a silent zero.
        rows: rows of the table. Fewer than num_ids means hashing by modulo.
        is_sid: whether the table holds Semantic IDs, whose bytes are the arm's own cost.
    """

    column: str
    num_ids: int
    rows: int
    is_sid: bool = False

    @property
    def table(self) -> str:
        """The embedding table's name."""
        return f"t_{self.column}"


@dataclass(frozen=True)
class ArmFeatures:
    """Everything one arm takes from the events.

    Attributes:
        dense: float columns of the dense block.
        bags: id features of the sparse block: ids, context, and in `sid_ngram` the ad's SID prefixes.
        sequences: id features of the user's history, aligned with `history_item_ids`, which comes first.
        item_sids: columns that SIDE unpacks for the ad; more than one when the SID does not fit one int64.
        history_sids: the same for the history.
        sid: the whole SID's spec; None when the arm takes no content.
        scale_steps: whether SIDE multiplies by the codebook's steps.
    """

    dense: tuple[str, ...]
    bags: tuple[IdFeature, ...]
    sequences: tuple[IdFeature, ...]
    item_sids: tuple[str, ...]
    history_sids: tuple[str, ...]
    sid: SidSpec | None
    scale_steps: bool

    @property
    def sid_columns(self) -> dict[str, SidSpec]:
        """The SID columns read, with the spec each must carry."""
        if self.sid is None:
            return {}
        known = event_columns(self.sid)
        return {column: known[column] for column in self.columns if column in known}

    @property
    def columns(self) -> tuple[str, ...]:
        """The events columns this arm reads, and no other."""
        wanted = [
            *BASE_COLUMNS,
            *HISTORY_COLUMNS,
            *self.dense,
            *(feature.column for feature in (*self.bags, *self.sequences)),
            *self.item_sids,
            *self.history_sids,
        ]
        return tuple(dict.fromkeys(wanted))

    @property
    def sequence_columns(self) -> tuple[str, ...]:
        """The columns with one entry for every entry of the history."""
        ids = (feature.column for feature in self.sequences)
        return tuple(dict.fromkeys([*HISTORY_COLUMNS, *ids, *self.history_sids]))

    @property
    def bag_contents(self) -> tuple[str, ...]:
        """The bags that together are the ad's content."""
        return tuple(feature.column for feature in self.bags if feature.is_sid)

    @property
    def sequence_contents(self) -> tuple[str, ...]:
        """The sequences that together are the history's content."""
        return tuple(feature.column for feature in self.sequences if feature.is_sid)


def arm_features(spec: DatasetSpec, arm: ArmConfig, sid: SidSpec | None) -> ArmFeatures:
    """Lay out what an arm reads and looks up.

    Args:
        spec: the dataset's description. arm: how content reaches the ranker.
        sid: the spec of the dataset's SIDs; not needed by an arm without content.

    Raises:
        SpecError: the arm needs SIDs that the dataset lacks, or that it can not take.
    """
    if "side" in (arm.item, arm.history):
        _require_side(sid)
    ids = [IdFeature("user_id", spec.num_users, spec.num_users)]
    ids += [IdFeature("item_id", spec.num_items, spec.num_items)]
    ids += [IdFeature(name, number, number) for name, number in spec.sparse.items()]
    history = [IdFeature(HISTORY_IDS, spec.num_items, spec.num_items)]
    if arm.item == "sid_ngram":
        ids += _prefix_features(EVENT_ITEM_BASE, sid, arm.max_rows)
    if arm.history == "sid_ngram":
        history += _prefix_features(EVENT_HISTORY_BASE, sid, arm.max_rows)
    return ArmFeatures(
        dense=spec.dense,
        bags=tuple(ids),
        sequences=tuple(history),
        item_sids=tuple(sid_columns(EVENT_ITEM_BASE, sid)) if sid and arm.item == "side" else (),
        history_sids=tuple(sid_columns(EVENT_HISTORY_BASE, sid)) if sid and arm.history == "side" else (),
        sid=sid if (arm.item, arm.history) != ("none", "none") else None,
        scale_steps=arm.scale_steps,
    )


def _require_side(sid: SidSpec | None) -> None:
    if sid is not None and sid.lines > 1:
        raise SpecError(f"arm content 'side': the SIDs have {sid.lines} lines a layer; it unpacks lines=1 only")
    if sid is None:
        raise SpecError("arm content 'side': the dataset has no SID columns")


def _prefix_features(base: str, sid: SidSpec | None, max_rows: int) -> list[IdFeature]:
    if sid is None or not sid.prefix_lengths:
        raise SpecError("arm content 'sid_ngram': the dataset's SIDs have no prefix columns")
    features = []
    for length in sid.prefix_lengths:
        held = sid.of_prefix(length)
        columns = list(sid_columns(base, held))
        if len(columns) > 1:
            raise SpecError(
                f"arm content 'sid_ngram': a prefix of {length} digits takes {len(columns)} columns, must be one"
            )
        first = 1 if sid.packing == "paper_eq5" else 0
        num_ids = sid.radix ** (length + first)
        features.append(IdFeature(columns[0], num_ids, min(num_ids, max_rows), is_sid=True))
    return features


def dataset_sid(dataset: Dataset) -> SidSpec | None:
    """Read the SID spec of a materialized dataset from its first event file; None when it has no SIDs."""
    with open_parquet(dataset.all_event_files()[0]) as file:
        schema = file.schema_arrow
    if EVENT_ITEM_BASE not in schema.names:
        return None
    return read_sid_spec(schema.field(EVENT_ITEM_BASE))


def require_sids(features: ArmFeatures, files: tuple[Path, ...]) -> None:
    """Check that every file's SID columns are of the spec and codebook the arm was laid out for.

    Raises:
        SpecError: naming file, column and what differs.
    """
    for path in files:
        with open_parquet(path) as file:
            for column, expected in features.sid_columns.items():
                require_spec(file.schema_arrow, column, expected, path)
