"""The Kubernetes scheduler with a fake API server on loopback."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx.specs import AppState

from sidestack.components import encoder
from sidestack.infra.clusters.kubernetes import KubernetesJobs, create_scheduler
from sidestack.infra.errors import ConfigError, SchedulerError, UnansweredError

QUEUES = ("default",)


@dataclass
class Api:
    """The fake server's state and address."""

    address: str = ""
    jobs: dict[str, Any] = field(default_factory=dict)
    pods: list[dict[str, Any]] = field(default_factory=list)
    phase: str = "Pending"


def handler(api: Api) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            queue = job["spec"]["queue"]
            if queue not in QUEUES:  # the message of Volcano's webhook
                message = (
                    f'admission webhook "validatejob.volcano.sh" denied the request: unable to find job queue: {queue}'
                )
                self.answer(400, {"kind": "Status", "message": message})
                return
            api.jobs[job["metadata"]["name"]] = job
            self.answer(201, job)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.endswith("/pods"):
                self.answer(200, {"apiVersion": "v1", "kind": "PodList", "items": api.pods})
            elif path.endswith("/log"):
                self.answer_text("2026-11-30T10:00:00.123456789Z [default0]:step 1\n", kind="text/plain")
            elif path.split("/")[-2] in api.jobs:
                self.answer(200, {"status": {"state": {"phase": api.phase}}})
            else:
                self.answer(404, {"kind": "Status", "message": "not found"})

        def answer(self, status: int, content: dict[str, Any]) -> None:
            self.answer_text(json.dumps(content), status)

        def answer_text(self, text: str, status: int = 200, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr("sidestack.infra.clusters.answers.SECONDS", -1.0)
    found = Api()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    use_kubeconfig(tmp_path, monkeypatch, found.address)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def use_kubeconfig(folder: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    names = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "training"}}
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [names],
        "clusters": [{"name": "c", "cluster": {"server": address}}], "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))


def submit(scheduler: KubernetesJobs, options: dict[str, Any] | None = None, cluster: str = "kubernetes") -> str:
    app = encoder.train(config="c", dataset="d", out="o", cluster=cluster)
    return str(scheduler.schedule(scheduler.submit_dryrun(app, options or {})))


def test_job_is_submitted_to_the_clusters_namespace_and_described(api: Api) -> None:
    scheduler = create_scheduler("test")
    handle = submit(scheduler)
    namespace, name = handle.split(":")
    assert (namespace, list(api.jobs)) == ("training", [name])
    states = {"Pending": AppState.PENDING, "Running": AppState.RUNNING, "Completing": AppState.RUNNING}
    states |= {"Completed": AppState.SUCCEEDED, "Terminated": AppState.FAILED}
    for api.phase, state in states.items():
        assert scheduler.describe(handle).state == state
    for should_tail in (False, True):
        lines = list(scheduler.log_iter(handle, "encoder", should_tail=should_tail))
        assert [line.rstrip() for line in lines] == ["[default0]:step 1"]


def test_log_is_read_once_its_job_has_begun(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = create_scheduler("test")
    handle = submit(scheduler)
    seconds_waited: list[float] = []

    def wait(seconds: float) -> None:
        seconds_waited.append(seconds)
        api.phase = "Running" if len(seconds_waited) == 2 else "Pending"

    monkeypatch.setattr("sidestack.infra.clusters.kubernetes.time.sleep", wait)
    lines = scheduler.log_iter(handle, "encoder", should_tail=True)
    assert next(iter(lines)).rstrip() == "[default0]:step 1"
    assert seconds_waited == [2, 2]


def test_state_is_cached_between_queries(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestack.infra.clusters.answers.SECONDS", 3600.0)
    scheduler = create_scheduler("test")
    handle = submit(scheduler)
    assert scheduler.describe(handle).state == AppState.PENDING
    api.phase = "Running"
    assert scheduler.describe(handle).state == AppState.PENDING
    monkeypatch.setattr("sidestack.infra.clusters.answers.SECONDS", -1.0)
    assert scheduler.describe(handle).state == AppState.RUNNING


def test_unknown_job_has_no_state(api: Api) -> None:
    assert create_scheduler("test").describe("training:away") is None


def test_unknown_queue_is_named(api: Api) -> None:
    with pytest.raises(
        SchedulerError, match=r"queue 'nightly', namespace 'training': .*unable to find job queue: nightly"
    ):
        submit(create_scheduler("test"), {"queue": "nightly"})
    assert api.jobs == {}


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError"])
def test_pod_that_cannot_start_fails_the_job_with_its_reason(api: Api, reason: str) -> None:
    scheduler = create_scheduler("test")
    handle = submit(scheduler)
    waiting = {"waiting": {"reason": reason, "message": "not found"}}
    status = {"name": "encoder-0", "image": "registry.example.com/sidestack:9", "imageID": "", "ready": False}
    api.pods = [{"status": {"containerStatuses": [{**status, "restartCount": 0, "state": waiting}]}}]
    answer = scheduler.describe(handle)
    assert answer.state == AppState.FAILED
    assert answer.msg == f"image 'registry.example.com/sidestack:9': {reason}: not found"
    api.pods[0]["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "ContainerCreating"}}
    assert scheduler.describe(handle).state == AppState.PENDING


def test_unreachable_server_raises_unanswered_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kubeconfig(tmp_path, monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UnansweredError, match="queue 'default', .*the API server does not answer"):
        submit(create_scheduler("test"))


def test_missing_kubeconfig_outside_a_pod_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "away"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match=r"no kubeconfig \(KUBECONFIG\), and not in a pod"):
        submit(create_scheduler("test"))
