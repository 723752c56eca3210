"""What is under way together: stages whose inputs are done, no more of them than `run.jobs`."""

import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from torchx.specs import AppDef

from sidestack.infra.code import VARIABLE, code_environment
from sidestack.infra.commit import committing
from sidestack.infra.config import Config, digest, load_file, load_section, parse
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import CommitError, StageError, UnansweredError
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.execution import Pipeline
from sidestack.pipelines.graph import Stage, stages
from sidestack.pipelines.jobs import Work
from sidestack.pipelines.run import StopSignal
from sidestack.pipelines.run_config import LaunchConfig, RunConfig
from sidestack.pipelines.studies.sweep.grid import Budget
from sidestack.pipelines.studies.sweep.plan import sweep_stages
from sidestack.pipelines.studies.tune.plan import tune_stages
from sidestack.ranker.config import RankerConfig

DIAMOND: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "side": ("prepare",),
    "none": ("prepare",),
    "dense": ("prepare",),
    "compare": ("side", "none", "dense"),
}


class Scripted:
    """A launcher whose jobs take three looks each, commit, and may fail; `most` is how many were under way at once."""

    def __init__(self, failing: str | None = None, failure: BaseException | None = None) -> None:
        self.failing = failing
        self.failure = failure or StageError(f"[{failing}] failed")
        self.looks: dict[str, int] = {}
        self.order: list[str] = []
        self.cancelled: list[str] = []
        self.left: list[str] = []
        self.most = 0
        self.cores: set[str] = set()
        self.commands: dict[str, str] = {}
        self.env: dict[str, str] = {}
        self.codes: dict[str, str] = {}

    def attach(self, work: Work) -> "Job | None":
        return None

    def start(self, work: Work, app: AppDef) -> "Job":
        label = work.label
        self.order.append(label)
        self.cores.add(app.metadata.get("cpu", ""))
        for role in app.roles:
            self.commands[label], self.env = role.args[1], role.env
            self.codes[label] = role.env[VARIABLE]
        self.looks[label] = 3
        self.most = max(self.most, len(self.looks))
        words = shlex.split(self.commands.get(label, f"--key {app.metadata.get('key', '')}"))
        return Job(app.name, work.out, words[words.index("--key") + 1])

    def has_succeeded(self, job: "Job") -> bool:
        label = job.out.parent.name
        self.looks[label] -= 1
        if self.looks[label]:
            return False
        del self.looks[label]
        if label == self.failing:
            raise self.failure
        with committing(job.out, ALONE, stage=job.name, key=job.key) as directory:
            (directory / "out.txt").write_text(label)
        return True

    def cancel(self, job: "Job") -> None:
        self.cancelled.append(job.out.parent.name)

    def leave(self, job: "Job") -> None:
        self.left.append(job.out.parent.name)


class Job(NamedTuple):
    """A job of `Scripted`: what it commits as."""

    name: str
    out: Path
    key: str


def app(**given: Any) -> AppDef:
    return AppDef(Path(given["out"]).parent.name, metadata={"cpu": str(given["cpu"]), "key": given["key"]})


PLAN = tuple(
    Stage(name, app, (), Config(), LaunchConfig(), {label: label for label in inputs})
    for name, inputs in DIAMOND.items()
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestack.pipelines.execution._POLL_SECONDS", 0.0)
    monkeypatch.setenv(URI_VARIABLE, "none")


def pipeline(path: Path, launcher: Scripted, jobs: int, **settings: Any) -> Pipeline:
    return Pipeline(RunConfig(name="fake", runs_dir=path, jobs=jobs, **settings), launcher)


@pytest.mark.parametrize(("jobs", "most"), [(1, 1), (2, 2), (9, 3)])
def test_stages_start_as_soon_as_their_inputs_are_done(tmp_path: Path, jobs: int, most: int) -> None:
    launcher = Scripted()
    under_test = pipeline(tmp_path, launcher, jobs)
    under_test.run_stages(PLAN)
    assert launcher.most == most
    assert set(under_test.done) == set(DIAMOND)
    place = launcher.order.index
    assert all(place(given) < place(name) for name, inputs in DIAMOND.items() for given in inputs)


def test_one_at_a_time_keeps_the_order_of_the_plan(tmp_path: Path) -> None:
    launcher = Scripted()
    pipeline(tmp_path, launcher, 1).run_stages(PLAN)
    assert launcher.order == list(DIAMOND)


def test_what_fails_ends_what_is_under_way_beside_it_and_starts_nothing_more(tmp_path: Path) -> None:
    launcher = Scripted(failing="side")
    with pytest.raises(StageError, match="side"):
        pipeline(tmp_path, launcher, 2).run_stages(PLAN)
    assert "none" in launcher.cancelled
    assert "compare" not in launcher.order and "dense" not in launcher.order


@pytest.mark.parametrize(
    ("on_signal", "failure", "is_left"),
    [
        ("leave", StopSignal(signal.SIGHUP), True),
        ("leave", UnansweredError("the scheduler is away"), True),
        ("leave", StageError("[side] failed"), False),
        ("cancel", StopSignal(signal.SIGHUP), False),
        ("cancel", UnansweredError("the scheduler is away"), False),
    ],
)
def test_signals_and_schedulers_that_are_away_leave_jobs_where_that_is_set(
    tmp_path: Path, on_signal: str, failure: BaseException, is_left: bool
) -> None:
    launcher = Scripted("side", failure)
    with pytest.raises(type(failure)):
        pipeline(tmp_path, launcher, 2, on_signal=on_signal).run_stages(PLAN)
    assert sorted(launcher.left if is_left else launcher.cancelled) == ["none", "side"]
    assert not (launcher.cancelled if is_left else launcher.left)


def test_a_job_that_an_earlier_driver_left_is_followed_and_nothing_of_it_is_removed(tmp_path: Path) -> None:
    launcher = Scripted()
    torn = tmp_path / "fake/prepare/.key.0.tmp"

    def attach(work: Work) -> Job | None:
        if work.label != "prepare":
            return None
        torn.with_name(f".{work.out.name}.0.tmp").mkdir(parents=True)
        launcher.looks["prepare"] = 3
        return Job(work.label, work.out, work.key)

    launcher.attach = attach  # type: ignore[method-assign]
    pipeline(tmp_path, launcher, 1).run_stages(PLAN)
    assert "prepare" not in launcher.order and len(list(torn.parent.glob(".*.0.tmp"))) == 1


def test_a_record_that_a_killed_driver_was_writing_is_removed_with_what_a_killed_job_left(tmp_path: Path) -> None:
    under_test = pipeline(tmp_path, Scripted(), 1)
    out = under_test.output(PLAN[0])
    staging, record = out.with_name(f".{out.name}.0.tmp"), out.with_name(f".{out.name}.job.json.0.tmp")
    staging.mkdir(parents=True)
    record.write_text("{")
    under_test.run_stages(PLAN[:1])
    assert under_test.done["prepare"] == out and not staging.exists() and not record.exists()


def test_what_is_done_takes_no_room(tmp_path: Path) -> None:
    first = pipeline(tmp_path, Scripted(), 2)
    first.run_stages(PLAN)
    again = Scripted()
    second = pipeline(tmp_path, again, 2)
    second.run_stages(PLAN)
    assert not again.order and second.done == first.done


@pytest.mark.parametrize("field", ["stage", "key"])
def test_an_output_of_another_stage_or_key_is_not_taken_as_done(tmp_path: Path, field: str) -> None:
    first = pipeline(tmp_path, Scripted(), 1)
    first.run_stages(PLAN)
    out = first.done["side"]
    shutil.rmtree(out)
    if field == "stage":
        shutil.copytree(first.done["dense"], out)
    else:
        with committing(out, ALONE, stage="side", key="another") as directory:
            (directory / "out.txt").write_text("side")
    with pytest.raises(CommitError, match=rf"{out}: is of {field} '\w+', not of .*remove {out} to have it made again"):
        pipeline(tmp_path, Scripted(), 1).run_stages(PLAN)


def test_a_job_that_commits_other_work_than_it_was_launched_for_is_an_error(tmp_path: Path) -> None:
    class Mistaken(Scripted):
        def start(self, work: Work, app: AppDef) -> "Job":
            return super().start(work, app)._replace(key="another")

    with pytest.raises(CommitError, match="is of key 'another', not of"):
        pipeline(tmp_path, Mistaken(), 1).run_stages(PLAN)


def test_an_encoder_that_is_given_has_the_key_of_its_own_run_and_must_be_an_encoder(tmp_path: Path) -> None:
    with committing(tmp_path / "theirs", ALONE, stage="encoder", key="theirs") as directory:
        (directory / "out.txt").write_text("x")
    given = replace(PLAN[0], name="encoder", given=tmp_path / "theirs")
    under_test = pipeline(tmp_path, Scripted(), 1)
    under_test.run_stages([given])
    assert under_test.done[given.label] == tmp_path / "theirs"
    with pytest.raises(CommitError, match="theirs: is of stage 'encoder', not of 'prepare'"):
        pipeline(tmp_path, Scripted(), 1).run_stages([replace(given, name="prepare")])


@pytest.mark.parametrize(
    ("scheduler", "jobs", "cores"),
    [("local_cwd", 1, "2"), ("local_cwd", 2, "2"), ("local_docker", 4, "1"), ("local_cwd", 9, "1"), ("slurm", 9, "2")],
)
def test_jobs_beside_each_other_share_the_cores_of_this_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, jobs: int, cores: str
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    launcher = Scripted()
    pipeline(tmp_path, launcher, jobs, scheduler=scheduler).run_stages(PLAN)
    assert launcher.cores == {cores}


ARMS = {"none": {}, "side": {"item": "side", "overlay": {"training": {"warmup_steps": 7}}}}
FILE = {
    "prepare": {"cache_dir": "/somewhere"},
    "encoders": {"text_sid": {"signals": {"text_embedding": 1.0}, "training": {"learning_rate": 1e-5}}},
    "ranker": {"arm": "none", "arms": ARMS},
    "tune": {"sparse_learning_rates": [0.02], "dense_learning_rates": [0.001]},
}


def whole(**changes: Any) -> PipelineConfig:
    run = {"name": "test", "replicates": 2, "timeouts": {"commit_s": 5}}
    return parse(PipelineConfig, {**FILE, "run": run, **changes}, "test")


PLANS: dict[str, Callable[[PipelineConfig], tuple[Stage, ...]]] = {
    "run": stages,
    "tune": tune_stages,
    "sweep": lambda config: sweep_stages(config, Budget(bits=24, levels=(8,))),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_stage_is_handed_its_resolved_section_and_nothing_else(tmp_path: Path, name: str) -> None:
    # What scripted stages commit is no snapshot, of which a part could be told.
    plan, launcher = [replace(stage, identify={}) for stage in PLANS[name](whole())], Scripted()
    pipeline(tmp_path, launcher, 2, timeouts={"commit_s": 5}).run_stages(plan)
    files = set()
    for stage in plan:
        words = shlex.split(launcher.commands[stage.label])
        assert "--set" not in words
        assert launcher.codes[stage.label] == code_environment(stage.code)[VARIABLE]
        file = Path(words[words.index("--config") + 1])
        section = "encoder" if stage.name == "sweep" else stage.name
        assert list(load_file(file)) == [section]
        read = load_section(type(stage.config), file, section)
        assert read == read.resolved() == stage.config
        assert file.name == f"{stage.label}-{digest(read)[:12]}.yaml"
        files.add(file)
    assert len(files) == len(plan)
    assert launcher.env["SIDESTACK_TIMEOUT_COMMIT_S"] == "5.0"


def test_an_arm_added_to_the_file_leaves_the_section_of_another_arm() -> None:
    more = {**FILE["ranker"], "arms": {**ARMS, "dense": {"item": "dense"}}}  # type: ignore[dict-item]
    before, after = stages(whole()), stages(whole(ranker=more))
    kept = {stage.label: digest(stage.config) for stage in before}
    assert kept.items() < {stage.label: digest(stage.config) for stage in after}.items()


def test_the_drivers_digest_is_that_of_a_stage_run_by_hand(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(FILE))
    by_hand = load_section(RankerConfig, tmp_path / "run.yaml", "ranker", ["ranker.arm=side"]).resolved()
    (stage,) = (stage for stage in stages(whole()) if stage.label == "ranker-side")
    assert digest(by_hand) == digest(stage.config)
