"""The schema of `comparison.json`: everything the tables, figures and page are made from."""

from pathlib import Path

from pydantic import ConfigDict

from infra.config import Config
from infra.tables import TaskSpec

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


class TaskResult(Config):
    """One arm on one task."""

    num: int
    """Labelled rows of the held-out dates."""
    positives: int
    """Rows with label 1 among them."""
    metrics: dict[str, MetricResult]
    """Every metric of `ranker.metric_registry.METRICS`, by name."""
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
    """Of the table: its hash size, where that is less than the possible ids."""
    collision_share: float
    """Share of the distinct ids whose row is another one's, too."""
    bytes: int
    held_out_ids: int = 0
    """Lookups in the held-out rows."""
    never_seen: int = 0
    """Those of ids that no training row has."""


class ArmResult(Config):
    """One arm: how well it predicts, and what it costs (speed, memory and bytes a row: the median of replicates)."""

    tasks: dict[str, TaskResult]
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
    6.2: the cost C is proportional to the feature's length); null for the reference, and without a content feature."""


class SignalLoss(Config):
    """How well one content signal comes back from the Semantic ID, on held-out items."""

    name: str
    kind: str
    """``cosine`` for an embedding, ``cross-entropy`` (nats) for a categorical."""
    loss: float
    top1: float | None
    """Share of items whose category is the most likely one; null for an embedding."""


class EncoderResult(Config):
    """What the comparison shows of the encoder, all of it measured on held-out items."""

    items: int
    losses: tuple[SignalLoss, ...]
    unique_share: float
    """Different Semantic IDs over items."""
    histogram: tuple[tuple[int, ...], ...]
    """Items that took each value of each digit, [digits][values]."""
    entropy_bits: tuple[float, ...]
    """Entropy of each digit."""
    most_bits: float
    """The most a digit could carry."""


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
