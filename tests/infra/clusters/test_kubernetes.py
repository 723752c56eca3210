"""Volcano jobs: their content, and validation by the published schemas."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.components import encoder
from sidestack.infra.clusters.config import SECRETS_KEY, SHIPPED
from sidestack.infra.clusters.kubernetes import create_scheduler
from sidestack.infra.errors import ConfigError
from tests.infra.clusters.jobs import rendered, write_cluster
from tests.infra.clusters.schemas import faults_of_job, faults_of_pod

CLUSTER = yaml.safe_load((SHIPPED / "kubernetes.yaml").read_text())


def job(options: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = rendered("kubernetes", options, **arguments).resource
    return found


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [task["template"]["spec"] for task in job["spec"]["tasks"]]


JOBS = {
    "options alone": {"options": {"queue": "q"}, "j": "2x2"},
    "cluster": {"cluster": "kubernetes", "j": "2x8"},
    "restarts": {"cluster": "kubernetes", "max_retries": 3},
    "overridden": {"cluster": "kubernetes", "j": "1x1", "gpu": 0, "cpu": 1, "memMB": 1024, "image": "other:1"},
}


@pytest.mark.filterwarnings(r"ignore:\s*Role encoder configured with restarts")
@pytest.mark.parametrize("arguments", JOBS.values(), ids=JOBS)
def test_jobs_are_valid_by_the_published_schemas(arguments: dict[str, Any]) -> None:
    one = job(**arguments)
    assert faults_of_job(one) == []
    for task in one["spec"]["tasks"]:
        assert faults_of_pod(task["template"]) == []


def test_schemas_find_invalid_jobs() -> None:
    good = job(cluster="kubernetes")
    misspelt = copy.deepcopy(good)
    misspelt["spec"]["policys"] = misspelt["spec"].pop("policies")
    assert "policys" in faults_of_job(misspelt)[0]
    event = copy.deepcopy(good)
    event["spec"]["policies"][0]["event"] = "PodFailde"
    assert "PodFailde" in faults_of_job(event)[0]
    pod = copy.deepcopy(good["spec"]["tasks"][0]["template"])
    pod["spec"]["securityContext"]["runAsNonroot"] = True
    assert "runAsNonroot" in faults_of_pod(pod)[0]


def test_pods_have_the_settings_of_the_clusters_file() -> None:
    first, second = pods(job(cluster="kubernetes", j="2x8"))
    for pod in (first, second):
        (container,) = pod["containers"]
        assert (container["image"], container["imagePullPolicy"]) == (CLUSTER["image"], "IfNotPresent")
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["nodeSelector"] == {"pool": "training", "node.kubernetes.io/instance-type": "p5.48xlarge"}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("sidestack", "training")
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 1000)
        assert pod["securityContext"]["fsGroup"] == 1000
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["terminationGracePeriodSeconds"] == 120
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "dshm")
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "65536M"}
        claim = next(volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume)
        assert claim["persistentVolumeClaim"]["claimName"] == "sidestack-shared"


def test_failed_pod_terminates_the_job_as_failed() -> None:
    """TorchX maps Terminated to a failure and Aborted to a cancellation, which is not reported as a failure."""
    policies = job({"queue": "q"}, j="2x2")["spec"]["policies"]
    assert {"event": "PodFailed", "action": "TerminateJob"} in policies


def test_pods_have_safe_defaults_without_a_clusters_file() -> None:
    (pod,) = pods(job({"queue": "q"}, memMB=8192))
    assert pod["securityContext"]["runAsNonRoot"] is True
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "dshm")
    assert shm["emptyDir"]["sizeLimit"] == "4096M"


def test_secrets_are_references_and_values_are_left_out() -> None:
    app = encoder.train(
        config="c", dataset="d", out="o", cluster="kubernetes",
        env={"MLFLOW_TRACKING_URI": "https://me:pass@host", "AWS_SECRET_ACCESS_KEY": "abc"},
    )  # fmt: skip
    app.roles[0].metadata[SECRETS_KEY] = ["AWS_SECRET_ACCESS_KEY"]
    info = create_scheduler("test").submit_dryrun(app, {})
    assert "pass" not in str(info) and "abc" not in str(info)
    (pod,) = pods(info.request.resource)
    references = {one["name"]: one["valueFrom"] for one in pod["containers"][0]["env"] if "valueFrom" in one}
    assert references == {
        "MLFLOW_TRACKING_URI": {"secretKeyRef": {"name": "mlflow", "key": "uri"}},
        "AWS_SECRET_ACCESS_KEY": {"secretKeyRef": {"name": "sidestack", "key": "AWS_SECRET_ACCESS_KEY"}},
    }


def test_undefined_secret_is_refused(tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, "scheduler: kubernetes\nimage: i\noptions: {queue: q}\n")
    app = encoder.train(config="c", dataset="d", out="o", cluster=cluster)
    app.roles[0].metadata[SECRETS_KEY] = ["TOKEN"]
    with pytest.raises(ConfigError, match=r"TOKEN is in run.secrets; `secret` or `secrets.TOKEN`"):
        create_scheduler("test").submit_dryrun(app, {})


def test_devices_are_requested_and_privileged_pods_are_refused(tmp_path: Path) -> None:
    text = "scheduler: kubernetes\nimage: i\noptions: {queue: q}\nresources: {devices: {vpc.amazonaws.com/efa: 4}}\n"
    (pod,) = pods(job(cluster=write_cluster(tmp_path, text)))
    for kind in ("limits", "requests"):
        assert pod["containers"][0]["resources"][kind]["vpc.amazonaws.com/efa"] == "4"
    with pytest.raises(ConfigError, match="privileged"):
        job({"queue": "q"}, mounts=["type=device", "src=/dev/fuse"])


def test_missing_queue_and_cluster_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs the option `queue`, or a cluster's file"):
        job()


def test_job_can_be_written_as_json() -> None:
    json.dumps(job(cluster="kubernetes"))
