"""The rule that derives an encoder's batch size and epochs from the number of items where they are not configured."""

from typing import Any

import pytest

from sidestack.encoder.budget import MIN_STEPS, decide, decisions_message, describe_decisions
from sidestack.encoder.config import EncoderConfig
from sidestack.infra.config import parse


def config(**training: Any) -> EncoderConfig:
    return parse(EncoderConfig, {"training": training}, "test")


@pytest.mark.parametrize(
    ("rows", "batch", "epochs"),
    [
        (60, 64, 40),
        (2_469, 64, 38),
        (2_000, 64, 40),
        (20_000, 128, 10),
        (92_331, 256, 4),
        (10**6, 256, 2),
        (10**9, 256, 2),
    ],
)
def test_fewer_items_get_more_epochs_and_smaller_batches(rows: int, batch: int, epochs: int) -> None:
    training = decide(config(), rows).training
    assert (training.batch_size, training.epochs) == (batch, epochs)
    if 2 < epochs < 40:
        assert rows // batch * (epochs - 1) < MIN_STEPS <= rows // batch * epochs


def test_configured_values_are_kept_and_not_logged() -> None:
    written = config(epochs=3, batch_size=100, lanes=4)
    training = decide(written, 2_000).training
    assert (training.epochs, training.batch_size) == (3, 100)
    assert decisions_message(written, decide(written, 2_000), 2_000) == ""
    assert decide(config(epochs=3), 2_000).training.batch_size == 64
    assert decide(config(batch_size=200), 2_000).training.epochs == 40
    assert decide(config(lanes=6), 2_000).training.batch_size == 66


def test_derived_values_are_logged_and_described() -> None:
    asked = config()
    decided = decide(asked, 20_000)
    assert decisions_message(asked, decided, 20_000) == "encoder: by rule, from 20,000 items: batch_size=128, epochs=10"
    assert describe_decisions(asked, decided, 20_000, log_every=39) == {
        "by_rule": ["batch_size", "epochs", "log_every"], "rows": 20_000, "batch_size": 128, "epochs": 10,
        "log_every": 39,
    }  # fmt: skip
    assert decide(decided, 20_000) == decided
