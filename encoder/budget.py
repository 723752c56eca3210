"""How much an encoder's training does, where the configuration leaves it to a rule of the number of rows to encode.

The number is that of the snapshot's items (users), so that nothing is opened for it, and it is the same on any number
of ranks. A number in the configuration is taken as it is.
"""

from typing import Any

from pydantic import PositiveInt

from sidestack.encoder.config import EncoderConfig, TrainingConfig
from sidestack.infra.budget import batch_size, epochs_for, whole_lanes
from sidestack.infra.config import parse, plain

STEPS_AN_EPOCH = 128
LEAST_BATCH, LARGEST_BATCH = 64, 256
MIN_STEPS = 1440
"""What the shipped runs were tuned at: 4 epochs of 92,331 items in batches of 256, 40 of 2,469 users in batches of
64."""
MIN_EPOCHS, MAX_EPOCHS = 2, 40
"""Two at least: the codebook is set again within the first, which is all that its early rows would have seen."""


class DecidedTraining(TrainingConfig):
    """The settings of a training of which none is left to a rule, but for those that follow from its steps."""

    epochs: PositiveInt
    batch_size: PositiveInt


class DecidedConfig(EncoderConfig):
    """An encoder's section with the settings of its training decided."""

    training: DecidedTraining


def decide(config: EncoderConfig, rows: int) -> DecidedConfig:
    """Return the configuration with what it leaves to a rule decided.

    The batch is the largest power of two that leaves `STEPS_AN_EPOCH` steps an epoch, between 64 and 256 (rounded up to
    whole lanes); epochs are as many as make `MIN_STEPS` steps, between 2 and 40.

    Args:
        config: the encoder's. rows: of the items or users.
    """
    training = config.training
    by_rule = batch_size(rows, LEAST_BATCH, LARGEST_BATCH, STEPS_AN_EPOCH)
    batch = training.batch_size or whole_lanes(by_rule, training.lanes)
    epochs = training.epochs or epochs_for(rows // batch, MIN_STEPS, MIN_EPOCHS, MAX_EPOCHS)
    values = {**plain(config), "training": {**plain(training), "batch_size": batch, "epochs": epochs}}
    return parse(DecidedConfig, values, "encoder")


def left_to_rule(config: EncoderConfig) -> list[str]:
    """Return the names of the training's settings that the configuration leaves to a rule."""
    return [name for name in ("batch_size", "epochs", "log_every") if getattr(config.training, name) is None]


def told(config: EncoderConfig, decided: DecidedConfig, rows: int) -> str:
    """Return one line for people that says what the rules decided; empty: nothing.

    Args:
        config: what was asked for. decided: what is done. rows: of the items or users.
    """
    named = [name for name in left_to_rule(config) if name != "log_every"]  # which changes no weight
    words = ", ".join(f"{name}={getattr(decided.training, name)}" for name in named)
    return f"encoder: by rule, from {rows:,} {config.entity}s: {words}" if named else ""


def described(config: EncoderConfig, decided: DecidedConfig, rows: int, log_every: int) -> dict[str, Any]:
    """Return what was decided, and from what, as JSON-ready data for the summary.

    Args:
        config: what was asked for. decided: what was done. rows: of the items or users. log_every: steps of a record.
    """
    training = decided.training
    told = {"batch_size": training.batch_size, "epochs": training.epochs, "log_every": log_every}
    return {"by_rule": left_to_rule(config), "rows": rows, **told}
