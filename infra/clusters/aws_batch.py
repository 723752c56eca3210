"""AWS Batch: job definitions by a cluster's file, and refusals as errors that name the request."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse
from torchx.schedulers.aws_batch_scheduler import AWSBatchOpts, AWSBatchScheduler, BatchJob
from torchx.specs import AppDef, AppState, Role, runopts
from torchx.specs.named_resources_aws import K8S_ITYPE

from sidestack.infra.clusters.answers import LastAnswers
from sidestack.infra.clusters.config import SECRETS_KEY, BatchCluster, queued_cluster, with_options
from sidestack.infra.errors import ConfigError, SchedulerError, UnansweredError


class BatchJobs(AWSBatchScheduler):  # type: ignore[misc]  # torchx is not typed
    """AWS Batch over EC2, configured by a cluster's file."""

    def __init__(self, session_name: str, client: Any = None) -> None:
        super().__init__(session_name, client=client)
        self._answers = LastAnswers[DescribeAppResponse | None]()

    def _run_opts(self) -> runopts:
        """Return torchx's options, none of them required: the cluster's file may set them."""
        options = super()._run_opts()
        for name in ("queue", "priority"):
            options._opts.pop(name)
        options.add("queue", type_=str, default=None, help="job queue; by default the cluster's")
        options.add("priority", type_=int, default=None, help="scheduling priority within share_id, 0 to 9999")
        return options

    def _submit_dryrun(self, app: AppDef, cfg: AWSBatchOpts) -> AppDryRunInfo[BatchJob]:
        role = app.roles[0]  # a stage's job has no other
        cluster = queued_cluster(BatchCluster, role.metadata, role.image, cfg)
        if cluster.resources.instance is not None:  # else torchx warns that it is unknown
            role.resource.capabilities[K8S_ITYPE] = cluster.resources.instance
        # torchx keeps `cfg` beside the request.
        cfg.update({"priority": 0, **_given(with_options(cluster, cfg))})
        info = super()._submit_dryrun(app, cfg)
        names = role.metadata.get(SECRETS_KEY, ())
        for nodes in info.request.job_def["nodeProperties"]["nodeRangeProperties"]:
            _apply(nodes["container"], cluster, role, names)
        return info

    def schedule(self, dryrun_info: AppDryRunInfo[BatchJob]) -> str:
        """Register the job's definition and submit the job.

        Raises:
            SchedulerError: there are no credentials, or AWS refuses, for example an unknown queue.
            UnansweredError: AWS cannot be reached.
        """
        request = dryrun_info.request
        with _refusals(f"queue {request.queue!r}"):
            self._require_queue(request.queue)
            return str(super().schedule(dryrun_info))

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return a job's state; for a failed one with the reason, such as an image that cannot be pulled."""
        return self._answers.of(app_id, self._ask)

    def _ask(self, app_id: str) -> DescribeAppResponse | None:
        answer = super().describe(app_id)
        if answer is not None and answer.state == AppState.FAILED:
            answer.msg = (self._get_job(app_id) or {}).get("statusReason", "")
        return answer

    def _require_queue(self, queue: str) -> None:
        """Check that the queue exists before a job definition is registered, which would stay."""
        found = self._client.describe_job_queues(jobQueues=[queue])["jobQueues"]
        if not found:
            raise SchedulerError(f"aws_batch: queue {queue!r}: no such queue in {self._client.meta.region_name}")
        if found[0]["state"] != "ENABLED":
            raise SchedulerError(f"aws_batch: queue {queue!r}: is {found[0]['state'].lower()}")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _apply(container: dict[str, Any], cluster: BatchCluster, role: Role, secrets: Iterable[str]) -> None:
    """Apply the cluster's file to a node's container."""
    for name in secrets:
        if name not in cluster.secrets:
            raise ConfigError(f"cluster: {name} is in run.secrets; `secrets.{name}` must say which ARN has it")
    container["environment"] = [one for one in container["environment"] if one["name"] not in cluster.secrets]
    if cluster.secrets:
        container["secrets"] = [{"name": name, "valueFrom": arn} for name, arn in cluster.secrets.items()]
    container["user"] = str(cluster.user)
    container["linuxParameters"]["sharedMemorySize"] = min(
        cluster.shm_mb or role.resource.memMB // 2, role.resource.memMB
    )
    if cluster.resources.instance is not None:  # torchx sets it for several nodes only
        container["instanceType"] = cluster.resources.instance


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Convert AWS's refusals into our errors, which name the request."""
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

    try:
        yield
    except (ConnectionError, HTTPClientError) as error:
        raise UnansweredError(f"aws_batch: {what}: {error}") from error
    except (BotoCoreError, ClientError) as error:
        raise SchedulerError(f"aws_batch: {what}: {error}") from error


def create_scheduler(session_name: str, **options: Any) -> BatchJobs:
    """Make the scheduler; an entry point of `torchx.schedulers`."""
    return BatchJobs(session_name)
