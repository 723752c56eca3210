"""A profiled training writes a trace beside its output and ends with the weights of an unprofiled one."""

from pathlib import Path

import pytest

from sidestack.encoder.bundle import WEIGHTS_FILE
from tests.encoder.fabricated import LOCAL, train_encoder, write_dataset
from tests.infra.test_profile import steps_in


def test_profiling_writes_a_trace_and_does_not_change_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "dataset")
    for name, steps in (("plain", 0), ("profiled", 4)):
        train_encoder(LOCAL, dataset, tmp_path / name, profile=steps)
    assert (tmp_path / "plain" / WEIGHTS_FILE).read_bytes() == (tmp_path / "profiled" / WEIGHTS_FILE).read_bytes()
    assert steps_in(tmp_path / "profiled.profile/rank-00000.json.gz") == {f"ProfilerStep#{i}" for i in range(1, 5)}
    assert not (tmp_path / "plain.profile").exists()
    assert "profile of 4 steps" in capsys.readouterr().err
