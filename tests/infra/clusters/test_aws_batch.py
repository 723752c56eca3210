"""AWS Batch jobs, submitted to moto."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import pytest
from botocore.config import Config
from torchx.specs import AppState

from sidestack.components import encoder
from sidestack.infra.clusters.aws_batch import BatchJobs
from sidestack.infra.clusters.config import SECRETS_KEY
from sidestack.infra.errors import ConfigError, SchedulerError, UnansweredError
from tests.infra.clusters.jobs import rendered, write_cluster

pytestmark = pytest.mark.filterwarnings("error:Cannot determine resource instance type")

ARN = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:mlflow"
SECRET = {"name": "MLFLOW_TRACKING_URI", "valueFrom": ARN}
CLUSTER = f"""
scheduler: aws_batch
options: {{queue: gpu-queue, execution_role_arn: "arn:aws:iam::123456789012:role/r"}}
image: registry/sidestack:1
storage: [{{host: /shared, path: /shared}}, {{claim: fs-1, path: /efs, read_only: true}}]
resources: {{cpu: 96, memory_mb: 1000, gpu: 8, instance: p4d.24xlarge}}
shm_mb: 512
secrets: {{MLFLOW_TRACKING_URI: "{ARN}"}}
"""


def container(request: Any) -> dict[str, Any]:
    (nodes,) = request.job_def["nodeProperties"]["nodeRangeProperties"]
    found: dict[str, Any] = nodes["container"]
    return found


def test_containers_have_the_settings_of_the_clusters_file(tmp_path: Path) -> None:
    request = rendered("aws_batch", cluster=write_cluster(tmp_path, CLUSTER), j="2x8")
    found = container(request)
    assert (request.queue, found["image"], found["instanceType"]) == (
        "gpu-queue",
        "registry/sidestack:1",
        "p4d.24xlarge",
    )
    assert (found["user"], found["linuxParameters"]["sharedMemorySize"]) == ("1000", 512)
    assert found["secrets"] == [SECRET]
    assert [(one["containerPath"], one["readOnly"]) for one in found["mountPoints"]] == [
        ("/shared", False),
        ("/efs", True),
    ]
    assert {"type": "GPU", "value": "8"} in found["resourceRequirements"]
    assert request.job_def["nodeProperties"]["numNodes"] == 2


def test_secret_values_are_left_out_and_an_undefined_secret_is_refused(tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, CLUSTER)
    assert "pass" not in str(rendered("aws_batch", cluster=cluster, env={"MLFLOW_TRACKING_URI": "http://me:pass@host"}))
    app = encoder.train(config="c", dataset="d", out="o", cluster=cluster)
    app.roles[0].metadata[SECRETS_KEY] = ["TOKEN"]
    with pytest.raises(ConfigError, match=r"TOKEN is in run.secrets; `secrets.TOKEN`"):
        BatchJobs("test").submit_dryrun(app, {})


def test_missing_queue_and_cluster_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs the option `queue`, or a cluster's file"):
        rendered("aws_batch")


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield moto's Batch client, with an enabled queue `gpu-queue` and a disabled queue `closed`."""
    moto = pytest.importorskip("moto", reason="not installed: moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    with moto.mock_aws(config={"batch": {"use_docker": False}}):
        client = boto3.client("batch")
        role = boto3.client("iam").create_role(RoleName="batch", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
        environment = client.create_compute_environment(
            computeEnvironmentName="nodes", type="UNMANAGED", state="ENABLED", serviceRole=role
        )
        order = [{"order": 1, "computeEnvironment": environment["computeEnvironmentArn"]}]
        client.create_job_queue(jobQueueName="gpu-queue", state="ENABLED", priority=1, computeEnvironmentOrder=order)
        client.create_job_queue(jobQueueName="closed", state="DISABLED", priority=1, computeEnvironmentOrder=order)
        yield client


def submit(client: Any, cluster: str, options: dict[str, Any] | None = None) -> str:
    scheduler = BatchJobs("test", client=client)
    app = encoder.train(config="c", dataset="d", out="o", cluster=cluster, j="2x8")
    return str(scheduler.schedule(scheduler.submit_dryrun(app, options or {})))


def test_job_of_two_nodes_is_submitted_described_and_cancelled(account: Any, tmp_path: Path) -> None:
    handle = submit(account, write_cluster(tmp_path, CLUSTER))
    queue, name = handle.split(":")
    assert queue == "gpu-queue"
    (definition,) = account.describe_job_definitions(jobDefinitionName=name)["jobDefinitions"]
    assert definition["type"] == "multinode"
    (summary,) = account.list_jobs(jobQueue=queue, filters=[{"name": "JOB_NAME", "values": [name]}])["jobSummaryList"]
    (job,) = account.describe_jobs(jobs=[summary["jobId"]])["jobs"]
    assert job["nodeProperties"]["numNodes"] == 2
    assert job["nodeProperties"]["nodeRangeProperties"][0]["container"]["secrets"] == [SECRET]
    scheduler = BatchJobs("test", client=account)
    answer = scheduler.describe(handle)
    assert answer.state in (AppState.PENDING, AppState.RUNNING, AppState.SUCCEEDED)
    assert [(role.name, role.num_replicas) for role in answer.roles] == [("encoder", 2)]
    scheduler.cancel(handle)


def test_reason_of_a_failed_job_is_reported(account: Any, tmp_path: Path) -> None:
    scheduler = BatchJobs("test", client=account)
    handle = submit(account, write_cluster(tmp_path, CLUSTER))
    job = scheduler._get_job(handle) | {"status": "FAILED", "statusReason": "CannotPullContainerError: no such image"}
    with mock.patch.object(scheduler, "_get_job", return_value=job):
        answer = scheduler.describe(handle)
    assert (answer.state, answer.msg) == (AppState.FAILED, "CannotPullContainerError: no such image")


@pytest.mark.parametrize(("queue", "message"), [("nightly", "no such queue in eu-west-1"), ("closed", "is disabled")])
def test_unusable_queue_is_named_and_no_job_definition_is_registered(
    account: Any, tmp_path: Path, queue: str, message: str
) -> None:
    with pytest.raises(SchedulerError, match=f"queue '{queue}': .*{message}"):
        submit(account, write_cluster(tmp_path, CLUSTER), {"queue": queue})
    assert account.describe_job_definitions()["jobDefinitions"] == []


def test_missing_credentials_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    client = boto3.session.Session().client("batch", region_name="eu-west-1")
    with pytest.raises(SchedulerError, match="queue 'gpu-queue': Unable to locate credentials"):
        submit(client, write_cluster(tmp_path, CLUSTER))


def test_unreachable_service_raises_unanswered_error(account: Any, tmp_path: Path) -> None:
    config = Config(connect_timeout=1, retries={"max_attempts": 0})
    client = boto3.client("batch", endpoint_url="http://127.0.0.1:9", config=config)
    with pytest.raises(UnansweredError, match="queue 'gpu-queue': Could not connect"):
        submit(client, write_cluster(tmp_path, CLUSTER))
