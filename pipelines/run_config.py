"""The `run` section: how stages are launched, where outputs are stored, and which arms are compared."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torchx.specs import parse_mounts

from sidestack.components.torchrun import IMAGE, RENDEZVOUS_SECONDS
from sidestack.infra.clusters.config import Cluster, Resources, load_cluster
from sidestack.infra.config import Config, FileName, matching, suggestion
from sidestack.infra.distributed import Timeouts
from sidestack.infra.masking import MASK
from sidestack.infra.remote.fields import Place
from sidestack.infra.schedulers import option_names

TRAINING_STAGES = ("encoder", "materialize", "ranker")
"""The stages that use GPUs if there are any."""

C = TypeVar("C")


def _require_one_line(value: C) -> C:
    if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", value):
        raise ValueError("must be one line, without control characters: it becomes part of a scheduler's script")
    return value


Line = Annotated[str, AfterValidator(_require_one_line)]
Option = Annotated[str | int | float | bool, AfterValidator(_require_one_line)]
"""The value of a scheduler's option."""
Variable = Annotated[str, matching("[A-Za-z_][A-Za-z0-9_]*", "a name of letters, digits and _, as shells allow it")]
"""The name of an environment variable, as shells allow it."""


def _mount_options(mounts: tuple[str, ...]) -> tuple[str, ...]:
    """Return mounts in torchx's form: a flat list of options, each mount beginning with its type."""
    options = [option for mount in mounts for option in mount.split(",")]
    try:
        parse_mounts(options)
    except (KeyError, ValueError) as error:
        raise ValueError(f"must look like type=bind,src=/shared,dst=/shared: {error.args[0]}") from error
    return tuple(options)


class LaunchConfig(Config):
    """Launch settings of one stage."""

    nodes: PositiveInt = 1
    gpu: Annotated[int, Field(ge=0)] = 0
    """GPUs a node; 0 hides all GPUs. By default, stages that train get the cluster's GPUs, or all of this machine's."""
    ranks: PositiveInt = Field(default_factory=lambda given: given.get("gpu") or 2)
    """Ranks a node; by default one for each GPU, or two."""
    cpu: PositiveInt = 2
    """CPU cores a node, divided among its ranks' threads."""
    memory_mb: PositiveInt = 6144
    """Memory a node, in MB; schedulers enforce it, `local_cwd` does not."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often torchrun restarts the ranks after a failure."""
    max_retries: Annotated[int, Field(ge=0)] = 0
    """How often the scheduler reruns the whole job."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.gpu and self.ranks > self.gpu:
            raise ValueError(f"ranks {self.ranks} a node: are more than its GPUs (gpu: {self.gpu})")
        return self


class SingleRankConfig(LaunchConfig):
    """Launch settings of a stage whose work is done by one rank."""

    ranks: PositiveInt = 1
    """Ranks a node."""


class StageLaunches(Config):
    """Launch settings by stage."""

    prepare: LaunchConfig = LaunchConfig()
    encoder: LaunchConfig = LaunchConfig()
    materialize: LaunchConfig = LaunchConfig()
    ranker: LaunchConfig = LaunchConfig()
    """Launch settings of every arm."""
    baseline: SingleRankConfig = SingleRankConfig()
    compare: SingleRankConfig = SingleRankConfig()


class RunConfig(Config):
    """The `run` section."""

    name: FileName
    """Name of the run's directory and its MLflow experiment."""
    runs_dir: Place = Path("runs")
    """Where runs are stored; with several nodes, on a shared filesystem or at an object store's URL."""
    arms: tuple[str, ...] | None = None
    """Which of `ranker.arms` to train and compare; by default all."""
    cluster: str | None = None
    """The cluster's file, by path or by the name of a shipped one: `laptop`, `slurm`, `kubernetes`, `aws_batch`. Its
    settings apply where this section has none (docs/clusters.md)."""
    scheduler: Literal["local_cwd", "local_docker", "slurm", "kubernetes", "aws_batch"] = "local_cwd"
    """Where the stages run."""
    scheduler_options: dict[Line, Option] = {}
    """The scheduler's own options, such as `partition` or `queue` (`torchx runopts`)."""
    image: Annotated[str, matching(r"\S+", "one word")] = IMAGE
    """The container image, where the scheduler uses one."""
    mounts: Annotated[tuple[Line, ...], AfterValidator(_mount_options)] = ()
    """Mounts as `type=bind,src=/shared,dst=/shared`."""
    env: dict[Variable, str] = {}
    """Environment variables of every stage. Copies of the file have `***` for the values; use `secrets` for secrets."""
    secrets: tuple[Variable, ...] = ()
    """Names of variables that stages get from the driver's own environment; their values are never written."""
    launch: StageLaunches = StageLaunches()
    """Nodes, ranks and resources by stage."""
    jobs: PositiveInt = 1
    """Number of stages that run at a time. On one machine they share its cores, and `launch.*.cpu` is the maximum for
    each: the comparison's samples a second are then those of a shared machine."""
    encoders: dict[str, Place] = {}
    """SIDs' name (`sid` for section `encoder`) -> a committed encoder that is used as it is, instead of training one.
    It encodes new items, and published SIDs stay."""
    replicates: Annotated[int, Field(ge=1, le=1000)] = Field(
        default_factory=lambda given: 1 if given.get("encoders") else 2
    )
    """How often encoders and arms are trained on one prepared dataset, each time with seeds one higher. This separates
    the variation between trainings from the difference between arms. By default twice, the minimum for a verdict; once
    if `encoders` are given, as all trainings would share them."""
    timeouts: Timeouts = Timeouts()
    """How long a stage's ranks wait for each other, in training and around a commit."""
    timeout_minutes: PositiveFloat = 1440.0
    """A stage that takes longer, including time in the scheduler's queue, is cancelled."""
    rendezvous_s: PositiveInt = RENDEZVOUS_SECONDS
    """How many seconds the nodes of a stage wait for each other when it starts."""
    scheduler_retry_minutes: PositiveFloat = 10.0
    """How long queries to a scheduler that does not answer are retried before the run ends."""
    on_signal: Literal["cancel", "leave"] = "cancel"
    """What happens to running stages when SIGTERM, SIGINT or SIGHUP ends the driver, or the scheduler stops answering:
    `cancel` ends them, with time to checkpoint; `leave` lets them run, and the same command finds them."""

    @field_validator("env", mode="before")
    @classmethod
    def _check_env(cls, env: Any) -> Any:
        """Check the values without showing them: they may be secrets."""
        for name, value in env.items() if isinstance(env, dict) else ():
            if not isinstance(value, str) or "\0" in value:
                raise ValueError(f"{name}: must be text; put quotes around it")
            if value == MASK:
                raise ValueError(f"{name}: is masked, as in copies of a run's file; must be set anew")
        return env

    @model_validator(mode="after")
    def _check_secrets(self) -> "RunConfig":
        for name in self.secrets:
            if name in self.env:
                raise ValueError(f"secrets: {name} stands in env, too")
        return self

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        known = option_names(self.scheduler)
        for name in self.scheduler_options:
            if name not in known:
                raise ValueError(
                    f"scheduler_options.{name}: {self.scheduler} has no such option{suggestion(name, known)}"
                )
        if "queue" in known and "queue" not in self.scheduler_options:
            raise ValueError(f"scheduler {self.scheduler!r}: needs scheduler_options.queue, or a cluster's file")
        return self

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        """Fill in the cluster file's settings; launch settings are merged key by key."""
        if not isinstance(values, Mapping):
            return values
        cluster = load_cluster(str(values["cluster"])) if values.get("cluster") else None
        own = dict(values) if cluster is None else {**_of_cluster(cluster, values), **values}
        if cluster is not None:
            own["scheduler_options"] = cluster.scheduler_options | dict(values.get("scheduler_options") or {})
        own["launch"] = _launches(cluster, own.get("scheduler", "local_cwd"), values.get("launch"))
        return own


def _of_cluster(cluster: Cluster, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings from a cluster's file.

    Raises:
        ValueError: the run names a scheduler that is not the cluster's.
    """
    scheduler = values.get("scheduler", cluster.scheduler)
    if scheduler != cluster.scheduler:
        raise ValueError(f"scheduler {scheduler!r}: the scheduler of {values['cluster']} is {cluster.scheduler!r}")
    settings: dict[str, Any] = {"scheduler": cluster.scheduler, "mounts": cluster.mounts}
    return settings | ({"image": cluster.image_reference} if cluster.image_reference else {})


def _launches(cluster: Cluster | None, scheduler: str, given: Any) -> Any:
    """Return each stage's launch settings: those given, else the cluster's resources or this machine's GPUs."""
    if not isinstance(given, Mapping | None):
        return given
    resources = Resources(gpu=torch.cuda.device_count() if scheduler == "local_cwd" else 0)
    if cluster is not None and cluster.resources.model_fields_set:
        resources = cluster.resources
    values: dict[str, Any] = dict(given or {})
    for stage in StageLaunches.model_fields:
        own = values.get(stage) or {}
        if isinstance(own, Mapping):
            gpu = resources.gpu if stage in TRAINING_STAGES else 0
            values[stage] = {"gpu": gpu, "cpu": resources.cpu, "memory_mb": resources.memory_mb, **own}
    return values
