"""Settings of training and of table sharding."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from sidestack.infra.config import Config, Days, Seed

Children = Literal["given", "entire_space"]
"""Rows that a task with a parent learns from: those with parent label 1, or all, by p(parent) p(task | parent)."""

Precision = Literal["float32", "tf32", "bfloat16"]
"""Precision of the network's matrix products, between embeddings and logits."""

ShardingType = Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]


class TrainingConfig(Config):
    """How the model is trained and evaluated."""

    epochs: PositiveInt | None = None
    """Passes over the training rows. By default a validation window decides, if the log is small enough to need more
    than one pass and long enough for a window; else one (`ranker.budget`)."""
    batch_size: PositiveInt | None = None
    """Rows of a global batch, over all ranks: the same batches for any number of ranks. By default a power of two that
    leaves enough steps per epoch (`ranker.budget`)."""
    validation_days: int | None = Field(default=None, ge=0, le=36_500)
    """How many of the newest training dates form the validation window for early stopping. A first training holds them
    out, and ends when the mean of the tasks' normalized entropies on them rises from one epoch to the next. The arm is
    then trained afresh, on all training dates, for the epochs before the rise. `epochs`, if set, is the maximum. 0: no
    window. By default a tenth of the dates if `epochs` is left open, else none (`ranker.budget`)."""
    eval_batch_size: PositiveInt = 4096
    """Rows of a global batch when evaluating."""
    lanes: PositiveInt = 8
    """Number of ranges the rows are cut into; a multiple of the number of ranks (see `infra.lanes.LaneReader`)."""
    rows_per_request: PositiveInt | None = None
    """How many impressions of a request stay together when rows are shuffled; a request with more is split. By default
    requests stay whole, so that inputs shared by their impressions are looked up and computed once. 1 shuffles single
    impressions."""
    window_days: Days | None = None
    """Rows are shuffled within consecutive windows of this many days; by default over all dates."""
    sparse_learning_rate: PositiveFloat = 0.05
    """RowWiseAdagrad's learning rate, for all embedding tables."""
    dense_learning_rate: PositiveFloat = 0.001
    """Adam's learning rate, for everything else."""
    steps_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps to train, with the whole learning rate schedule within it: for searching settings. Below 1,
    `epochs` left open are the rule's maximum, without a validation window."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which both learning rates rise linearly from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The warmup as a number of steps, which overrides the share."""
    final_learning_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of both learning rates left at the end, after a linear decay; 1 keeps them constant."""
    task_weights: dict[str, PositiveFloat] = {}
    """Weights of tasks' losses that differ from those in `dataset.json`, by the task's name."""
    children: Children = "given"
    """Rows that tasks with a parent learn from; both kinds predict p(task | parent = 1). `given`: rows on which the
    labels of all ancestors are 1. `entire_space`: all rows on which the labels of the task and of all its ancestors
    are known, by the product along the chain, p(parent and task) = p(parent) p(task | parent) (ESMM,
    arXiv 1804.07931); the learning curve's loss is then that of the product."""
    start_sids: Literal["same", "anew"] = "same"
    """SIDs in a warm start (input `start`): `same` refuses SIDs of another encoder than the earlier ranker's; `anew`
    leaves all weights of SIDs at their initial values, and loads the rest."""
    start_tables: Literal["same", "anew"] = "same"
    """Tables in a warm start: `anew` leaves all tables at their initial values, and loads the network, to train again
    on rows of the earlier ranker. Its tables have memorized their labels, and a second pass would teach the network to
    trust them (see `restart_tables`)."""
    precision: Precision = "float32"
    """Precision of the network's products between embeddings and logits, in training and prediction. `bfloat16`: by
    autocast. `tf32`: float32 with products of 10-bit mantissas, only on CUDA; on a CPU a no-op with a warning.
    Embedding lookups, attention's sums, loss, weights and metrics are always float32."""
    restart_tables: bool = False
    """Whether each epoch after the first resets the tables and their optimizers' states to those before the first one,
    while the rest of the network continues (multi-epoch data augmentation, arXiv 2305.19531). Embeddings of rare ids
    memorize the labels of their rows, and a second pass over these rows teaches the network to trust them. Tables that
    have seen none of the epoch's rows prevent this. The final tables are trained in one pass."""
    average_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps, at the end, over which the network's weights are averaged; tables are not. The means are
    measured, exported and used for a warm start. 0: the weights of the last step. The validation window is always
    measured with the weights of an epoch's last step."""
    seed: Seed = 0
    """Seeds initial weights and data order."""
    log_every: PositiveInt | None = None
    """Steps between two points of the learning curve; by default about 40 points per training. The last step always has
    a point, over at least half as many steps: a point with fewer steps left after it is omitted."""
    checkpoint_every: int = Field(default=1000, ge=0)
    """Steps between two checkpoints, from which an interrupted training resumes; 0 makes none. A checkpoint is written
    while training continues, and counts from a quarter of these steps later."""
    checkpoints_kept: PositiveInt = 2
    """How many checkpoints are kept. A training resumes from the last, or, if its files were altered, from the one
    before."""


class ShardingConfig(Config):
    """Constraints of the planner for the embedding tables."""

    types: tuple[ShardingType, ...] = Field(default=("table_wise", "row_wise"), min_length=1)
    """Sharding types the planner chooses from. The two defaults keep a row whole, so that RowWiseAdagrad, with one
    state per row, trains the same on any number of ranks. torchrec has no row-wise sharding for bags on a CPU."""
    memory_gib: PositiveFloat | None = None
    """Memory of a rank's device that the planner may fill; by default all of the device (or of the host's share)."""
