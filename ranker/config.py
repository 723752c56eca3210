"""The ranker's configuration: one model, and the arms that say how content reaches it.

An arm is a few lines: how the Semantic ID enters at the ad's position and in the user's history, the settings of
its SID tables, and an overlay of what may be tuned for it alone. All else is equal across arms.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from encoder.sid.spec import DEFAULT_NAME
from infra.config import Config, Day, Days, FileName, Seed, parse
from infra.errors import ConfigError
from infra.tables import DatasetSpec

Dates = tuple[Day, Day]

ContentKind = Literal["none", "dense", "kmeans", "sid_ngram", "hde", "side"]
"""How content enters: not at all; as the raw embedding; as the numbers of the nearest clusters, in one table; as
prefix n-grams of a Semantic ID, in a table each, summed; the same set beside each other and projected (hierarchical
discrete embedding); or as a Semantic ID unpacked without a table."""

SID_KINDS: tuple[ContentKind, ...] = ("kmeans", "sid_ngram", "hde", "side")
"""Those of them that take Semantic IDs."""

Pooling = Literal["pma", "target"]
"""What asks the history: all the row's sparse and embedding features (the paper's PMA), or the ad's own alone."""

Children = Literal["given", "entire_space"]
"""What a task with a parent learns from: rows whose parent's label is 1, or all rows, by p(parent) p(task | parent)."""

Precision = Literal["float32", "tf32", "bfloat16"]
"""Of the matrix products of the network between embeddings and logits."""

SearchBudget = Literal["quick", "standard", "thorough"]
"""How much the search for learning rates may cost; see `pipelines.tune.config.RUNGS`."""

ShardingType = Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]


def _refuse_replicates_name(name: str) -> str:
    if re.search(r"-r\d+$", name):
        raise ValueError("must not end as a replicate's label does (-r1)")
    return name


ArmName = Annotated[FileName, AfterValidator(_refuse_replicates_name)]
"""The name of an arm, which directories are named after, its replicates' with `-r` and their number behind it."""

OVERLAY_KEYS = {
    "training": ("sparse_learning_rate", "dense_learning_rate", "warmup_share", "warmup_steps", "children"),
    "model": ("history",),
}
"""What an arm may set for itself: what may be tuned for it, and how it attends to the history. Data order, seed, sizes
and budget stay equal, or arms could not be compared."""


class ArmConfig(Config):
    """How content reaches the ranker in one arm."""

    item: ContentKind = "none"
    """The ad's own content."""
    history: ContentKind = "none"
    """The content of the items in the user's history."""
    user: ContentKind = "none"
    """The user's own content, such as what the user did elsewhere (second paper)."""
    sids: tuple[str, ...] = (DEFAULT_NAME,)
    """Which of the dataset's sets of SIDs enter, all but for `none` and `dense`: sets of items at the ad's position and
    the history's, sets of users at the user's. Several enter beside each other."""
    prefix_lengths: tuple[PositiveInt, ...] | None = None
    """`sid_ngram` and `hde`: which of the prefixes that were materialized; by default all. `side`: the one prefix
    that is unpacked; by default the whole SID."""
    clusters: PositiveInt | None = None
    """`kmeans`: how many of the nearest clusters; by default all that the SID names."""
    embeddings: tuple[str, ...] = ()
    """`dense`: which of the embeddings, of items and users, each at its position; by default all."""
    max_rows: PositiveInt | None = None
    """Rows of a SID table at most; a prefix with more ids than that is hashed by modulo (collisions). By default a
    power of two that follows from the number of items or users (`ranker.budget.sid_rows`); where a dataset grows past
    it, the table is another one."""
    scale_steps: bool = True
    """`side` multiplies each centred digit by the codebook's recorded step, over the mean step."""
    overlay: dict[str, dict[str, Any]] = {}
    """Settings of this arm alone: `training: {sparse_learning_rate: 0.02}`, `model: {history: {heads: 4}}`."""

    @property
    def taken_sids(self) -> tuple[str, ...]:
        """The sets of SIDs that some position takes."""
        return self.sids if {self.item, self.history, self.user} & {*SID_KINDS} else ()

    @field_validator("sids")
    @classmethod
    def _check_sids(cls, sids: tuple[str, ...]) -> tuple[str, ...]:
        if not sids or len(set(sids)) < len(sids):
            raise ValueError(f"{list(sids)} must name at least one set of SIDs, each once")
        return sids

    @field_validator("overlay")
    @classmethod
    def _check_overlay(cls, overlay: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for section, values in overlay.items():
            allowed = OVERLAY_KEYS.get(section, ())
            for key in values:
                if key not in allowed:
                    known = ", ".join(f"{name}.{one}" for name, ones in OVERLAY_KEYS.items() for one in ones)
                    raise ValueError(f"{section}.{key} must be equal in all arms; an overlay may set {known}")
        return overlay


class HistoryConfig(Config):
    """The user history block; by default it is the paper's, one layer of PMA with a single head."""

    queries: PositiveInt = 4
    """k: how many vectors the block gives."""
    heads: PositiveInt = 1
    """Attention heads, of the pooling and of the encoder; they divide d."""
    pooling: Pooling = "pma"
    """Where the queries come from; `target` is attention of the ad's item id and content to the history."""
    encoder_layers: int = Field(default=0, ge=0)
    """Transformer layers among a history's entries, before they are pooled."""
    max_length: PositiveInt | None = None
    """The newest so many entries are kept, the others left out and counted; None keeps all the dataset has."""
    max_entries: PositiveInt | None = None
    """Entries of a global batch's histories at most, which bounds the memory that a batch takes. Each lane's share of a
    batch has its part of them; where its histories have more, the longest are cut to their newest entries until they
    fit. What is cut is counted. None: no bound."""


class AdmissionConfig(Config):
    """Which ids have a row of their own in a table of bounded size; the others share the fallback rows."""

    min_count: PositiveInt
    """An id is admitted once it was seen so often: in requests, of a column that requests have, else in impressions."""
    max_age_days: Days
    """An id that was not seen for so many days before the end of the training dates, the last one included, loses its
    row, and its count starts again at 0."""
    max_rows: int = Field(gt=1, lt=2**31)
    """Rows of the table, the fallback rows among them. A training that starts from an earlier ranker may have more than
    that ranker, not fewer."""
    fallback_rows: PositiveInt = 1024
    """How many of them are shared, by id modulo this number."""

    @model_validator(mode="after")
    def _check_fallback(self) -> "AdmissionConfig":
        if self.fallback_rows >= self.max_rows:
            raise ValueError(
                f"fallback_rows={self.fallback_rows} must be less than max_rows={self.max_rows}: the rest are the rows"
                " that ids have of their own"
            )
        return self


class ModelConfig(Config):
    """The sizes of the model (SIDE paper, section 5)."""

    embedding_dim: PositiveInt = Field(default=32, multiple_of=4)
    """d: the width of every embedding. fbgemm's kernels want a multiple of 4."""
    dense_outputs: PositiveInt = 2
    """r: how many d-wide vectors the dense block gives."""
    dense_hidden: PositiveInt = 64
    """Width of the dense block's hidden layer."""
    content_hidden: PositiveInt = 64
    """Width of the hidden layer of the embedding block's two-layer MLP."""
    history: HistoryConfig = HistoryConfig()
    cross_layers: PositiveInt = 2
    """Layers of the low-rank DCNv2."""
    cross_rank: PositiveInt = 64
    """Rank of each DCNv2 layer's weight matrix."""
    over_arch: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the shared layers between interaction and towers."""
    tower_hidden: PositiveInt = 32
    """Width of the hidden layer of each task's tower."""
    table_rows: dict[str, PositiveInt] = {}
    """Rows of id tables, by column: `user_id`, `item_id`, `history_item_ids` and the dataset's sparse columns. A column
    that is not named has as many rows as the dataset has ids, and grows with it. Fewer rows than ids: ids are hashed
    by modulo and share rows. More: room for ids to come. Tables of SIDs have `max_rows` of the arm instead."""
    admission: dict[str, AdmissionConfig] = {}
    """Id tables of bounded size in which frequent ids have rows of their own, by column, as in `table_rows`; a column
    may be in one of the two."""

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.embedding_dim % self.history.heads:
            raise ValueError(f"history.heads={self.history.heads} must divide embedding_dim={self.embedding_dim}")
        return self

    @model_validator(mode="after")
    def _check_admission(self) -> "ModelConfig":
        if both := sorted(self.admission.keys() & self.table_rows.keys()):
            raise ValueError(f"{', '.join(both)}: may be in admission or in table_rows, not in both")
        return self


class TrainingConfig(Config):
    """How the model is trained and evaluated."""

    epochs: PositiveInt | None = None
    """Passes over the training rows. By default a validation window decides, where the log is small enough to be worth
    more than one pass and long enough for a window; else one (`ranker.budget`)."""
    batch_size: PositiveInt | None = None
    """Rows of a global batch, over all ranks: the same batches whatever the number of ranks. By default a power of two
    that leaves enough steps an epoch (`ranker.budget`)."""
    validation_days: int | None = Field(default=None, ge=0, le=36_500)
    """How many of the newest training dates tell when to stop: a first training holds them out, and ends when the mean
    of the tasks' normalized entropies on them rises from one epoch to the next. The arm is then trained afresh, on all
    training dates, for the epochs before that. With `epochs`, these are the most. 0: no window. By default a tenth of
    the dates where `epochs` is left open, else none (`ranker.budget`)."""
    eval_batch_size: PositiveInt = 4096
    """Rows of a global batch when evaluating."""
    lanes: PositiveInt = 8
    """Ranges the rows are cut into; the number of ranks must divide it (see `infra.lanes.LaneReader`)."""
    rows_per_request: PositiveInt | None = None
    """How many impressions of a request stay together when rows are shuffled; a request with more is cut. By default
    requests stay whole, so that what their impressions share is looked up and computed once. 1 shuffles every
    impression by itself."""
    window_days: Days | None = None
    """Rows are shuffled within windows of so many days, one window after the other; by default over all dates."""
    sparse_learning_rate: PositiveFloat = 0.05
    """RowWiseAdagrad's, for all embedding tables."""
    dense_learning_rate: PositiveFloat = 0.001
    """Adam's, for everything else."""
    steps_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps that are taken, within which the learning rates rise and fall: for searching settings. With
    less than 1, `epochs` that are left open are the most by rule, without a validation window."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which both learning rates rise linearly from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same as a number of steps, which then counts in place of the share."""
    final_learning_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of both learning rates that is left at the end, after a linear fall; 1 keeps them constant."""
    task_weights: dict[str, PositiveFloat] = {}
    """Weights of tasks' losses that differ from those in `dataset.json`, by the task's name."""
    children: Children = "given"
    """What tasks with a parent learn from; both kinds predict p(task | parent = 1). `given`: rows on which the labels
    of all ancestors are 1. `entire_space`: every row on which its own label and those of all ancestors are known,
    through the product along the chain, p(parent and task) = p(parent) p(task | parent) (ESMM, arXiv 1804.07931); the
    learning curve's loss is then that of the product."""
    start_sids: Literal["same", "anew"] = "same"
    """Where a training starts from an earlier ranker (input `start`): `same` refuses SIDs of another encoder than that
    ranker's; `anew` lets all that belongs to SIDs start as it is initialized, and takes the rest of the ranker."""
    start_tables: Literal["same", "anew"] = "same"
    """Likewise, `anew` lets all tables start as they are initialized, and takes the network: for a training that learns
    rows which the earlier ranker has learned. Its tables know their labels, and a second pass would teach the network
    to trust them (see `restart_tables`)."""
    precision: Precision = "float32"
    """Of the products of the network between the embeddings and the logits, when training and when predicting.
    `bfloat16`: by autocast. `tf32`: float32 with products of 10-bit mantissas, on CUDA only; on a CPU it changes
    nothing and says so. Embedding lookups, attention's sums, loss, weights and metrics are float32 in any case."""
    restart_tables: bool = False
    """Whether each epoch after the first begins with the tables, and their optimizers' states, as they were before the
    first one, while the rest of the network trains on (multi-epoch data augmentation, arXiv 2305.19531). The rows of
    ids that occur rarely know the labels of the rows that they have seen, and a second pass over these teaches the
    network to trust them; with tables that have seen none of the epoch's rows, it can not. What the tables hold in the
    end is what one pass teaches."""
    average_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps, the last ones, over which the weights of the network are averaged, all but the tables. The
    means are what is measured, exported and started from. 0: the weights of the last step. A validation window that
    chooses the epochs is measured by the weights of an epoch's last step in any case."""
    seed: Seed = 0
    """Seeds initial weights and data order."""
    log_every: PositiveInt | None = None
    """Steps between two points of the learning curve; by default about 40 points a training. The last step always has
    a point, which is of half as many steps at least: where fewer are left after a point, that one is left out."""
    checkpoint_every: int = Field(default=1000, ge=0)
    """Steps between two checkpoints, from which a training that broke goes on; 0 makes none. A checkpoint is written
    while training goes on, and counts from a quarter of these steps later on."""
    checkpoints_kept: PositiveInt = 2
    """How many checkpoints are kept. A training goes on from the last, or, where its files were altered, from the one
    before."""


class ShardingConfig(Config):
    """What the planner may do with the embedding tables."""

    types: tuple[ShardingType, ...] = Field(default=("table_wise", "row_wise"), min_length=1)
    """Sharding types the planner chooses from. These two keep a row whole, so that RowWiseAdagrad, which has one
    state a row, trains the same on any number of ranks. Bags on a CPU can not be row-wise: torchrec leaves it out."""
    memory_gib: PositiveFloat | None = None
    """Memory of a rank's device that the planner may fill; by default what the device (or the host's share) has."""


def without_newest(dates: Dates, days: int, setting: str) -> tuple[Dates, Dates]:
    """Return the dates that are left when so many newest calendar days are held out, and those days.

    Args:
        dates: first and last, inclusive. days: how many. setting: what says so, for the message.

    Raises:
        ConfigError: no date would be left.
    """
    first, last = dates
    held_out = last - timedelta(days=days - 1)
    if held_out <= first:
        raise ConfigError(f"{setting}={days}: training is {first} to {last}, of which at least one day must be left")
    return (first, held_out - timedelta(days=1)), (held_out, last)


class HoldoutConfig(Config):
    """The dates an arm is measured on, and so those it is trained on."""

    kind: Literal["test", "validation", "dates"] = "test"
    """`test`: trained on all training dates, measured on the test dates. `validation`: the last training dates are
    held out instead, and nothing of the test dates is read: settings are chosen by these. `dates`: those of `learned`
    and `measured`, whatever the dataset's splits are, as a recurring training has them (`pipelines.retrain`)."""
    validation_days: Days = 7
    """How many of the last training dates are held out for validation."""
    learned: dict[str, Dates] = {}
    """`dates`: by task, the first and last date whose labels are learned. Labels of a task that mature later have
    earlier dates, so that each label is learned once, when it is known. A task that is not named learns nothing."""
    measured: dict[str, Dates] = {}
    """`dates`: by task, the first and last date whose labels are measured."""

    @model_validator(mode="after")
    def _check_dates(self) -> "HoldoutConfig":
        if (self.kind == "dates") != bool(self.learned and self.measured):
            raise ValueError(f"kind={self.kind}: learned and measured go with kind=dates, and with no other")
        for name, of_tasks in (("learned", self.learned), ("measured", self.measured)):
            for task, (first, last) in of_tasks.items():
                if first > last:
                    raise ValueError(f"{name}.{task}: {first} is after {last}")
        for task, (first, _) in self.measured.items():
            if task in self.learned and first <= self.learned[task][1]:
                raise ValueError(
                    f"measured.{task}: {first} is not after the last date learned, {self.learned[task][1]}"
                )
        return self

    @property
    def measured_labels(self) -> dict[str, Dates] | None:
        """By task, the dates whose labels are measured; None: those of all tasks, on all held-out dates."""
        return self.measured if self.kind == "dates" else None

    @property
    def learned_labels(self) -> dict[str, Dates] | None:
        """By task, the dates whose labels are learned; None: those of all tasks, on all training dates."""
        return self.learned if self.kind == "dates" else None

    def require_tasks(self, tasks: Iterable[str]) -> None:
        """Check that the tasks named are a dataset's.

        Raises:
            ConfigError: a task is unknown.
        """
        known = tuple(tasks)
        for task in (*self.learned, *self.measured):
            if task not in known:
                raise ConfigError(f"ranker.holdout: task {task!r} is unknown; tasks are {', '.join(known)}")

    def windows(self, spec: DatasetSpec) -> tuple[Dates, Dates]:
        """Return the dates to train on and those to measure on, each first and last, inclusive.

        Raises:
            ConfigError: validation would leave no date to train on.
        """
        if self.kind == "test":
            return spec.train, spec.test
        if self.kind == "dates":
            return _hull(self.learned.values()), _hull(self.measured.values())
        return without_newest(spec.train, self.validation_days, "ranker.holdout.validation_days")


def _hull(spans: Iterable[Dates]) -> Dates:
    firsts, lasts = zip(*spans, strict=True)
    return min(firsts), max(lasts)


class RankerConfig(Config):
    """The `ranker` section."""

    arm: str = "side"
    """Which of `arms` to train."""
    arms: dict[ArmName, ArmConfig] = {
        "none": ArmConfig(),
        "dense": ArmConfig(item="dense", history="dense"),
        "sid_ngram": ArmConfig(item="sid_ngram", history="sid_ngram"),
        "side": ArmConfig(item="side", history="side"),
    }
    """The contest's arms by name."""
    budget: SearchBudget = "standard"
    """What `pipelines.tune` spends on each arm's learning rates, the same on every arm."""
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    sharding: ShardingConfig = ShardingConfig()
    holdout: HoldoutConfig = HoldoutConfig()

    @model_validator(mode="after")
    def _check_arm(self) -> "RankerConfig":
        if self.arm not in self.arms:
            raise ValueError(f"arm {self.arm!r} is unknown; arms are {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def _check_entries(self) -> "RankerConfig":
        entries, lanes = self.model.history.max_entries, self.training.lanes
        if entries is not None and entries < lanes:
            raise ValueError(f"model.history.max_entries={entries}: must be at least training.lanes={lanes}")
        return self

    @model_validator(mode="after")
    def _check_children(self) -> "RankerConfig":
        learned = self.holdout.learned
        if self.training.children == "entire_space" and len(set(learned.values())) > 1:
            raise ValueError(
                "training.children=entire_space learns all tasks of a row; holdout.learned has other dates"
            )
        return self

    @property
    def content(self) -> ArmConfig:
        """The chosen arm."""
        return self.arms[self.arm]

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide a training: all but what is spent on the search for them."""
        return self.model_dump(mode="json", exclude={"budget"})

    def resolved(self, arm: str | None = None) -> Self:
        """Return the configuration of one arm alone: its overlay applied, `arms` reduced to it.

        This is what key, checkpoint and manifest hold the digest of: changing another arm leaves it as it is.
        Resolving twice changes nothing.

        Args:
            arm: an arm's name; by default the one chosen.

        Raises:
            ConfigError: the arm is unknown, or its overlay does not fit the settings it overlays.
        """
        name = self.arm if arm is None else arm
        if name not in self.arms:
            raise ConfigError(f"ranker.arm: {name!r} is unknown; arms are {', '.join(self.arms)}")
        chosen = self.arms[name]
        values = _overlaid(self.model_dump(mode="json", exclude={"arms"}), chosen.overlay)
        bare = chosen.model_copy(update={"overlay": {}})
        values |= {"arm": name, "arms": {name: bare.model_dump(mode="json")}}
        return parse(type(self), values, f"ranker (arm {name!r})")


def _overlaid(values: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with others laid over them, mapping by mapping."""
    laid = dict(values)
    for key, change in overlay.items():
        below = values.get(key)
        laid[key] = _overlaid(below, change) if isinstance(change, Mapping) and isinstance(below, Mapping) else change
    return laid
