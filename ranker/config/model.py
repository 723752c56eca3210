"""The sizes of the model, the same in all arms."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from sidestack.infra.config import Config, Days

Pooling = Literal["pma", "target"]
"""The source of the attention queries: all the row's sparse and embedding features (the paper's PMA), or only the ad's
own."""


class HistoryConfig(Config):
    """The user history block; by default it is the paper's, one layer of PMA with a single head."""

    queries: PositiveInt = 4
    """k: the number of vectors that the block outputs."""
    heads: PositiveInt = 1
    """Attention heads, of the pooling and of the encoder; must divide d."""
    pooling: Pooling = "pma"
    """Where the queries come from; `target` is attention of the ad's item id and content to the history."""
    encoder_layers: int = Field(default=0, ge=0)
    """Transformer layers among a history's entries, before they are pooled."""
    max_length: PositiveInt | None = None
    """The maximum of entries per history; older ones are cut and counted. None keeps all."""
    max_entries: PositiveInt | None = None
    """The maximum of history entries in a global batch, which bounds a batch's memory. It is divided among the lanes;
    if the histories of a lane's share have more, the longest are cut to their newest entries until they fit. Cut
    entries are counted. None: no bound."""


class AdmissionConfig(Config):
    """Which ids have a row of their own in a table of bounded size; the others share the fallback rows."""

    min_count: PositiveInt
    """An id is admitted once it was seen this often: in requests for columns of requests, else in impressions."""
    max_age_days: Days
    """An id that was not seen within the last so many days of the training dates loses its row, and its count starts
    again at 0."""
    max_rows: int = Field(gt=1, lt=2**31)
    """Rows of the table, including the fallback rows. A warm start may have more rows than the earlier ranker, not
    fewer."""
    fallback_rows: PositiveInt = 1024
    """How many of these rows are shared, by id modulo this number."""

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
    """d: the width of every embedding. fbgemm's kernels need a multiple of 4."""
    dense_outputs: PositiveInt = 2
    """r: the number of d-wide vectors that the dense block outputs."""
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
    may be in only one of the two."""

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
