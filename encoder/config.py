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
"""Begins the names of materialize's encoders; what follows is the name of the SIDs that an encoder gives."""

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class NetworkConfig(Config):
    """Sizes of the fusion network; the decoder mirrors the encoder."""

    embedding_width: PositiveInt = 128
    """Units in which an embedding signal's own encoder e_k hands it to the fusion network."""
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
    """Parts the table is read in; the number of ranks must divide it. See `infra.lanes.LaneReader`."""
    learning_rate: Positive = 4e-3
    """AdamW's learning rate at its peak; it follows a cosine down to 0."""
    warmup_share: Share = 0.05
    """Share of the steps in which the rate rises from 0 to its peak."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay, on matrices only."""
    clip_norm: Positive = 1.0
    """The longest gradient; a longer one is scaled down to it."""
    codebook_weight: NotNegative = 10.0
    """alpha, the weight of the codebook loss."""
    commitment_weight: NotNegative = 2.5
    """beta, the weight of the commitment loss; see `Quantizer.commitment_scale`."""
    signal_dropout: Share = 0.1
    """Share of the rows of which the encoder sees only some signals, at random; the losses ask for all of them."""
    codebook_starts: tuple[Share, ...] = (0.0, 0.05, 0.1, 0.2, 0.3)
    """When, in shares of the steps, the codebook is set (again) from the latent vectors. At the
    very start these are those of an untrained network; a codebook left at them keeps dead levels."""
    revive_every: PositiveInt = 100
    """Steps between restarts of the lines (of several) or codes that nothing uses."""
    seed: Seed = 0
    """Seed of initial weights, of the codebook's start and of the order of rows."""
    holdout_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the items, by a hash of item_id, that are never trained on."""
    holdout_rows: PositiveInt = 8192
    """The most held-out items that are kept in memory, over all ranks, to measure on."""
    log_every: PositiveInt | None = None
    """Steps between two records of the training metrics; by default about 40 records a training. The last step always
    has one, which is of half as many steps at least: where fewer are left after a record, that one is left out."""
    collapse: Literal["warn", "stop", "off"] = "warn"
    """What happens when a digit's use is under `collapse_threshold`, from the codebook's last start on."""
    collapse_threshold: Share = 0.05
    """The least use of a digit over the steps of a record (`log_every`): 0 where one value takes all rows, 1 where all
    values are taken alike; see `encoder.evaluation.codebook_use`."""
    checkpoint_every: NonNegativeInt = 1000
    """Steps between two checkpoints, from which a training that was stopped goes on; 0: none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the networks' matrix products in training (autocast). Quantization, losses, weights and what decides an id
    are float32 in any case."""


class SearchConfig(Config):
    """How far digits are searched when items are encoded (`encoder.search`)."""

    rounds: Annotated[int, Field(ge=0)] = 0
    """Passes over the digits; 0 takes them as they were rounded."""
    candidates: PositiveInt = 16
    """Values that a digit tries: those that bring h_hat nearest to h. All, where it has no more."""


class EncoderConfig(Config):
    """Section `encoder`: which signals, what network, which quantizer, how trained."""

    entity: Entity = "item"
    """What is encoded: the items, or the users."""
    signals: dict[str, Positive] = {}
    """Weight w_k of every signal's loss; empty: all signals of the entity, embeddings with
    weight 1, categoricals with 0.1 (their cross-entropy is in nats, a cosine loss is below 1)."""
    network: NetworkConfig = NetworkConfig()
    quantizer: AnyQuantizer = StructuredConfig()
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _search_has_digits_to_turn(self) -> Self:
        if self.search.rounds and self.quantizer.not_searched:
            raise ValueError(f"search.rounds: {self.quantizer.not_searched}")
        return self


class MaterializeConfig(Config):
    """Section `materialize`: the ids' form, and how much is encoded at a time."""

    prefix_lengths: dict[str, tuple[PositiveInt, ...]] = {DEFAULT_NAME: (5, 10, 15)}
    """By the SIDs' name: prefixes, in digits, that the events carry as columns of their own, as they do the whole."""
    packing: Packing = "mixed_radix"
    """How digits are summed into ids; `paper_eq5` is there for parity with the paper."""
    batch_size: PositiveInt = 4096
    """Items turned into tensors at a time on each rank. It bounds memory; ids do not depend on it."""
    published: Literal["keep", "move"] = "keep"
    """What an encoder that was refreshed does to the SIDs that input `published` lists. `keep`: they stay, and it gives
    SIDs to new items alone. `move`: it encodes all items. SIDs of an encoder trained afresh are never kept."""
