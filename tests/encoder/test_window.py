"""The window of training metrics, and the watch for collapsed digits."""

import pytest
import torch

from sidestack.encoder.config import TrainingConfig
from sidestack.encoder.fusion import Losses
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.window import CollapseWatch, Window
from sidestack.infra.errors import TrainingError
from tests.encoder.fabricated import LOCAL

SPEC = SidSpec(quantizer="structured", levels=3, digits=4, depth=2, groups=2, fingerprint="")
NAMES = ("text", "brand")


def losses(scale: float, *digits: list[int]) -> Losses:
    one, rows = torch.tensor(scale), torch.tensor([4, 3])
    return Losses(one, torch.tensor([2.0, 6.0]) * scale, rows, 2 * one, 3 * one, torch.tensor(digits))


def test_metrics_are_means_over_steps_and_over_rows_with_the_signal() -> None:
    window = Window(NAMES, SPEC, LOCAL)
    window.add(losses(1.0, [0, 0, 0, 1]), torch.tensor(0.5))
    window.add(losses(3.0, [1, 0, 0, 2]), torch.tensor(1.5))
    window.waited = 1e9
    metrics, use_N = window.close(batch_size=8)
    assert metrics["train/loss"] == 2
    assert metrics["train/codebook"] == 4
    assert metrics["train/commitment"] == 6
    assert metrics["train/gradient_norm"] == 1
    assert metrics["train/text/loss"] == 1  # (2 + 6) / 8 rows
    assert metrics["train/brand/loss"] == 4
    assert metrics["train/data_wait_share"] > 1  # the elapsed time is far below 1e9 seconds
    assert use_N == pytest.approx([1, 0, 0, 1])  # two rows can show two values at most
    assert metrics["train/least_digit_use"] == 0
    assert (window.steps, window.waited) == (0, 0.0)


def test_window_resumes_from_its_saved_state() -> None:
    whole, first, second = (Window(NAMES, SPEC, LOCAL) for _ in range(3))
    for window in (whole, first):
        window.add(losses(1.0, [0, 1, 2, 1]), torch.tensor(0.5))
    first.waited = 2.5
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    assert (second.steps, second.waited) == (1, 2.5)
    for window in (whole, second):
        window.add(losses(0.3, [0, 1, 1, 1]), torch.tensor(0.7))
    found, use_N = second.close(8)
    expected, expected_use_N = whole.close(8)
    times = {"train/items_per_second", "train/data_wait_share"}
    assert {k: v for k, v in found.items() if k not in times} == {k: v for k, v in expected.items() if k not in times}
    assert use_N == expected_use_N


def test_collapsed_digit_is_reported_once_and_again_after_recovery() -> None:
    watch = CollapseWatch(TrainingConfig(collapse_threshold=0.1), SPEC, after=10)
    low = [0.9, 0.5, 0.1, 0.02]
    assert watch.check(10, 20, low) == [
        "encoder: step 20: digit 3 (depth 1, group 1) has collapsed: its use is 0.0200, under"
        " collapse_threshold=0.1 (0: one of 3 values, 1: all alike)"
    ]
    assert watch.check(20, 30, low) == []
    assert watch.check(30, 40, [0.9] * 4) == []
    assert len(watch.check(40, 50, low)) == 1
    assert watch.collapsed == {3}


def test_steps_before_the_last_start_of_the_codebook_are_not_checked() -> None:
    watch = CollapseWatch(TrainingConfig(collapse="stop"), SPEC, after=10)
    assert watch.check(9, 19, [0.0] * 4) == []
    with pytest.raises(TrainingError, match=r"step 20: digit 0 \(depth 0, group 0\).*\n.*digit 1 \(depth 0, group 1\)"):
        watch.check(10, 20, [0.0, 0.0, 1.0, 1.0])


def test_watch_is_a_no_op_when_off() -> None:
    assert CollapseWatch(TrainingConfig(collapse="off"), SPEC, after=0).check(0, 1, [0.0] * 4) == []
