"""Default batch size and number of epochs of an encoder's training, derived from the number of rows to encode.

The number of rows is the snapshot's count of items (users): no file is opened for it, and it does not depend on the
number of ranks. A number set in the configuration is used as it is.
"""

from typing import Any

from pydantic import PositiveInt

from sidestack.encoder.config import EncoderConfig, TrainingConfig
from sidestack.infra.budget import batch_size, epochs_for, whole_lanes
from sidestack.infra.config import parse, plain

STEPS_AN_EPOCH = 128
LEAST_BATCH, LARGEST_BATCH = 64, 256
MIN_STEPS = 1440
"""The steps that the shipped runs were tuned at: 4 epochs of 92,331 items in batches of 256, 40 epochs of 2,469 users
in batches of 64."""
MIN_EPOCHS, MAX_EPOCHS = 2, 40
"""At least two: the codebook is reset during the first epoch, whose early rows would never see the new one."""


class DecidedTraining(TrainingConfig):
    """The training settings, with batch size and epochs decided."""

    epochs: PositiveInt
    batch_size: PositiveInt


class DecidedConfig(EncoderConfig):
    """An encoder's section with batch size and epochs decided."""

    training: DecidedTraining


def decide(config: EncoderConfig, rows: int) -> DecidedConfig:
    """Return the configuration with batch size and epochs filled in by rule where they are not set.

    The batch is the largest power of two that leaves `STEPS_AN_EPOCH` steps an epoch, between 64 and 256 (rounded up to
    whole lanes); epochs are as many as make `MIN_STEPS` steps, between 2 and 40.

    Args:
        config: the encoder's. rows: the number of items or users.
    """
    training = config.training
    by_rule = batch_size(rows, LEAST_BATCH, LARGEST_BATCH, STEPS_AN_EPOCH)
    batch = training.batch_size or whole_lanes(by_rule, training.lanes)
    epochs = training.epochs or epochs_for(rows // batch, MIN_STEPS, MIN_EPOCHS, MAX_EPOCHS)
    values = {**plain(config), "training": {**plain(training), "batch_size": batch, "epochs": epochs}}
    return parse(DecidedConfig, values, "encoder")


def left_to_rule(config: EncoderConfig) -> list[str]:
    """Return the names of the training settings that the configuration leaves unset."""
    return [name for name in ("batch_size", "epochs", "log_every") if getattr(config.training, name) is None]


def decisions_message(config: EncoderConfig, decided: DecidedConfig, rows: int) -> str:
    """Return one log line with the settings decided by rule; empty where there are none.

    Args:
        config: as configured. decided: as decided. rows: the number of items or users.
    """
    named = [name for name in left_to_rule(config) if name != "log_every"]  # log_every changes no weight
    words = ", ".join(f"{name}={getattr(decided.training, name)}" for name in named)
    return f"encoder: by rule, from {rows:,} {config.entity}s: {words}" if named else ""


def describe_decisions(config: EncoderConfig, decided: DecidedConfig, rows: int, log_every: int) -> dict[str, Any]:
    """Return what was decided, and from what, as JSON-ready data for the summary.

    Args:
        config: as configured. decided: as decided. rows: the number of items or users. log_every: steps of a record.
    """
    training = decided.training
    settings = {"batch_size": training.batch_size, "epochs": training.epochs, "log_every": log_every}
    return {"by_rule": left_to_rule(config), "rows": rows, **settings}
