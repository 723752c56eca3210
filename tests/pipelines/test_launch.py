"""Launching on a scheduler that fails, and following its jobs again, with stand-ins for Slurm's commands."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from torchx.specs import AppDef

from sidestack.components.torchrun import Launch, stage_app
from sidestack.infra.commit import commit_alone
from sidestack.infra.errors import ConfigError, SchedulerError, StageError, UnansweredError
from sidestack.infra.lease import VARIABLE, lease_file
from sidestack.pipelines.jobs import JobRecord, Work, read_record
from sidestack.pipelines.launch import Job, Launcher
from sidestack.pipelines.run import StopSignal

AWAY = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
LOST = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'


class FakeSlurm:
    """Stand-ins for Slurm's commands on a file of `id|name|state`; they fail while the file `away` exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.queue = folder / "queue"
        self.queue.touch()
        self.away = folder / "away"
        asked = f"[ -e {folder}/away ] && {{ {AWAY}; }}"
        self.command("sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
        self.command("sinfo", "exit 1")
        self.command(
            "squeue",
            f"{asked}\ncase $1 in --jobs=*) grep \"^${{1#--jobs=}}|\" {self.queue} | cut -d'|' -f2,3;;"
            f" *) cut -d'|' -f1,2 {self.queue};; esac",
        )
        self.command("scancel", f'{asked}\nsed -i "s/^$1|\\(.*\\)|.*/$1|\\1|CANCELLED/" {self.queue}')
        self.sbatch()

    def command(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.folder / name).chmod(0o755)

    def sbatch(self, after: str = "", before: str = "") -> None:
        """Write `sbatch`, with shell commands to run before and after it queues the job."""
        self.command(
            "sbatch",
            f"env > {self.folder}/env.$$\n{before}\nn=$(($(wc -l < {self.queue}) + 1))\nfor word; do case $word in"
            f' --job-name=*) echo "$n|${{word#--job-name=}}|RUNNING" >> {self.queue};; esac; done\n{after}\necho $n',
        )

    def end(self, state: str, job_id: str = "1") -> None:
        rows = [row.split("|") for row in self.queue.read_text().splitlines()]
        text = "".join(f"{number}|{name}|{state if number == job_id else old}\n" for number, name, old in rows)
        self.queue.write_text(text)

    @property
    def jobs(self) -> list[str]:
        return [row.split("|")[1] for row in self.queue.read_text().splitlines()]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Return a fake Slurm whose answers are not cached, and shorten the launcher's waits."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("sidestack.infra.clusters.answers.SECONDS", -1.0)
    monkeypatch.setattr("sidestack.pipelines.launch._POLL_S", 0.01)
    monkeypatch.setattr("sidestack.pipelines.launch._SUBMIT_AGAIN_S", 0.01)
    monkeypatch.setattr("sidestack.pipelines.launch._ENDING_S", 0.2)
    monkeypatch.setattr("sidestack.infra.schedulers._find_this_python", lambda: None)
    return FakeSlurm(folder)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work("encoder", "abc", tmp_path / "runs" / "encoder" / "abc", 3600.0)


def launcher(tmp_path: Path, retry_s: float = 60.0) -> Launcher:
    return Launcher("slurm", {"partition": "main"}, tmp_path / "logs", retry_s)


def app(work: Work) -> AppDef:
    return stage_app(
        "encoder", "sidestack.encoder.train", Launch(j="2x1"), config="run.yaml", out=str(work.out), inputs={}
    )


@pytest.fixture
def start(tmp_path: Path, slurm: FakeSlurm, work: Work) -> Callable[[], tuple[Launcher, Job]]:
    def begin() -> tuple[Launcher, Job]:
        one = launcher(tmp_path)
        return one, one.start(work, app(work))

    return begin


Start = Callable[[], tuple[Launcher, Job]]


def test_record_is_written_beside_the_output_before_the_job_is_submitted(
    slurm: FakeSlurm, work: Work, start: Start
) -> None:
    slurm.sbatch(before=f"cp {lease_file(work.out)} {slurm.folder}/seen")
    _, job = start()
    seen = json.loads((slurm.folder / "seen").read_text())
    kept = read_record(work.out)
    assert kept is not None and seen["token"] == kept.token and seen["handle"] == ""
    assert (kept.handle, kept.label, kept.key, kept.nodes) == ("slurm://sidestack/1", "encoder", "abc", 2)
    (env,) = (file.read_text().splitlines() for file in slurm.folder.glob("env.*"))
    assert f"{VARIABLE}={kept.token} {lease_file(work.out)}" in env


def test_temporary_failure_of_squeue_is_logged_and_does_not_end_the_job(
    slurm: FakeSlurm, work: Work, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    one, job = start()
    slurm.away.touch()
    assert [one.has_succeeded(job) for _ in range(4)] == [False] * 4
    slurm.away.unlink()
    assert not one.has_succeeded(job)
    err = capfd.readouterr().err
    assert err.count("[encoder] slurm does not answer: squeue: slurm_load_jobs error: Unable to contact") == 1
    assert err.count("[encoder] slurm answers again") == 1
    with commit_alone(work.out, stage="encoder"):
        pass
    slurm.end("COMPLETED")
    assert one.has_succeeded(job) and read_record(work.out) is None


def test_long_failure_of_squeue_is_an_error_and_keeps_the_record(
    tmp_path: Path, slurm: FakeSlurm, work: Work, capfd: pytest.CaptureFixture[str]
) -> None:
    one = launcher(tmp_path, retry_s=0.0)
    job = one.start(work, app(work))
    slurm.away.touch()
    with pytest.raises(UnansweredError, match=r"has not answered for .* minutes .*scheduler_retry_minutes"):
        for _ in range(3):
            one.has_succeeded(job)
    one.cancel(job)
    assert "slurm://sidestack/1 could not be cancelled and may run on: squeue: slurm_load" in capfd.readouterr().err
    slurm.away.unlink()
    assert launcher(tmp_path).attach(work) is not None


def test_a_cancelled_job_that_takes_long_to_end_is_neither_followed_nor_replaced(
    tmp_path: Path, slurm: FakeSlurm, work: Work, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    slurm.command("scancel", "exit 0")
    one, job = start()
    one.cancel(job)
    assert "[encoder] slurm://sidestack/1 was asked to end, and still runs" in capfd.readouterr().err
    with pytest.raises(StageError, match="was cancelled and still runs; try again"):
        launcher(tmp_path).attach(work)
    slurm.end("CANCELLED")
    assert launcher(tmp_path).attach(work) is None and read_record(work.out) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("CANCELLED", "[encoder] was cancelled by somebody at the scheduler: state CANCELLED: "),
        ("TIMEOUT", "[encoder] reached the scheduler's time limit (run.scheduler_options.time): state TIMEOUT: "),
        ("NODE_FAIL", "[encoder] lost a node: state NODE_FAIL: "),
        ("OUT_OF_MEMORY", "[encoder] needed more memory than run.launch.*.memory_mb: state OUT_OF_MEMORY: "),
        ("FAILED", "[encoder] failed: no rank left a traceback of its own"),
    ],
)
def test_error_describes_the_final_state_of_the_job(
    slurm: FakeSlurm, work: Work, start: Start, state: str, message: str
) -> None:
    one, job = start()
    slurm.end(state)
    with pytest.raises(StageError) as caught:
        one.has_succeeded(job)
    assert str(caught.value).startswith(message) and "and nothing was logged" in str(caught.value)
    assert read_record(work.out) is None


@pytest.mark.parametrize(
    "fault", ["invalid partition specified: nope", "Invalid generic resource (gres) specification"]
)
def test_job_refused_by_slurm_is_reported_in_one_line_and_not_retried(
    slurm: FakeSlurm, work: Work, start: Start, fault: str
) -> None:
    slurm.sbatch(before=f'echo "sbatch: error: {fault}" >&2; exit 1')
    with pytest.raises(SchedulerError) as caught:
        start()
    assert str(caught.value) == (
        f"[encoder] run.scheduler 'slurm': submitting the job failed: sbatch: sbatch: error: {fault}"
    )
    assert len(list(slurm.folder.glob("env.*"))) == 1 and read_record(work.out) is None


def test_submitted_job_is_found_by_name_when_the_answer_was_lost(slurm: FakeSlurm, work: Work, start: Start) -> None:
    slurm.sbatch(after=LOST)
    one, job = start()
    assert job.record.handle == "slurm://sidestack/1" and len(slurm.jobs) == 1
    assert not one.has_succeeded(job)


def test_lost_submission_is_retried_with_another_lease(
    slurm: FakeSlurm, work: Work, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    once = slurm.folder / "once"
    slurm.sbatch(before=f"[ -e {once} ] || {{ touch {once}; {LOST}; }}")
    _, job = start()
    environments = [file.read_text() for file in slurm.folder.glob("env.*")]
    tokens = {line for env in environments for line in env.splitlines() if VARIABLE in line}
    assert len(slurm.jobs) == 1 and len(tokens) == 2, "a late first job would hold the lease, too"
    assert "slurm (submission) does not answer: sbatch: sbatch: error" in capfd.readouterr().err


def test_signal_right_after_submission_cancels_the_job(
    slurm: FakeSlurm, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = JobRecord.write

    def interrupted(record: JobRecord) -> None:
        if record.handle:
            raise StopSignal(signal.SIGTERM)
        write(record)

    monkeypatch.setattr(JobRecord, "write", interrupted)
    with pytest.raises(StopSignal):
        start()
    assert slurm.queue.read_text().endswith("|CANCELLED\n")


def test_submission_is_given_up_after_the_configured_time(tmp_path: Path, slurm: FakeSlurm, work: Work) -> None:
    slurm.sbatch(before=LOST)
    with pytest.raises(UnansweredError, match="has not answered"):
        launcher(tmp_path, retry_s=0.05).start(work, app(work))


def test_record_of_another_job_for_the_output_is_kept(slurm: FakeSlurm, work: Work, start: Start) -> None:
    one, job = start()
    job.record.model_copy(update={"token": "another's"}).write()
    one.cancel(job)
    slurm.end("FAILED")
    with pytest.raises(StageError):
        one.has_succeeded(job)
    kept = read_record(work.out)
    assert kept is not None and kept.token == "another's" and not kept.is_cancelled


def test_another_driver_follows_a_job_of_slurm(
    tmp_path: Path, slurm: FakeSlurm, work: Work, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    start()
    log = tmp_path / "logs/slurm-1-encoder-1.err"
    log.parent.mkdir(exist_ok=True)
    log.write_text("[rank0]:before\n")
    second = launcher(tmp_path)
    job = second.attach(work)
    assert job is not None and not second.has_succeeded(job) and len(slurm.jobs) == 1
    with log.open("a") as written:
        written.write("[rank0]:after\n[rank1]:other\nsrun: a line of its own\n")
    job.log.stop()
    err = capfd.readouterr().err
    assert "[encoder] after" in err and "before" not in err and "other" not in err
    assert list(job.log.unmarked) == ["srun: a line of its own"]


def test_job_is_followed_when_the_driver_was_killed_before_recording_its_id(
    tmp_path: Path, slurm: FakeSlurm, work: Work, start: Start
) -> None:
    _, job = start()
    job.record.model_copy(update={"handle": ""}).write()
    found = launcher(tmp_path).attach(work)
    assert found is not None and found.record.handle == "slurm://sidestack/1"


def test_a_driver_killed_before_it_submitted_leaves_no_job(tmp_path: Path, slurm: FakeSlurm, work: Work) -> None:
    JobRecord(
        scheduler="slurm", label="encoder", key="abc", out=str(work.out), role="encoder", nodes=2, log_dir="logs"
    ).write()
    assert launcher(tmp_path).attach(work) is None and read_record(work.out) is None


@pytest.mark.parametrize("state", ["FAILED", "COMPLETED", None])
def test_a_job_that_has_ended_is_not_followed(
    tmp_path: Path, slurm: FakeSlurm, work: Work, start: Start, state: str | None
) -> None:
    start()
    if state is None:
        slurm.queue.write_text("")
    else:
        slurm.end(state)
    assert launcher(tmp_path).attach(work) is None and read_record(work.out) is None


def test_no_second_job_is_launched_while_slurm_is_unreachable(
    tmp_path: Path, slurm: FakeSlurm, work: Work, start: Start
) -> None:
    start()
    slurm.away.touch()
    with pytest.raises(UnansweredError):
        launcher(tmp_path, retry_s=0.05).attach(work)
    assert read_record(work.out) is not None


def test_local_job_of_another_host_is_superseded_and_its_record_is_kept(
    tmp_path: Path, work: Work, capfd: pytest.CaptureFixture[str]
) -> None:
    JobRecord(
        scheduler="local_cwd", handle="local_cwd://sidestack/x", label="encoder", key="abc", out=str(work.out),
        role="encoder", nodes=1, log_dir="logs", host="another",
    ).write()  # fmt: skip
    assert Launcher("local_cwd", {}, tmp_path / "logs").attach(work) is None
    assert "its job on host another cannot be seen from here" in capfd.readouterr().err
    assert read_record(work.out) is not None


def test_invalid_record_is_named(tmp_path: Path, work: Work) -> None:
    work.out.parent.mkdir(parents=True)
    lease_file(work.out).write_text('{"token": 1}')
    with pytest.raises(StageError, match=r"abc.job.json: is not the record of a job"):
        Launcher("local_cwd", {}, tmp_path / "logs").attach(work)


def test_unreachable_cluster_is_reported_in_one_line(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-such-file"))
    with pytest.raises((ConfigError, SchedulerError)) as caught:
        Launcher("kubernetes", {"queue": "default"}, tmp_path / "logs").start(work, app(work))
    assert "\n" not in str(caught.value) and "Invalid kube-config file" in str(caught.value)


def test_launcher_works_in_a_driver_started_by_torchx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchx turns each variable that begins with TORCHX_ into an option of the scheduler."""
    monkeypatch.setenv("TORCHX_CONTEXT_NAME", "cli_run")
    monkeypatch.setenv("TORCHX_JOB_ID", "local_cwd://torchx/night-1")
    for scheduler in ("local_cwd", "slurm"):
        Launcher(scheduler, {"partition": "main"} if scheduler == "slurm" else {}, tmp_path / "logs")
