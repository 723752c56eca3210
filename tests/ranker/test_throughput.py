"""Throughput of a training counts its steps, but neither the first ones of a start nor checkpoints."""

from types import SimpleNamespace

import pytest

from sidestack.ranker import throughput
from sidestack.ranker.throughput import UNTIMED_STEPS, Throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the clock's time, in its only entry."""
    now = [100.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def take_steps(measured: Throughput, clock: list[float], steps: int, seconds: float, waited: float) -> None:
    for _ in range(steps):
        clock[0] += seconds
        measured.add_step(waited)


def test_first_steps_of_a_start_and_checkpoints_are_left_out(clock: list[float]) -> None:
    measured = Throughput(batch_size=64)
    measured.start(UNTIMED_STEPS + 4, waited=0.0)
    take_steps(measured, clock, UNTIMED_STEPS, 9.0, waited=5.0)
    take_steps(measured, clock, 2, 0.5, waited=5.0)
    clock[0] += 3.0
    measured.add_checkpoint(5.0)
    clock[0] += 20.0
    measured.skip(7.0)
    take_steps(measured, clock, 2, 0.5, waited=7.25)
    assert measured.summary() == {
        "train_seconds": 2.0,
        "checkpoint_seconds": 3.0,
        "data_wait_share": 0.125,
        "samples_per_second": 4 * 64 / 2.0,
    }


def test_last_step_of_a_short_start_is_timed(clock: list[float]) -> None:
    measured = Throughput(batch_size=64)
    measured.start(3, waited=0.0)
    take_steps(measured, clock, 3, 2.0, waited=0.0)
    assert (measured.steps, measured.seconds) == (1, 2.0)


def test_resumed_training_adds_to_the_totals_of_its_checkpoint(clock: list[float]) -> None:
    before = Throughput(batch_size=64, steps=7, seconds=3.5, waited=0.5, checkpoint_seconds=1.0)
    after = Throughput(batch_size=64)
    after.load_state(before.state())
    after.start(UNTIMED_STEPS + 1, waited=0.0)
    take_steps(after, clock, UNTIMED_STEPS + 1, 0.5, waited=0.0)
    assert after.state() == {"timed_steps": 8, "seconds": 4.0, "waited": 0.5, "checkpoint_seconds": 1.0}
