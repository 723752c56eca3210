"""The benchmarks' measurements: alternating contestants, ratios by round, threads, peak memory and programs."""

import sys
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch

from sidestack.benchmarks.timing import Contestant, Times, peak_bytes, run_program, spread, take_turns, threads


def test_contestants_take_turns_in_changing_order() -> None:
    called: list[str] = []
    contestants = {name: Contestant(partial(called.append, name), 1) for name in "abc"}
    times = take_turns(contestants, rounds=3, warm_up=1)
    assert "".join(called) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(each) for name, each in times.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_rates_are_per_item_and_ratios_are_taken_by_round() -> None:
    # The machine is half as fast in every second round, which does not change the ratio.
    times = Times({"slow": [4.0, 8.0, 4.0, 8.0], "fast": [1.0, 2.0, 1.0, 2.0]})
    assert times.ratio("fast", "slow") == (4.0, 4.0, 4.0)
    assert times.rate("fast").median == pytest.approx(0.75)
    assert times.fastest(["slow", "fast"]) == "fast"
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_seconds_are_per_item(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr("sidestack.benchmarks.timing.time.perf_counter", lambda: next(ticks) * 0.01)
    measured = take_turns({"call": Contestant(lambda: None, 10)}, rounds=2)
    assert list(measured.seconds["call"]) == pytest.approx([0.001, 0.001])


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_includes_memory_that_was_freed() -> None:
    found = peak_bytes(lambda: np.ones(8_000_000).sum())
    assert found is not None
    assert 60e6 < found < 100e6


def test_run_program_measures_seconds_and_memory_and_reports_errors() -> None:
    finished = run_program([sys.executable, "-c", "x = bytearray(80_000_000); import time; time.sleep(.2)"])
    assert finished.seconds > 0.2
    assert finished.peak_bytes > 80e6
    with pytest.raises(RuntimeError, match=r"ended with 1:\n.*no such thing"):
        run_program([sys.executable, "-c", "import sys; sys.exit('no such thing')"])
    environment = {"SIDESTACK_TEST": "1"}
    run_program([sys.executable, "-c", "import os; assert os.environ['SIDESTACK_TEST'] == '1'"], environment)
