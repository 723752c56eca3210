"""How the model is trained, and what the planner may do with its tables."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from sidestack.infra.config import Config, Days, Seed

Children = Literal["given", "entire_space"]
"""What a task with a parent learns from: rows whose parent's label is 1, or all rows, by p(parent) p(task | parent)."""

Precision = Literal["float32", "tf32", "bfloat16"]
"""Of the matrix products of the network between embeddings and logits."""

ShardingType = Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]


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
