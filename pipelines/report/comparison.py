"""The schema of `comparison.json`, from which tables, figures and page are made."""

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from sidestack.infra.config import Config
from sidestack.infra.tables import TaskSpec
from sidestack.pipelines.report.config import VerdictConfig

COMPARISON_FILE = "comparison.json"


class Gain(Config):
    """A gain in a metric over another arm, and its paired interval over users and trainings."""

    gain: float
    """Positive is better: 1 - arm / other if lower values are better, arm / other - 1 if higher are. Values are means
    over replicates."""
    interval: tuple[float, float]
    """Lower and upper bound, at the comparison's confidence; with one replicate over users only. For AUC, whose pairs
    of rows cross users, it is a first-order approximation in how often each user was drawn
    (`ranker.statistics.AucTally`)."""
    replicates: tuple[float, ...] = ()
    """The gain in each replicate."""
    seeds: float | None = None
    """Standard deviation over replicates; null with one."""

    @property
    def holds_zero(self) -> bool:
        """Whether the interval contains 0, so no difference is shown."""
        low, high = self.interval
        return low <= 0.0 <= high


class MetricResult(Config):
    """One metric of one arm on one task."""

    value: float | None
    """The mean over replicates; null if the metric is not defined on these rows."""
    replicates: tuple[float, ...] = ()
    """The value in each replicate."""
    over: dict[str, Gain] = {}
    """The gain over every other arm, from the same resamples; empty if neither direction is better, or if a resample
    may leave nothing to improve on."""
    counts: dict[str, int] = {}
    """The metric's sample sizes, if it does not use all labelled rows: for GAUC, `users` with both labels and their
    `rows`."""


class DecileResult(Config):
    """A decile of the labelled rows by predicted probability; means over replicates, each with its own deciles."""

    rows: int
    predicted: float
    """Mean predicted probability."""
    observed: float
    """Share of rows with label 1."""


class Segment(Config):
    """The rows whose user (or item) has a given number of earlier positives."""

    name: str
    """Range of the number of positives of the comparison's `earlier_task` in the training dates."""
    rows: int
    """Labelled rows."""
    users: int
    """Users among them."""
    positives: int
    gain: Gain | None
    """In the headline metric, over the reference; null for the reference itself, and if a resample may have no rows."""


class Verdict(Config):
    """Verdict on a gain."""

    kind: Literal["better", "worse", "no difference shown", "withheld"]
    """`better`, `worse`: the interval is on that side of 0; `no difference shown`: it contains 0; `withheld`: the
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
        """The verdict in words, as in tables, figures and page."""
        return f"{self.kind} ({'; '.join(self.reasons)})" if self.reasons else self.kind


class Learning(Config):
    """Learning of a task by an arm: statistics of its NE curves, as means over replicates."""

    train_ne: float
    """Mean training NE over the last quarter of the training."""
    late_fall: float | None = None
    """Relative fall of training NE from the third to the last quarter; null if a curve has no point there."""
    late_fall_error: float | None = None
    """Standard error of `late_fall`, from the scatter of points in each quarter; null with one point a quarter."""
    lowest_validation_ne: float | None = None
    """Lowest validation NE up to the end of the training; null without a validation curve."""
    last_validation_ne: float | None = None
    """Validation NE at the end of the training."""
    late_validation_fall: float | None = None
    """Relative fall of validation NE at the first point after the end of the training, or, without one, at the last
    point; null with one point."""


class TaskResult(Config):
    """One arm on one task."""

    num: int
    """Labelled rows of the held-out dates."""
    positives: int
    """Rows with label 1 among them."""
    users: int | None = None
    """Users among the labelled rows; null in files of older versions."""
    learning: Learning | None = None
    """Null if the training has no curve."""
    doubts: tuple[str, ...] = ()
    """Why this arm's training, or these rows, cannot show a difference to any other arm."""
    verdict: Verdict | None = None
    """On the gain over the reference in the headline metric; null for the reference, and if there is no gain."""
    metrics: dict[str, MetricResult]
    """Every metric of `ranker.metric_registry.all_metrics`, by name."""
    deciles: tuple[DecileResult, ...] = ()
    """Calibration by predicted probability, lowest first."""
    segments: dict[str, tuple[Segment, ...]] = {}
    """`user` and `item` -> segments by number of earlier positives."""

    def gain(self, metric: str, other: str) -> Gain | None:
        """Return the gain in a metric over another arm; None if there is none."""
        return self.metrics[metric].over.get(other)


class IdTable(Config):
    """Use of an arm's embedding table by the ids in training and held-out rows."""

    model_config = ConfigDict(extra="ignore")

    table: str
    is_sid: bool
    possible_ids: int
    distinct_ids: int
    """Distinct ids in the training rows."""
    rows: int
    """Rows of the table: the hash size if it is less than the number of possible ids; with admission, the maximum."""
    collision_share: float
    """Share of the distinct ids that share a row with another id."""
    bytes: int
    held_out_ids: int = 0
    """Number of lookups in the held-out rows."""
    never_seen: int = 0
    """Lookups of ids that are in no training row."""


class LabelCounts(Config):
    """Counts of the rows on which a task is judged: its label is known, and all its ancestors' labels are 1."""

    rows: int
    positives: int


class Training(Config):
    """Length and settings of an arm's training; null if not in its output."""

    model_config = ConfigDict(extra="ignore")

    steps: int | None = None
    """Null for an arm without steps, such as boosted trees."""
    epochs: int | None = None
    batch_size: int | None = None
    """Rows of a global batch."""
    sparse_learning_rate: float | None = None
    dense_learning_rate: float | None = None
    validation_days: int | None = None
    """Number of newest training dates that decided the number of epochs; 0: none."""
    by_rule: tuple[str, ...] = ()
    """Settings that the configuration left to a rule."""


class ArmResult(Config):
    """Quality and cost of one arm (speed, memory and bytes a row: the median over replicates)."""

    tasks: dict[str, TaskResult]
    training: Training = Training()
    """Training of the first replicate."""
    sid_table_bytes: int
    """Bytes of the embedding tables that only Semantic IDs need."""
    table_bytes: int
    """Bytes of all embedding tables."""
    tables: tuple[IdTable, ...] = ()
    """Use of all embedding tables by the first replicate."""
    feature_bytes_per_row: float
    """Bytes of the content feature per row, ad and history together."""
    samples_per_second: float
    """Training rows a second over all ranks."""
    peak_memory_bytes: int
    """Maximum over ranks of peak memory in training."""
    flops_per_sample: float | None = None
    """Floating-point operations per row in the dense part's forward matrix products; fbgemm's kernels (lookups,
    attention over histories) and element-wise operations are not counted."""
    train_seconds: float | None
    parameters: int | None
    world_size: int | None
    roi: float | None
    """Mean gain over tasks in the headline metric (NE), per KiB of `feature_bytes_per_row` (SIDE paper, section 6.2:
    the cost C is proportional to the feature's length); null for the reference, without a content feature, and if
    withheld."""
    roi_withheld: str = ""
    """Why the return is withheld; empty otherwise."""


class SignalLoss(Config):
    """Reconstruction loss of one content signal from the Semantic ID, on held-out items."""

    name: str
    kind: str
    """``cosine`` for an embedding, ``cross-entropy`` (nats) for a categorical."""
    loss: float
    top1: float | None
    """Share of items whose category is the most probable one; null for an embedding."""


class EncoderResult(Config):
    """Measures of the encoder, on held-out items unless stated otherwise."""

    items: int
    losses: tuple[SignalLoss, ...]
    unique_share: float
    """Distinct Semantic IDs / items, over the held-out items; with few items, collisions are rare."""
    histogram: tuple[tuple[int, ...], ...]
    """Number of items with each value of each digit, [digits][values]."""
    entropy_bits: tuple[float, ...]
    """Entropy of each digit, in bits."""
    most_bits: float
    """Maximum entropy of a digit, in bits."""
    catalogue_items: int | None = None
    """Number of items (users) with a Semantic ID; null if not in the dataset."""
    catalogue_unique_share: float | None = None
    """Distinct Semantic IDs / these items (users)."""


class Comparison(Config):
    """A comparison of arms."""

    reference: str
    tasks: dict[str, TaskSpec]
    """The tasks, in the dataset's order."""
    earlier_task: str
    """The task whose positives in the training dates define segments: the first without a parent."""
    confidence: float
    resamples: int
    seed: int
    rows: int
    """Impressions of the held-out dates."""
    users: int
    """Users among them: the resampled units."""
    replicates: int = 1
    """Number of trainings of each arm, each with its own seeds."""
    rules: VerdictConfig = VerdictConfig()
    """When verdicts are withheld."""
    trained_on: dict[str, LabelCounts] = {}
    """By task: counts of the judged rows in the training dates."""
    differs: tuple[str, ...] = ()
    """The settings that differ between arms."""
    origin: str
    train: tuple[str, str]
    """First and last training date."""
    held_out: tuple[str, str]
    """First and last held-out date."""
    config_digest: str
    """SHA-256 of the resolved configuration of all stages that contribute."""
    versions: dict[str, str]
    inputs: dict[str, str]
    """Digest of each input's manifest."""
    warnings: tuple[str, ...]
    """Differences between arms other than the arm itself."""
    arms: dict[str, ArmResult]
    encoder: EncoderResult

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """Read the comparison in a committed directory."""
        return cls.model_validate_json((path / COMPARISON_FILE).read_bytes())
