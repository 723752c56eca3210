"""Kubernetes: Volcano jobs by a cluster's file, and the API server's refusals as errors that name the request.

torchx 0.7.0 renders the job; of a pod's settings it only supports image, resources and mounts.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, Stream
from torchx.schedulers.kubernetes_scheduler import (
    LABEL_INSTANCE_TYPE,
    LABEL_UNIQUE_NAME,
    KubernetesJob,
    KubernetesOpts,
    KubernetesScheduler,
    sanitize_for_serialization,
)
from torchx.specs import AppDef, AppState, Role, runopts

from sidestack.infra.clusters.answers import LastAnswers
from sidestack.infra.clusters.config import (
    SECRETS_KEY,
    KubernetesCluster,
    SecretKey,
    queued_cluster,
    with_options,
)
from sidestack.infra.errors import ConfigError, SchedulerError, UnansweredError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_CONNECT_SECONDS, _READ_SECONDS, _ASK_SECONDS = 10, 30, 2

# A container that waits for one of these reasons cannot start without help.
_NEVER_STARTS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
)

_TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\dT\S+Z ")


class KubernetesJobs(KubernetesScheduler):  # type: ignore[misc]  # torchx is not typed
    """Kubernetes with Volcano, configured by a cluster's file."""

    _client: "ApiClient | None"

    def __init__(self, session_name: str) -> None:
        super().__init__(session_name)
        self._answers = LastAnswers[DescribeAppResponse | None]()

    def _run_opts(self) -> runopts:
        """Return torchx's options, none of them required: the cluster's file may set them."""
        options = runopts()
        options.add("namespace", type_=str, default=None, help="namespace of the job; by default the cluster's")
        options.add("queue", type_=str, default=None, help="Volcano queue; by default the cluster's")
        options.add("service_account", type_=str, default=None, help="service account of the pods")
        options.add("priority_class", type_=str, default=None, help="PriorityClass of the job")
        options.add("image_repo", type_=str, default=None, help="repository that a patched image is pushed to")
        return options

    def _submit_dryrun(self, app: AppDef, cfg: KubernetesOpts) -> AppDryRunInfo[KubernetesJob]:
        role = app.roles[0]  # a stage's job has no other
        cluster = queued_cluster(KubernetesCluster, role.metadata, role.image, cfg)
        # torchx keeps `cfg`, and reads the namespace from it when it submits.
        cfg.update(with_options(cluster, cfg))
        info = super()._submit_dryrun(app, cfg)
        job: Any = sanitize_for_serialization(info.request.resource)
        _apply(job, cluster, role)
        info.request.resource = job
        return info

    def schedule(self, dryrun_info: AppDryRunInfo[KubernetesJob]) -> str:
        """Submit a job.

        Raises:
            SchedulerError: the API server refuses the job, for example for an unknown queue.
            UnansweredError: the API server cannot be reached, or has an internal error.
        """
        options = dryrun_info._cfg
        with _refusals(f"queue {options['queue']!r}, namespace {options['namespace']!r}"):
            return str(super().schedule(dryrun_info))

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return a job's state; FAILED, with the reason, if a pod waits for a missing image or secret."""
        return self._answers.of(app_id, self._ask)

    def _ask(self, app_id: str) -> DescribeAppResponse | None:
        from kubernetes.client.rest import ApiException

        try:
            answer = super().describe(app_id)
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        except KeyError as error:
            if error.args != ("Completing",):  # torchx 0.7.0 does not support this phase
                raise
            return DescribeAppResponse(app_id, state=AppState.RUNNING)
        if answer is not None and answer.state in (AppState.PENDING, AppState.RUNNING):
            reasons = sorted(set(self._never_starting(app_id)))
            if reasons:
                answer.state, answer.msg = AppState.FAILED, "; ".join(reasons)
        return answer

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Yield the lines of a pod's log, without the API server's timestamps.

        If the log is followed, wait until the job has started: before that the API server refuses to return it.
        """
        while should_tail and self._is_waiting(app_id):
            time.sleep(_ASK_SECONDS)
        lines = super().log_iter(app_id, role_name, k, regex, since, until, should_tail, streams)
        yield from (_TIMESTAMP.sub("", line) for line in lines)

    def _is_waiting(self, app_id: str) -> bool:
        answer = self.describe(app_id)
        return answer is not None and answer.state in (AppState.PENDING, AppState.UNKNOWN)

    def _never_starting(self, app_id: str) -> Iterator[str]:
        from kubernetes import client

        namespace, name = app_id.split(":")
        pods = client.CoreV1Api(self._api_client()).list_namespaced_pod(
            namespace, label_selector=f"{LABEL_UNIQUE_NAME}={name}", _request_timeout=_READ_SECONDS
        )
        for pod in pods.items:
            for status in pod.status.container_statuses or []:
                waiting = status.state.waiting if status.state is not None else None
                if waiting is not None and waiting.reason in _NEVER_STARTS:
                    yield f"image {status.image!r}: {waiting.reason}: {waiting.message}"

    def _api_client(self) -> "ApiClient":
        """Return the client, configured by the kubeconfig, or within a pod by its service account.

        Raises:
            ConfigError: there is neither.
        """
        if self._client is None:
            self._client = _connect()
        return self._client


def _connect() -> "ApiClient":
    from kubernetes import client, config

    class Bounded(client.ApiClient):  # type: ignore[misc]  # the client is not typed
        """A client with a connection timeout of some seconds, which reads a pod's log as text.

        Version 36 of the client returns a log as the `str` of bytes.
        """

        def deserialize(self, response: Any, response_type: Any) -> Any:
            if isinstance(response.data, bytes):
                response.data = response.data.decode("utf-8", errors="replace")
            return super().deserialize(response, response_type)

        def call_api(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["_request_timeout"] = kwargs.get("_request_timeout") or (_CONNECT_SECONDS, None)
            return super().call_api(*args, **kwargs)

    configuration = client.Configuration()
    configuration.retries = 1
    try:
        config.load_kube_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            raise ConfigError(f"kubernetes: no kubeconfig (KUBECONFIG), and not in a pod: {error}") from error
    return Bounded(configuration)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Convert the API server's refusals into our errors, which name the request."""
    from kubernetes.client.rest import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        message = f"kubernetes: {what}: the API server refuses: {error.status} {_message(error)}"
        raise (UnansweredError if error.status >= 500 else SchedulerError)(message) from error
    except HTTPError as error:
        raise UnansweredError(f"kubernetes: {what}: the API server does not answer: {error}") from error


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, TypeError, KeyError):
        return str(error.reason)


def _apply(job: dict[str, Any], cluster: KubernetesCluster, role: Role) -> None:
    """Apply the cluster's file to the pods of a rendered job."""
    job["spec"]["policies"] = [{"event": event, "action": action} for event, action in cluster.policies.items()]
    references = _references(cluster, role.metadata.get(SECRETS_KEY, ()))
    shm_mb = min(cluster.shm_mb or role.resource.memMB // 2, role.resource.memMB)
    for task in job["spec"]["tasks"]:
        pod = task["template"]["spec"]
        _apply_to_pod(pod, cluster, references, shm_mb)
        if "priorityClassName" in job["spec"]:
            pod["priorityClassName"] = job["spec"]["priorityClassName"]


def _apply_to_pod(
    pod: dict[str, Any], cluster: KubernetesCluster, references: Mapping[str, SecretKey], shm_mb: int
) -> None:
    (container,) = pod["containers"]
    if container["securityContext"].get("privileged"):
        raise ConfigError("kubernetes: a mount of type=device makes pods privileged; name it in `resources.devices`")
    security = cluster.security
    pod["securityContext"] = {
        "runAsNonRoot": True, "runAsUser": security.user, "runAsGroup": security.group,
        **({"fsGroup": security.fs_group, "fsGroupChangePolicy": "OnRootMismatch"} if security.fs_group else {}),
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container["env"] = [*(one for one in container["env"] if one["name"] not in references), *_from_secrets(references)]
    if cluster.pull_policy is not None:
        container["imagePullPolicy"] = cluster.pull_policy
    if cluster.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in cluster.pull_secrets]
    if cluster.tolerations:
        pod["tolerations"] = [one.model_dump(exclude_none=True) for one in cluster.tolerations]
    for limits in container["resources"].values():
        limits.update({name: str(number) for name, number in cluster.resources.devices.items()})
    pod["nodeSelector"] |= cluster.node_selector
    if cluster.resources.instance is not None:
        pod["nodeSelector"][LABEL_INSTANCE_TYPE] = cluster.resources.instance
    pod["terminationGracePeriodSeconds"] = cluster.grace_s
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "dshm")
    shm["emptyDir"]["sizeLimit"] = f"{shm_mb}M"


def _references(cluster: KubernetesCluster, names: Iterable[str]) -> dict[str, SecretKey]:
    """Return, for each secret variable, the secret and key of its value.

    Raises:
        ConfigError: a variable must be kept secret, but the file names no secret that contains it.
    """
    references = dict(cluster.secrets)
    for name in names:
        if name not in references:
            if cluster.secret is None:
                raise ConfigError(
                    f"cluster: {name} is in run.secrets; `secret` or `secrets.{name}` must say where it is"
                )
            references[name] = SecretKey(name=cluster.secret, key=name)
    return references


def _from_secrets(references: Mapping[str, SecretKey]) -> list[dict[str, Any]]:
    return [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": one.name, "key": one.key}}}
        for variable, one in references.items()
    ]


def create_scheduler(session_name: str, **options: Any) -> KubernetesJobs:
    """Make the scheduler; an entry point of `torchx.schedulers`."""
    return KubernetesJobs(session_name)
