"""The encoder's two config sections: `encoder` (training) and `materialize`."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sidestack.encoder.quantizers import AnyQuantizer
from sidestack.encoder.quantizers.structured import StructuredConfig
from sidestack.encoder.sid.packing import Packing
from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.infra.config import Config, Seed
from sidestack.infra.tables import Entity

ENCODER_INPUT = "encoder."
"""Prefix of the input names of materialize's encoders; the rest is the name of the SIDs that the encoder makes."""

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class NetworkConfig(Config):
    """Sizes of the fusion network; the decoder mirrors the encoder."""

    embedding_width: PositiveInt = 128
    """Width of the output of an embedding signal's own encoder e_k, which the fusion network takes."""
    categorical_width: PositiveInt = 32
    """Dimensions of a categorical signal's embedding table."""
    hidden: PositiveInt = 256
    """Units of the fusion network f and of its mirror r."""
    blocks: PositiveInt = 1
    """Residual blocks of f, and of r."""


class TrainingConfig(Config):
    """How the network is trained."""

    epochs: PositiveInt | None = None
    """Passes over the items; by default as many as make enough steps (`encoder.budget`)."""
    batch_size: PositiveInt | None = None
    """Items in a global batch, over all ranks; by default a power of two that leaves enough steps an epoch
    (`encoder.budget`)."""
    lanes: PositiveInt = 8
    """Parts in which the table is read; must be divisible by the number of ranks. See `infra.lanes.LaneReader`."""
    learning_rate: Positive = 4e-3
    """AdamW's peak learning rate; it decays to 0 along a cosine."""
    warmup_share: Share = 0.05
    """Share of the steps over which the rate rises from 0 to its peak."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay, on matrices only."""
    clip_norm: Positive = 1.0
    """The largest gradient norm; a longer gradient is scaled down to it."""
    codebook_weight: NotNegative = 10.0
    """alpha, the weight of the codebook loss."""
    commitment_weight: NotNegative = 2.5
    """beta, the weight of the commitment loss; see `Quantizer.commitment_scale`."""
    signal_dropout: Share = 0.1
    """Share of the rows whose signals are partly hidden from the encoder, at random; the losses cover all signals."""
    codebook_starts: tuple[Share, ...] = (0.0, 0.05, 0.1, 0.2, 0.3)
    """When, in shares of the steps, the codebook is set (again) from the latent vectors. At step 0 the latent vectors
    come from an untrained network; a codebook set only then keeps dead levels."""
    revive_every: PositiveInt = 100
    """Steps between restarts of unused codes, or of unused lines where a layer has several."""
    seed: Seed = 0
    """Seed of the initial weights, the codebook's start and the order of rows."""
    holdout_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the items, chosen by a hash of item_id, that are never trained on."""
    holdout_rows: PositiveInt = 8192
    """Maximum number of held-out items kept in memory for evaluation, over all ranks."""
    log_every: PositiveInt | None = None
    """Steps between two records of the training metrics; by default about 40 records a training. The last step always
    has a record, of at least half as many steps: if fewer would be left after a record, that record is skipped."""
    collapse: Literal["warn", "stop", "off"] = "warn"
    """What to do when a digit's use is below `collapse_threshold` after the codebook's last start."""
    collapse_threshold: Share = 0.05
    """Minimum use of a digit over the steps of a record (`log_every`): 0 if all rows have one value, 1 if all values
    are equally frequent; see `encoder.evaluation.codebook_use`."""
    checkpoint_every: NonNegativeInt = 1000
    """Steps between two checkpoints, from which a stopped training resumes; 0: none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the networks' matrix products in training (autocast). Quantization, losses, weights and everything
    that decides an id are always float32."""


class SearchConfig(Config):
    """The extent of the digit search when items are encoded (`encoder.search`)."""

    rounds: Annotated[int, Field(ge=0)] = 0
    """Passes over the digits; 0: the rounded digits are used as they are."""
    candidates: PositiveInt = 16
    """Number of values tried for a digit: those with h_hat nearest to h. All values if the digit has fewer."""


class EncoderConfig(Config):
    """Section `encoder`: which signals, what network, which quantizer, how trained."""

    entity: Entity = "item"
    """The table to encode: the items, or the users."""
    signals: dict[str, Positive] = {}
    """Weight w_k of every signal's loss; empty: all signals of the entity, embeddings with
    weight 1, categoricals with 0.1 (their cross-entropy is in nats, a cosine loss is below 1)."""
    network: NetworkConfig = NetworkConfig()
    quantizer: AnyQuantizer = StructuredConfig()
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.search.rounds and self.quantizer.not_searched:
            raise ValueError(f"search.rounds: {self.quantizer.not_searched}")
        return self


class MaterializeConfig(Config):
    """Section `materialize`: the form of the ids, and how many rows are encoded at a time."""

    prefix_lengths: dict[str, tuple[PositiveInt, ...]] = {DEFAULT_NAME: (5, 10, 15)}
    """Prefix lengths, in digits, by the SIDs' name; the events have columns for each prefix besides the whole SID."""
    packing: Packing = "mixed_radix"
    """How digits are packed into ids; `paper_eq5` exists for parity with the paper."""
    batch_size: PositiveInt = 4096
    """Items converted to tensors at a time on each rank. It bounds memory; ids do not depend on it."""
    published: Literal["keep", "move"] = "keep"
    """What happens to the SIDs that input `published` lists when the encoder was refreshed. `keep`: they stay, and only
    new items are encoded. `move`: all items are encoded. SIDs of an encoder trained from scratch are never kept."""
