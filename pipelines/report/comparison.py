"""The schema of `comparison.json`: everything the tables, figures and page are made from."""

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from sidestack.infra.config import Config
from sidestack.infra.tables import TaskSpec
from sidestack.pipelines.report.config import VerdictConfig

COMPARISON_FILE = "comparison.json"


class Gain(Config):
    """A gain in some metric over some other arm, and its paired interval over users and trainings."""

    gain: float
    """Positive is better: 1 - arm / other where lower values are better, arm / other - 1 where higher are. Of the mean
    over replicates."""
    interval: tuple[float, float]
    """Lower and upper bound, at the comparison's confidence; with one replicate over users alone. Of AUC, whose pairs
    of rows cross users, it is to first order in how often each user was drawn (`ranker.statistics.AucTally`)."""
    replicates: tuple[float, ...] = ()
    """The gain in each replicate."""
    seeds: float | None = None
    """Standard deviation over replicates; null with one."""

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds 0, that is: no difference is shown."""
        low, high = self.interval
        return low <= 0.0 <= high


class MetricResult(Config):
    """One metric of one arm on one task."""

    value: float | None
    """The mean over replicates; null where the metric is not defined on these rows."""
    replicates: tuple[float, ...] = ()
    """The value in each replicate."""
    over: dict[str, Gain] = {}
    """The gain over every other arm, from the same resamples; none where neither direction is better, and where a
    resample may leave nothing to improve on."""
    counts: dict[str, int] = {}
    """How many of what it stands on, where these are not all labelled rows: of GAUC `users` who have both labels, and
    their `rows`."""


class DecileResult(Config):
    """A tenth of the labelled rows by predicted chance; means over replicates, each with its own tenths."""

    rows: int
    predicted: float
    """Mean predicted chance."""
    observed: float
    """Share of rows with label 1."""


class Segment(Config):
    """The rows with some number of earlier positives, of their user or of their item."""

    name: str
    """The number of positives of the comparison's `earlier_task` in the training dates."""
    rows: int
    """Labelled rows."""
    users: int
    """Users among them."""
    positives: int
    gain: Gain | None
    """In the headline metric, over the reference; null for the reference itself, and where a resample may hold none of
    the rows."""


class Verdict(Config):
    """What a gain shows, in words."""

    kind: Literal["better", "worse", "no difference shown", "withheld"]
    """`better` and `worse`: the interval lies on that side of 0; `no difference shown`: it holds 0; `withheld`: the
    trainings, or the rows they are measured on, cannot show a difference, whatever the interval."""
    reasons: tuple[str, ...] = ()
    """Why it is withheld."""

    @property
    def is_shown(self) -> bool:
        """Whether a difference is shown."""
        return self.kind in ("better", "worse")

    @property
    def is_withheld(self) -> bool:
        """Whether there is no verdict."""
        return self.kind == "withheld"

    @property
    def words(self) -> str:
        """The verdict as every table, figure and page says it."""
        return f"{self.kind} ({'; '.join(self.reasons)})" if self.reasons else self.kind


class Learning(Config):
    """How an arm learned a task: its curves of NE over the training, means over replicates."""

    train_ne: float
    """Mean of the last quarter of the training."""
    late_fall: float | None = None
    """The share by which it fell from the third quarter; null where a curve has no point there."""
    late_fall_error: float | None = None
    """Standard error of `late_fall`, as the points of each quarter scatter; null with one point a quarter."""
    lowest_validation_ne: float | None = None
    """Of the points up to the end of the training; null without a validation curve."""
    last_validation_ne: float | None = None
    """At the end of the training."""
    late_validation_fall: float | None = None
    """The share by which one point of validation more would have fallen, or, where none was tried, by which the last
    fell; null with one point."""


class TaskResult(Config):
    """One arm on one task."""

    num: int
    """Labelled rows of the held-out dates."""
    positives: int
    """Rows with label 1 among them."""
    users: int | None = None
    """Users among the labelled rows; null from an older version."""
    learning: Learning | None = None
    """Null where the training left no curve."""
    doubts: tuple[str, ...] = ()
    """What keeps this arm's training, or these rows, from showing a difference to any other arm."""
    verdict: Verdict | None = None
    """On the gain over the reference in the headline metric; null for the reference, and where there is no gain."""
    metrics: dict[str, MetricResult]
    """Every metric of `ranker.metric_registry.all_metrics`, by name."""
    deciles: tuple[DecileResult, ...] = ()
    """Calibration by predicted chance, lowest first."""
    segments: dict[str, tuple[Segment, ...]] = {}
    """`user` and `item` -> rows by the number of earlier positives of each."""

    def gain(self, metric: str, other: str) -> Gain | None:
        """Return the gain in a metric over another arm, None where there is none."""
        return self.metrics[metric].over.get(other)


class IdTable(Config):
    """One embedding table of an arm, by the ids that its training and held-out rows look up."""

    model_config = ConfigDict(extra="ignore")

    table: str
    is_sid: bool
    possible_ids: int
    distinct_ids: int
    """Different ids in the training rows."""
    rows: int
    """Of the table: its hash size, where that is less than the possible ids; with admission its bound."""
    collision_share: float
    """Share of the distinct ids whose row is another one's, too."""
    bytes: int
    held_out_ids: int = 0
    """Lookups in the held-out rows."""
    never_seen: int = 0
    """Those of ids that no training row has."""


class LabelCounts(Config):
    """Rows on which a task is judged: its label, and those of all its ancestors as 1, are known."""

    rows: int
    positives: int


class Training(Config):
    """How long an arm was trained, and at which settings; null what its output does not say."""

    model_config = ConfigDict(extra="ignore")

    steps: int | None = None
    """Null of an arm that takes no steps, such as one of boosted trees."""
    epochs: int | None = None
    batch_size: int | None = None
    """Rows of a global batch."""
    sparse_learning_rate: float | None = None
    dense_learning_rate: float | None = None
    validation_days: int | None = None
    """The newest training dates that decided the number of epochs; 0: none did."""
    by_rule: tuple[str, ...] = ()
    """The settings that the configuration left to a rule."""


class ArmResult(Config):
    """One arm: how well it predicts, and what it costs (speed, memory and bytes a row: the median of replicates)."""

    tasks: dict[str, TaskResult]
    training: Training = Training()
    """Of the first replicate."""
    sid_table_bytes: int
    """Bytes of the embedding tables that Semantic IDs alone need."""
    table_bytes: int
    """Bytes of all embedding tables."""
    tables: tuple[IdTable, ...] = ()
    """All embedding tables, as the first replicate's rows use them."""
    feature_bytes_per_row: float
    """Bytes of content feature in one row, ad and history together."""
    samples_per_second: float
    """Training rows a second, all ranks together."""
    peak_memory_bytes: int
    """The largest rank's peak memory while training."""
    flops_per_sample: float | None = None
    """Floating-point operations of the dense part's matrix products, forward, for one row; fbgemm's kernels (lookups,
    attention over histories) and what is done element by element are not counted."""
    train_seconds: float | None
    parameters: int | None
    world_size: int | None
    roi: float | None
    """Mean gain of the tasks in the headline metric (NE), for each KiB of `feature_bytes_per_row` (SIDE paper, section
    6.2: the cost C is proportional to the feature's length); null for the reference, without a content feature, and
    where it is withheld."""
    roi_withheld: str = ""
    """Why there is no return; empty where there is one, or nothing to return."""


class SignalLoss(Config):
    """How well one content signal comes back from the Semantic ID, on held-out items."""

    name: str
    kind: str
    """``cosine`` for an embedding, ``cross-entropy`` (nats) for a categorical."""
    loss: float
    top1: float | None
    """Share of items whose category is the most likely one; null for an embedding."""


class EncoderResult(Config):
    """What the comparison shows of the encoder, measured on held-out items where it does not say otherwise."""

    items: int
    losses: tuple[SignalLoss, ...]
    unique_share: float
    """Different Semantic IDs over items, of the held-out items: those of few items rarely meet."""
    histogram: tuple[tuple[int, ...], ...]
    """Items that took each value of each digit, [digits][values]."""
    entropy_bits: tuple[float, ...]
    """Entropy of each digit."""
    most_bits: float
    """The most a digit could carry."""
    catalogue_items: int | None = None
    """Items (users) that were given a Semantic ID; null where the dataset does not say."""
    catalogue_unique_share: float | None = None
    """Different Semantic IDs over these."""


class Comparison(Config):
    """The whole contest."""

    reference: str
    tasks: dict[str, TaskSpec]
    """What is predicted, in the order of the dataset."""
    earlier_task: str
    """The task whose positives in the training dates segments are made by: the first without a parent."""
    confidence: float
    resamples: int
    seed: int
    rows: int
    """Impressions of the held-out dates."""
    users: int
    """Users among them, the units that are resampled."""
    replicates: int = 1
    """Trainings of each arm, each with its own seeds."""
    rules: VerdictConfig = VerdictConfig()
    """When verdicts are withheld."""
    trained_on: dict[str, LabelCounts] = {}
    """By task: the judged rows of the training dates."""
    differs: tuple[str, ...] = ()
    """The settings that differ between arms."""
    origin: str
    train: tuple[str, str]
    """First and last training date."""
    held_out: tuple[str, str]
    """First and last held-out date."""
    config_digest: str
    """SHA-256 of the resolved configuration of every stage that went in."""
    versions: dict[str, str]
    inputs: dict[str, str]
    """Digest of each input's manifest."""
    warnings: tuple[str, ...]
    """What the arms differ in beside the arm."""
    arms: dict[str, ArmResult]
    encoder: EncoderResult

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """Read the comparison that a committed directory holds."""
        return cls.model_validate_json((path / COMPARISON_FILE).read_bytes())
