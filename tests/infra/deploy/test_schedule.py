"""Each schedule is valid for its scheduler, and all of them run the same command."""

import configparser
import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kubernetes.client import ApiClient, V1Container, V1CronJob, V1PersistentVolumeClaim

from sidestack.infra.code import DEPLOY, ROOT
from sidestack.pipelines import cronjob
from tests.infra.clusters.schemas import faults_of_object
from tests.infra.deploy.scrontab import Entry, parse_scrontab

SCHEDULE = ROOT / DEPLOY / "schedule"
UNITS = [SCHEDULE / "sidestack.service", SCHEDULE / "sidestack.timer"]
CRON_JOB = SCHEDULE / "cronjob.yaml"
CLAIM = ROOT / DEPLOY / "kubernetes/claim.yaml"
COMMAND = "python -m sidestack.pipelines.retrain --config /shared/retrain.yaml"


def read_unit(file: Path) -> configparser.ConfigParser:
    """Read a systemd unit without duplicate keys."""
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes="#", delimiters="=")
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keys keep their case
    parser.read_string(file.read_text())
    return parser


def read_object(file: Path, kind: str) -> V1CronJob | V1PersistentVolumeClaim:
    """Read a Kubernetes object strictly: fields that the official client's model drops are unknown to the API."""
    content, client = yaml.safe_load(file.read_text()), ApiClient()
    model = client.deserialize(SimpleNamespace(data=json.dumps(content)), kind)
    assert client.sanitize_for_serialization(model) == content, f"{file}: not wholly a {kind}"
    return model


def container() -> V1Container:
    (only,) = read_object(CRON_JOB, "V1CronJob").spec.job_template.spec.template.spec.containers
    return only


def entry() -> Entry:
    (only,) = parse_scrontab((SCHEDULE / "scrontab").read_text())
    return only


def verify_units(folder: Path, units: list[Path], added: str = "") -> str:
    """Return systemd's messages on units that run the tests' Python."""
    copies = [folder / unit.name for unit in units]
    for unit, copy in zip(units, copies, strict=True):
        copy.write_text(unit.read_text().replace("/opt/sidestack/.venv/bin/python", sys.executable) + added)
    done = subprocess.run(["systemd-analyze", "verify", *copies], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="not installed: systemd-analyze")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    assert verify_units(tmp_path, UNITS) == ""
    assert "Unknown key" in verify_units(tmp_path, UNITS[:1], added="Typeset=oneshot\n")


def test_timer_starts_its_service_hourly() -> None:
    service, timer = map(read_unit, UNITS)
    assert set(service) - {"DEFAULT"} == {"Unit", "Service"}
    assert set(timer) - {"DEFAULT"} == {"Unit", "Timer", "Install"}
    assert timer["Timer"]["OnCalendar"] == "hourly" and UNITS[0].stem == UNITS[1].stem
    assert service["Service"]["Type"] == "oneshot", "a timer does not start a oneshot service while it runs"


def test_cron_job_runs_one_at_a_time_without_retries() -> None:
    spec = read_object(CRON_JOB, "V1CronJob").spec
    pod = spec.job_template.spec.template.spec
    assert (spec.schedule, spec.concurrency_policy) == ("0 * * * *", "Forbid")
    assert 10 < spec.starting_deadline_seconds < 3600, "the controller checks schedules every ten seconds"
    assert (spec.job_template.spec.backoff_limit, pod.restart_policy) == (0, "Never")
    assert pod.containers[0].resources.requests.keys() == {"cpu", "memory"}


def test_cron_job_mounts_the_claim_at_the_configurations_folder() -> None:
    claim = read_object(CLAIM, "V1PersistentVolumeClaim")
    volumes = read_object(CRON_JOB, "V1CronJob").spec.job_template.spec.template.spec.volumes
    (volume,) = (volume for volume in volumes if volume.persistent_volume_claim is not None)
    (mount,) = (mount for mount in container().volume_mounts if mount.name == volume.name)
    assert mount.mount_path == "/shared"
    assert volume.persistent_volume_claim.claim_name == claim.metadata.name
    assert claim.spec.access_modes == ["ReadWriteMany"]


def test_cron_job_equals_the_output_of_its_command() -> None:
    """The file's first line is the command that wrote it."""
    command, _, text = CRON_JOB.read_text().partition("\n")
    program, *words = shlex.split(command.removeprefix("# python -m "))
    assert program == "pipelines.cronjob"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cronjob.main(words)
    assert printed.getvalue() == text


def test_cron_jobs_pod_is_not_root_and_has_no_secret_value() -> None:
    pod = read_object(CRON_JOB, "V1CronJob").spec.job_template.spec.template.spec
    assert (pod.security_context.run_as_non_root, pod.security_context.run_as_user) == (True, 1000)
    assert container().security_context.capabilities.drop == ["ALL"]
    (uri,) = (one for one in container().env if one.name == "MLFLOW_TRACKING_URI")
    assert uri.value is None and uri.value_from.secret_key_ref.name == "mlflow"


@pytest.mark.parametrize("file", [CRON_JOB, CLAIM], ids=lambda file: file.name)
def test_objects_are_valid_by_the_published_schemas(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    assert faults_of_object(content) == []
    content["spec"]["no_such_field"] = 1
    assert "no_such_field" in faults_of_object(content)[0]


def test_cron_job_needs_a_kubernetes_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cronjob.main(["--cluster", "slurm", "--config", "c.yaml"])
    assert "its scheduler is 'slurm'; a CronJob needs 'kubernetes'" in capsys.readouterr().err


def test_unknown_field_of_an_object_is_found(tmp_path: Path) -> None:
    file = tmp_path / "cronjob.yaml"
    file.write_text(CRON_JOB.read_text().replace("concurrencyPolicy", "concurencyPolicy"))
    with pytest.raises(AssertionError, match="not wholly a V1CronJob"):
        read_object(file, "V1CronJob")


def test_scrontab_is_one_entry_whose_driver_gets_the_signals() -> None:
    assert entry().times == ("0", "*", "*", "*", "*")
    assert entry().command.startswith("exec ")
    assert entry().options["--open-mode"] == "append", "all runs of an entry have the same job id and log file"
    assert entry().options["--signal"].startswith("B:TERM@"), (
        "B: the signal goes to the batch script, which is the driver"
    )


def test_every_scheduler_gives_the_driver_two_minutes_to_stop() -> None:
    pod = read_object(CRON_JOB, "V1CronJob").spec.job_template.spec.template.spec
    seconds = [read_unit(UNITS[0])["Service"]["TimeoutStopSec"], pod.termination_grace_period_seconds]
    seconds.append(entry().options["--signal"].rpartition("@")[2])
    assert list(map(int, seconds)) == [120] * 3


def test_all_schedules_run_the_same_command() -> None:
    dag = (SCHEDULE / "airflow_dag.py").read_text()
    commands = {
        "systemd": read_unit(UNITS[0])["Service"]["ExecStart"],
        "kubernetes": shlex.join(container().command),
        "slurm": entry().command,
        "airflow": re.search(r'bash_command="(.*)"', dag)[1],
    }
    found = {name: re.sub(r".*?(\S*/)?python ", "python ", command, count=1) for name, command in commands.items()}
    assert found == dict.fromkeys(commands, COMMAND)
