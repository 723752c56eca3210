"""A cluster's file: the common settings of a cluster's jobs.

The driver takes it as `run.cluster`, every component as `--cluster`. It contains defaults: a setting of the run, or an
argument of the component, overrides it. A key that the cluster's scheduler does not use is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sidestack.infra.config import Config, parse, plain, read_mapping, suggestion
from sidestack.infra.errors import ConfigError

SHIPPED = Path(__file__).parent
"""The folder of the shipped clusters, which have names."""

ROLE_KEY = "sidestack.cluster"
"""The key of a role's metadata by which a component passes the cluster to the scheduler."""

SECRETS_KEY = "sidestack.secrets"
"""The key of a role's metadata with the names of variables whose values must not be written down."""

FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""The range of rendezvous ports, below Linux's ephemeral ports."""

AbsolutePath = Annotated[str, Field(pattern="^/")]


class Resources(Config):
    """The default resources that a job requests of one node."""

    cpu: PositiveInt = 2
    """CPU cores."""
    memory_mb: PositiveInt = 6144
    """Memory, in MB."""
    gpu: NonNegativeInt = 0
    """GPUs; training stages start one rank per GPU."""


class NodeResources(Resources):
    """Resources with a node type that a job may request."""

    instance: str | None = None
    """The node's type, such as `p5.48xlarge`."""


class PodResources(NodeResources):
    """Resources of a pod."""

    devices: dict[str, PositiveInt] = {}
    """Further devices per node, such as `vpc.amazonaws.com/efa: 4`."""


class Storage(Config):
    """A folder of the nodes, or a shared volume, mounted into the container."""

    path: AbsolutePath
    """The mount path in the container."""
    host: AbsolutePath | None = None
    """The folder on the node."""
    claim: str | None = None
    """The PersistentVolumeClaim; on AWS Batch the EFS file system, such as `fs-0123456789abcdef0`."""
    read_only: bool = False

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.host is None) == (self.claim is None):
            raise ValueError("must have either `host` or `claim`")
        return self

    @property
    def mount(self) -> list[str]:
        """The mount in torchx's words."""
        source = ["type=bind", f"src={self.host}"] if self.host else ["type=volume", f"src={self.claim}"]
        return [*source, f"dst={self.path}", *(["readonly"] if self.read_only else [])]


class Cluster(Config):
    """The keys that every cluster's file may have.

    Attributes:
        scheduler: a name of `infra.schedulers.FACTORIES`.
    """

    scheduler: str
    resources: Resources = Resources()
    env: dict[str, str] = {}
    """Environment variables of every stage, such as `NCCL_SOCKET_IFNAME`."""

    @property
    def scheduler_options(self) -> dict[str, Any]:
        """The scheduler's own options, in torchx's form."""
        options = getattr(self, "options", None)
        return {} if options is None else options.model_dump(mode="json", exclude_none=True)

    @property
    def image_reference(self) -> str | None:
        """The image with its digest; None if the scheduler uses none."""
        return None

    @property
    def mounts(self) -> tuple[str, ...]:
        """The storage as mounts in torchx's form."""
        return ()


class ContainerCluster(Cluster):
    """A cluster that runs containers."""

    image: str
    """The image of `infra/deploy/Dockerfile`, in a registry that the nodes can pull from."""
    digest: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")] | None = None
    """The image's digest: it fixes the image, even if the tag is moved later."""
    storage: tuple[Storage, ...] = ()
    """The storage of configs, inputs and outputs, mounted at the same paths as for the driver."""

    @property
    def image_reference(self) -> str | None:
        """The image with its digest."""
        return f"{self.image}@{self.digest}" if self.digest else self.image

    @property
    def mounts(self) -> tuple[str, ...]:
        """The storage as mounts in torchx's form."""
        return tuple(word for one in self.storage for word in one.mount)


class LocalCluster(Cluster):
    """This machine."""

    scheduler: Literal["local_cwd"]


class DockerCluster(ContainerCluster):
    """This machine, each job in a container."""

    scheduler: Literal["local_docker"]


class SlurmOptions(Config):
    """Options of `sbatch`."""

    partition: str | None = None
    time: str | None = None
    """The time limit of a job, such as `"04:00:00"`."""
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    constraint: str | None = None
    comment: str | None = None
    signal: str | None = None
    """The signal sent to the ranks before the time limit, such as `TERM@120`: two minutes to checkpoint."""


class SlurmCluster(Cluster):
    """A Slurm cluster; jobs run in the environment they are submitted from."""

    scheduler: Literal["slurm"]
    options: SlurmOptions = SlurmOptions()


class KubernetesOptions(Config):
    """The queue and the identity of a Volcano job."""

    queue: str
    """The Volcano queue."""
    namespace: str = "default"
    service_account: str | None = None
    priority_class: str | None = None


class SecretKey(Config):
    """One key of a Kubernetes secret."""

    name: str
    key: str


class Toleration(Config):
    """A node taint that the pods tolerate."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _check_value(self) -> Self:
        if (self.value is not None) != (self.operator == "Equal"):
            raise ValueError(f"operator {self.operator}: takes {'a' if self.operator == 'Equal' else 'no'} value")
        return self


class Security(Config):
    """The user and groups of the container's processes; without root and capabilities, as in the image."""

    user: PositiveInt = 1000
    """The user's id; the image's is 1000."""
    group: PositiveInt = 1000
    fs_group: PositiveInt | None = 1000
    """The group that owns mounted volumes; null leaves them as they are."""


Event = Literal["PodFailed", "PodEvicted", "PodPending", "TaskCompleted", "TaskFailed", "Unknown", "*"]
Action = Literal["TerminateJob", "AbortJob", "RestartJob", "RestartTask", "CompleteJob"]


class KubernetesCluster(ContainerCluster):
    """A Kubernetes cluster with Volcano."""

    scheduler: Literal["kubernetes"] = "kubernetes"
    options: KubernetesOptions
    resources: PodResources = PodResources()
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    pull_secrets: tuple[str, ...] = ()
    """Secrets with the registry's credentials, by name."""
    shm_mb: PositiveInt | None = None
    """The size of /dev/shm, in MB, which counts towards the job's memory; by default half of that memory."""
    secret: str | None = None
    """The secret with the variables named in `run.secrets`, each under its own name."""
    secrets: dict[str, SecretKey] = {}
    """Environment variables whose values come from secrets."""
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    security: Security = Security()
    policies: dict[Event, Action] = {"PodFailed": "TerminateJob", "PodEvicted": "TerminateJob"}
    """Volcano's action on a job after an event of one of its pods. By default a failed pod ends the other pods and
    fails the job; jobs with `max_retries` are first restarted up to that many times."""
    grace_s: PositiveInt = 120
    """Seconds between SIGTERM and SIGKILL."""


class BatchOptions(Config):
    """The queue and the identity of an AWS Batch job."""

    queue: str
    share_id: str | None = None
    priority: Annotated[int, Field(ge=0, le=9999)] | None = None
    job_role_arn: str | None = None
    execution_role_arn: str | None = None
    """The role that reads `secrets` and pulls the image."""


class BatchCluster(ContainerCluster):
    """AWS Batch over EC2."""

    scheduler: Literal["aws_batch"] = "aws_batch"
    options: BatchOptions
    resources: NodeResources = NodeResources()
    shm_mb: PositiveInt | None = None
    """The size of /dev/shm, in MB, which counts towards the job's memory; by default half of that memory."""
    secrets: dict[str, Annotated[str, Field(pattern="^arn:")]] = {}
    """Environment variables whose values come from Secrets Manager or the Parameter Store, by ARN."""
    user: PositiveInt = 1000
    """The user id of the container's processes; the image's is 1000."""

    @model_validator(mode="after")
    def _check_secrets(self) -> Self:
        if self.secrets and self.options.execution_role_arn is None:
            raise ValueError("secrets: need options.execution_role_arn, the role that reads them")
        return self


Queued = TypeVar("Queued", KubernetesCluster, BatchCluster)
"""Clusters whose jobs go to a queue."""

KINDS: Mapping[str, type[Cluster]] = {
    "local_cwd": LocalCluster,
    "local_docker": DockerCluster,
    "slurm": SlurmCluster,
    "kubernetes": KubernetesCluster,
    "aws_batch": BatchCluster,
}
"""The models by scheduler."""


def load_cluster(name: str) -> Cluster:
    """Read a cluster's file.

    Args:
        name: the name of a shipped one, such as `slurm`, or the path of a YAML file.

    Raises:
        ConfigError: there is no such file, or a key or value breaks a rule; for a misspelt name or key, the message
            suggests the nearest.
    """
    is_name = "/" not in name and not name.endswith((".yaml", ".yml"))
    file = SHIPPED / f"{name}.yaml" if is_name else Path(name)
    if is_name and not file.is_file():
        shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
        raise ConfigError(
            f"cluster {name!r}: no such name; shipped are {', '.join(shipped)}{suggestion(name, shipped)}"
        )
    return _parsed(read_mapping(file, f"cluster {file}"), f"cluster {file.name}")


def cluster_of(metadata: Mapping[str, Any], scheduler: str) -> Cluster | None:
    """Return the cluster that a component put into a role's metadata; None: there is none.

    Raises:
        ConfigError: the cluster's scheduler is another one.
    """
    values = metadata.get(ROLE_KEY)
    if values is None:
        return None
    cluster = _parsed(values, "cluster")
    if cluster.scheduler != scheduler:
        raise ConfigError(f"cluster: its scheduler is {cluster.scheduler!r}; this job goes to {scheduler!r}")
    return cluster


def queued_cluster(kind: type[Queued], metadata: Mapping[str, Any], image: str, options: Mapping[str, Any]) -> Queued:
    """Return the cluster of a job; without a file, one made from the scheduler's options.

    Args:
        kind: the scheduler's model. metadata, image: the job's role's. options: the scheduler's, with the `queue`.

    Raises:
        ConfigError: see `cluster_of`; or there is neither a file nor a queue.
    """
    scheduler = kind.model_fields["scheduler"].default
    found = cluster_of(metadata, scheduler)
    if found is not None:
        assert isinstance(found, kind)
        return found
    if options.get("queue") is None:
        raise ConfigError(f"{scheduler}: needs the option `queue`, or a cluster's file (--cluster)")
    return kind.model_validate({"options": {"queue": str(options["queue"])}, "image": image})


def metadata_of(cluster: Cluster) -> dict[str, Any]:
    """Return the role's metadata that `cluster_of` reads."""
    return {ROLE_KEY: plain(cluster)}


def with_options(cluster: Cluster | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's options: those that were passed, with the cluster's as defaults."""
    given = {name: value for name, value in options.items() if value is not None}
    return {**options, **(cluster.scheduler_options if cluster is not None else {}), **given}


def _parsed(values: Mapping[str, Any], where: str) -> Cluster:
    scheduler = str(values.get("scheduler", ""))
    if scheduler not in KINDS:
        shown, near = (f"{scheduler!r} is unknown", suggestion(scheduler, KINDS)) if scheduler else ("is missing", "")
        raise ConfigError(f"{where}.scheduler: {shown}; schedulers are {', '.join(KINDS)}{near}")
    return parse(KINDS[scheduler], values, where)
