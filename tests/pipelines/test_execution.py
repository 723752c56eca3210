"""The execution of a plan: stages start when their inputs are done, at most `run.jobs` at once."""

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
    """A launcher whose jobs need three polls each, commit, and may fail; `most` is the most jobs that ran at once."""

    def __init__(self, failing: str | None = None, failure: BaseException | None = None) -> None:
        self.failing = failing
        self.failure = failure or StageError(f"[{failing}] failed")
        self.polls: dict[str, int] = {}
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
        self.polls[label] = 3
        self.most = max(self.most, len(self.polls))
        words = shlex.split(self.commands.get(label, f"--key {app.metadata.get('key', '')}"))
        return Job(app.name, work.out, words[words.index("--key") + 1])

    def has_succeeded(self, job: "Job") -> bool:
        label = job.out.parent.name
        self.polls[label] -= 1
        if self.polls[label]:
            return False
        del self.polls[label]
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
    """A job of `Scripted`, with the stage and key that it commits."""

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


def test_stages_run_in_the_order_of_the_plan_with_one_job(tmp_path: Path) -> None:
    launcher = Scripted()
    pipeline(tmp_path, launcher, 1).run_stages(PLAN)
    assert launcher.order == list(DIAMOND)


def test_failing_stage_cancels_running_stages_and_starts_no_more(tmp_path: Path) -> None:
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
def test_signal_or_unreachable_scheduler_leaves_jobs_when_on_signal_is_leave(
    tmp_path: Path, on_signal: str, failure: BaseException, is_left: bool
) -> None:
    launcher = Scripted("side", failure)
    with pytest.raises(type(failure)):
        pipeline(tmp_path, launcher, 2, on_signal=on_signal).run_stages(PLAN)
    assert sorted(launcher.left if is_left else launcher.cancelled) == ["none", "side"]
    assert not (launcher.cancelled if is_left else launcher.left)


def test_job_of_an_earlier_driver_is_followed_and_its_files_are_kept(tmp_path: Path) -> None:
    launcher = Scripted()
    torn = tmp_path / "fake/prepare/.key.0.tmp"

    def attach(work: Work) -> Job | None:
        if work.label != "prepare":
            return None
        torn.with_name(f".{work.out.name}.0.tmp").mkdir(parents=True)
        launcher.polls["prepare"] = 3
        return Job(work.label, work.out, work.key)

    launcher.attach = attach  # type: ignore[method-assign]
    pipeline(tmp_path, launcher, 1).run_stages(PLAN)
    assert "prepare" not in launcher.order and len(list(torn.parent.glob(".*.0.tmp"))) == 1


def test_temporary_files_of_a_killed_driver_and_job_are_removed(tmp_path: Path) -> None:
    under_test = pipeline(tmp_path, Scripted(), 1)
    out = under_test.output(PLAN[0])
    staging, record = out.with_name(f".{out.name}.0.tmp"), out.with_name(f".{out.name}.job.json.0.tmp")
    staging.mkdir(parents=True)
    record.write_text("{")
    under_test.run_stages(PLAN[:1])
    assert under_test.done["prepare"] == out and not staging.exists() and not record.exists()


def test_committed_stages_are_not_run_again(tmp_path: Path) -> None:
    first = pipeline(tmp_path, Scripted(), 2)
    first.run_stages(PLAN)
    again = Scripted()
    second = pipeline(tmp_path, again, 2)
    second.run_stages(PLAN)
    assert not again.order and second.done == first.done


@pytest.mark.parametrize("field", ["stage", "key"])
def test_output_of_another_stage_or_key_is_refused(tmp_path: Path, field: str) -> None:
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


def test_job_that_commits_another_key_is_an_error(tmp_path: Path) -> None:
    class Mistaken(Scripted):
        def start(self, work: Work, app: AppDef) -> "Job":
            return super().start(work, app)._replace(key="another")

    with pytest.raises(CommitError, match="is of key 'another', not of"):
        pipeline(tmp_path, Mistaken(), 1).run_stages(PLAN)


def test_given_encoder_may_have_another_key_but_must_be_an_encoder(tmp_path: Path) -> None:
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
def test_concurrent_jobs_share_cores_only_on_this_machine(
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
def test_stage_gets_only_its_resolved_section(tmp_path: Path, name: str) -> None:
    # Scripted stages commit no snapshot, so `identify` has no part to read.
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


def test_added_arm_does_not_change_the_sections_of_other_arms() -> None:
    more = {**FILE["ranker"], "arms": {**ARMS, "dense": {"item": "dense"}}}  # type: ignore[dict-item]
    before, after = stages(whole()), stages(whole(ranker=more))
    kept = {stage.label: digest(stage.config) for stage in before}
    assert kept.items() < {stage.label: digest(stage.config) for stage in after}.items()


def test_driver_and_stage_run_by_hand_have_the_same_digest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(FILE))
    by_hand = load_section(RankerConfig, tmp_path / "run.yaml", "ranker", ["ranker.arm=side"]).resolved()
    (stage,) = (stage for stage in stages(whole()) if stage.label == "ranker-side")
    assert digest(by_hand) == digest(stage.config)
