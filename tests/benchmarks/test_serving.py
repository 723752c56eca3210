"""The serving benchmark: its timing, its report, and that no server is left running."""

import json
import os
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from sidestack.benchmarks import serving
from sidestack.benchmarks.items import DEFAULT_SIGNALS
from sidestack.benchmarks.scoring_server import Program, ScoringServer, resident_mib
from sidestack.benchmarks.serving import (
    GOALS_MS,
    Load,
    batches,
    in_process,
    main,
    percentiles,
    random_encoder,
    save_encoder_model,
)


def test_warm_up_requests_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 200.0, 200.010, 300.0, 300.030])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    requests: list[int] = []
    times = percentiles(requests.append, [1, 2, 3], warm_up=1)
    assert requests == [1, 2, 3]
    assert times == {"p50_ms": pytest.approx(20.0), "p99_ms": pytest.approx(29.8)}


def test_requests_have_complete_and_different_items() -> None:
    first, second = batches(DEFAULT_SIGNALS, size=2, number=2)
    assert [len(first), len(second)] == [2, 2]
    assert set(first[0]) == set(DEFAULT_SIGNALS.names)
    assert len(first[0]["text_embedding"]) == 384
    assert first[1] == second[0] != first[0]


def test_resident_memory_is_that_of_the_process() -> None:
    held = bytearray(64 * 2**20)
    held[::4096] = b"\1" * len(held[::4096])
    with_it = resident_mib(os.getpid())
    del held
    assert 50 < with_it - resident_mib(os.getpid()) < 80


def test_rows_report_which_goals_are_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signals = save_encoder_model(random_encoder(tmp_path / "encoder"), tmp_path / "model")
    monkeypatch.setattr(serving, "GOAL_MIB", 1.0)
    monkeypatch.setattr(serving, "GOALS_MS", {1: 1e6, 4: 0.0})
    rows = in_process(tmp_path / "model", signals, Load({1: 3, 4: 2}, 1))
    assert [(row.get("items"), row.get("met")) for row in rows] == [(1, "yes"), (4, "no"), (None, None), (None, "no")]
    assert rows[1]["goal"] == "p99 < 0 ms"
    assert all(row["p50_ms"] <= row["p99_ms"] for row in rows[:2])


@pytest.mark.long
def test_whole_benchmark_writes_its_figures_and_leaves_no_server(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    measure = ScoringServer.resident_mib

    def recording(server: ScoringServer) -> float:
        started.extend(server.pids())
        return measure(server)

    monkeypatch.setattr(ScoringServer, "resident_mib", recording)
    main(["--quick", "--out", str(tmp_path)])
    assert len(started) == 3  # infra.serve's server, MLflow's launcher and MLflow's server
    results: dict[str, Any] = json.loads((tmp_path / "serving.json").read_text())
    timed = [(row["where"], row["items"]) for row in results["rows"] if "items" in row]
    assert timed == [(where, size) for where in ("in process", *get_args(Program)) for size in GOALS_MS]
    assert results["conditions"]["versions"]["mlflow"]
    assert "The served encoder" in capfd.readouterr().out
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
