"""The schema of `comparison.json`: everything the tables, figures and page are made from."""

from infra.config import Config


class Gain(Config):
    """An NE gain over some other arm, and its paired interval over users."""

    ne_gain: float
    """1 - NE(arm) / NE(other); positive is better."""
    ne_gain_interval: tuple[float, float]
    """Lower and upper bound, at the comparison's confidence."""

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds 0, that is: no difference is shown."""
        low, high = self.ne_gain_interval
        return low <= 0.0 <= high


class TaskResult(Config):
    """One arm on one task. A figure that is not defined on these rows is null."""

    num: int
    """Labelled rows of the held-out dates."""
    positives: int
    """Rows with label 1 among them."""
    ne: float | None
    """Normalized entropy (SIDE paper, Eq. 7); below 1 is better than the base rate."""
    ne_gain: float | None
    """1 - NE(arm) / NE(reference); 0 for the reference itself."""
    ne_gain_interval: tuple[float, float] | None
    """Paired bootstrap interval of `ne_gain`; null for the reference itself."""
    auc: float | None
    """Chance that a positive is scored above a negative, ties counting half."""
    calibration: float | None
    """Sum of predictions over number of positives; 1 is right."""
    over: dict[str, Gain]
    """The gain over every other arm, from the same resamples."""


class ArmResult(Config):
    """One arm: how well it predicts, and what it costs."""

    tasks: dict[str, TaskResult]
    sid_table_bytes: int
    """Bytes of the embedding tables that Semantic IDs alone need."""
    table_bytes: int
    """Bytes of all embedding tables."""
    feature_bytes_per_row: float
    """Bytes of content feature in one row, ad and history together."""
    samples_per_second: float
    """Training rows a second, all ranks together."""
    peak_memory_bytes: int
    """The largest rank's peak memory while training."""
    train_seconds: float | None
    parameters: int | None
    world_size: int | None
    roi: float | None
    """Mean NE gain of the tasks for each KiB of `feature_bytes_per_row` (SIDE paper, section 6.2: the cost C is
    proportional to the feature's length); null without a content feature."""


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
    confidence: float
    resamples: int
    seed: int
    rows: int
    """Impressions of the held-out dates."""
    users: int
    """Users among them, the units that are resampled."""
    origin: str
    train: tuple[str, str]
    """First and last training date."""
    test: tuple[str, str]
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
