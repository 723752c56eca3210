"""What is under way together: stages whose inputs are done, no more of them than `run.jobs`."""

from pathlib import Path
from typing import Any

import pytest
from torchx.specs import AppDef

from infra.commit import committing
from infra.config import Config
from infra.distributed import ALONE
from infra.errors import StageError
from infra.mlflow_runs import URI_VARIABLE
from pipelines.config import LaunchConfig, RunConfig
from pipelines.execution import Pipeline
from pipelines.graph import Stage

DIAMOND: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "side": ("prepare",),
    "none": ("prepare",),
    "dense": ("prepare",),
    "compare": ("side", "none", "dense"),
}


class Scripted:
    """A launcher whose jobs take three looks each, commit, and may fail; `most` is how many were under way at once."""

    def __init__(self, failing: str | None = None) -> None:
        self.failing = failing
        self.looks: dict[str, int] = {}
        self.order: list[str] = []
        self.cancelled: list[str] = []
        self.most = 0
        self.cores: set[str] = set()

    def start(self, label: str, app: AppDef, rank_logs: Path, limit_s: float) -> tuple[str, Path]:
        self.order.append(label)
        self.cores.add(app.metadata["cpu"])
        self.looks[label] = 3
        self.most = max(self.most, len(self.looks))
        return label, Path(app.metadata["out"])

    def has_succeeded(self, job: tuple[str, Path]) -> bool:
        label, out = job
        self.looks[label] -= 1
        if self.looks[label]:
            return False
        del self.looks[label]
        if label == self.failing:
            raise StageError(f"[{label}] failed")
        with committing(out, ALONE, stage=label) as directory:
            (directory / "out.txt").write_text(label)
        return True

    def cancel(self, job: tuple[str, Path]) -> None:
        self.cancelled.append(job[0])


def app(**given: Any) -> AppDef:
    return AppDef(name="fake", metadata={"out": given["out"], "cpu": str(given["cpu"])})


PLAN = tuple(
    Stage(name, app, (), Config(), LaunchConfig(), {label: label for label in inputs})
    for name, inputs in DIAMOND.items()
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.execution._POLL_SECONDS", 0.0)
    monkeypatch.setenv(URI_VARIABLE, "none")


def pipeline(path: Path, launcher: Scripted, jobs: int, **settings: Any) -> Pipeline:
    run = RunConfig(name="fake", runs_dir=path, jobs=jobs, **settings)
    client: Any = None
    scripted: Any = launcher
    return Pipeline(run, path / "run.yaml", scripted, client, "parent")


@pytest.mark.parametrize(("jobs", "most"), [(1, 1), (2, 2), (9, 3)])
def test_stages_start_as_soon_as_their_inputs_are_done(tmp_path: Path, jobs: int, most: int) -> None:
    launcher = Scripted()
    under_test = pipeline(tmp_path, launcher, jobs)
    under_test.bring(PLAN)
    assert launcher.most == most
    assert set(under_test.done) == set(DIAMOND)
    place = launcher.order.index
    assert all(place(given) < place(name) for name, inputs in DIAMOND.items() for given in inputs)


def test_one_at_a_time_keeps_the_order_of_the_plan(tmp_path: Path) -> None:
    launcher = Scripted()
    pipeline(tmp_path, launcher, 1).bring(PLAN)
    assert launcher.order == list(DIAMOND)


def test_what_fails_ends_what_is_under_way_beside_it_and_starts_nothing_more(tmp_path: Path) -> None:
    launcher = Scripted(failing="side")
    with pytest.raises(StageError, match="side"):
        pipeline(tmp_path, launcher, 2).bring(PLAN)
    assert "none" in launcher.cancelled
    assert "compare" not in launcher.order and "dense" not in launcher.order


def test_what_is_done_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.execution.replay", lambda *given: None)
    first = pipeline(tmp_path, Scripted(), 2)
    first.bring(PLAN)
    again = Scripted()
    second = pipeline(tmp_path, again, 2)
    second.bring(PLAN)
    assert not again.order and second.done == first.done


@pytest.mark.parametrize(
    ("scheduler", "jobs", "cores"),
    [("local_cwd", 1, "2"), ("local_cwd", 2, "2"), ("local_docker", 4, "1"), ("local_cwd", 9, "1"), ("slurm", 9, "2")],
)
def test_jobs_beside_each_other_share_the_cores_of_this_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, jobs: int, cores: str
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    launcher = Scripted()
    pipeline(tmp_path, launcher, jobs, scheduler=scheduler).bring(PLAN)
    assert launcher.cores == {cores}
