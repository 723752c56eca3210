"""The whole of a run's file: the stages' sections, and `run`, which says how they are launched."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torchx.specs import parse_mounts

from sidestack.components.torchrun import IMAGE, RENDEZVOUS_SECONDS
from sidestack.encoder.config import EncoderConfig, MaterializeConfig
from sidestack.encoder.config import TrainingConfig as EncoderTraining
from sidestack.encoder.export_config import ExportConfig
from sidestack.encoder.sid.spec import DEFAULT_NAME, prefixes_fit
from sidestack.infra.clusters.config import Cluster, Resources, load_cluster
from sidestack.infra.config import Config, FileName, load_file, matching, nearest, parse, plain
from sidestack.infra.distributed import Timeouts
from sidestack.infra.errors import ConfigError
from sidestack.infra.lanes import require_lanes
from sidestack.infra.masking import MASK
from sidestack.infra.remote.fields import Place
from sidestack.infra.schedulers import option_names
from sidestack.pipelines.drift.config import DriftConfig
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.log.config import LogConfig
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.retrain.config import RetrainConfig
from sidestack.pipelines.tables.config import TableConfig
from sidestack.pipelines.tune.config import TuneConfig
from sidestack.ranker.baseline.config import ARM as BASELINE
from sidestack.ranker.baseline.config import BaselineConfig
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.config import TrainingConfig as RankerTraining
from sidestack.ranker.contents import content_kinds
from sidestack.ranker.contents.contract import entity_at
from sidestack.ranker.export_config import RankerExportConfig
from sidestack.ranker.score_config import ScoreConfig

_TRAINING = ("encoder", "materialize", "ranker")
"""The stages that use GPUs where there are any."""

WITHOUT_BASELINE = "baseline.enabled=false"
"""Overrides a run's file where arms are compared with each other alone."""

C = TypeVar("C")

Trained = TypeVar("Trained", EncoderConfig, RankerConfig)


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
    """Return mounts as torchx takes them: one option after another, each mount's type before its others."""
    options = [option for mount in mounts for option in mount.split(",")]
    try:
        parse_mounts(options)
    except (KeyError, ValueError) as error:
        raise ValueError(f"must look like type=bind,src=/shared,dst=/shared: {error.args[0]}") from error
    return tuple(options)


class LaunchConfig(Config):
    """What one stage is launched with."""

    nodes: PositiveInt = 1
    gpu: Annotated[int, Field(ge=0)] = 0
    """GPUs a node; 0 hides those that there are. By default the stages that train have the cluster's, or on this
    machine those that it has."""
    ranks: PositiveInt = Field(default_factory=lambda given: given.get("gpu") or 2)
    """Ranks a node; by default one for each GPU, or two."""
    cpu: PositiveInt = 2
    """CPU cores a node, shared out over its ranks' threads."""
    memory_mb: PositiveInt = 6144
    """Memory a node, in MB; schedulers enforce it, `local_cwd` does not."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often torchrun starts the ranks anew after a failure."""
    max_retries: Annotated[int, Field(ge=0)] = 0
    """How often the scheduler runs the whole job anew."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.gpu and self.ranks > self.gpu:
            raise ValueError(f"ranks {self.ranks} a node: are more than its GPUs (gpu: {self.gpu})")
        return self


class SingleRankConfig(LaunchConfig):
    """What a stage is launched with whose work is one rank's."""

    ranks: PositiveInt = 1
    """Ranks a node."""


class StageLaunches(Config):
    """What each stage is launched with."""

    prepare: LaunchConfig = LaunchConfig()
    encoder: LaunchConfig = LaunchConfig()
    materialize: LaunchConfig = LaunchConfig()
    ranker: LaunchConfig = LaunchConfig()
    """Every arm's."""
    baseline: SingleRankConfig = SingleRankConfig()
    compare: SingleRankConfig = SingleRankConfig()


class RunConfig(Config):
    """The `run` section."""

    name: FileName
    """Names the run's directory and its MLflow experiment."""
    runs_dir: Place = Path("runs")
    """Where runs lie: on more than one node, on a filesystem that all nodes share, or at a URL of an object store."""
    arms: tuple[str, ...] | None = None
    """Which of `ranker.arms` to train and compare; by default all."""
    cluster: str | None = None
    """The cluster's file, by path or by the name of a shipped one: `laptop`, `slurm`, `kubernetes`, `aws_batch`. What
    it says holds where this section says nothing (docs/clusters.md)."""
    scheduler: Literal["local_cwd", "local_docker", "slurm", "kubernetes", "aws_batch"] = "local_cwd"
    """Where the stages run."""
    scheduler_options: dict[Line, Option] = {}
    """The scheduler's own options, such as `partition` or `queue` (`torchx runopts`)."""
    image: Annotated[str, matching(r"\S+", "one word")] = IMAGE
    """The container image, where the scheduler uses one."""
    mounts: Annotated[tuple[Line, ...], AfterValidator(_mount_options)] = ()
    """Mounts as `type=bind,src=/shared,dst=/shared`."""
    env: dict[Variable, str] = {}
    """Environment variables of every stage. Copies of the file have `***` for the values; for a secret, `secrets`."""
    secrets: tuple[Variable, ...] = ()
    """Names of variables that stages get from the driver's own environment; their values are written nowhere."""
    launch: StageLaunches = StageLaunches()
    """Nodes, ranks and resources by stage."""
    jobs: PositiveInt = 1
    """Stages under way at a time. On one machine they share its cores, `launch.*.cpu` being the most that each has: the
    comparison's samples a second are then those of a shared machine."""
    encoders: dict[str, Place] = {}
    """By the SIDs' name (`sid` is section `encoder`'s): a committed encoder that is used as it is, in place
    of training one. New items are then encoded by it, and published SIDs stay."""
    replicates: Annotated[int, Field(ge=1, le=1000)] = Field(
        default_factory=lambda given: 1 if given.get("encoders") else 2
    )
    """How often encoders and arms are trained, each time from seeds one higher, on one prepared dataset: what one
    training alone moves can then be told from what arms differ by. By default twice, the fewest that a verdict takes;
    once where `encoders` are given, which all trainings would share."""
    timeouts: Timeouts = Timeouts()
    """How long a stage's ranks wait for each other, in training and around a commit."""
    timeout_minutes: PositiveFloat = 1440.0
    """A stage that takes longer, waiting in the scheduler's queue included, is cancelled."""
    rendezvous_s: PositiveInt = RENDEZVOUS_SECONDS
    """How many seconds the nodes of a stage wait for each other when it starts."""
    scheduler_retry_minutes: PositiveFloat = 10.0
    """How long a scheduler that does not answer is asked again before the run ends."""
    on_signal: Literal["cancel", "leave"] = "cancel"
    """What becomes of running stages when the driver is ended by SIGTERM, SIGINT or SIGHUP, or gives a scheduler up:
    they are cancelled, after they had time to checkpoint, or left to run on, where the same command finds them."""

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
                raise ValueError(f"scheduler_options.{name}: {self.scheduler} has no such option{nearest(name, known)}")
        if "queue" in known and "queue" not in self.scheduler_options:
            raise ValueError(f"scheduler {self.scheduler!r}: needs scheduler_options.queue, or a cluster's file")
        return self

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        """Fill in what the cluster's file says; how a stage is launched, key by key."""
        if not isinstance(values, Mapping):
            return values
        cluster = load_cluster(str(values["cluster"])) if values.get("cluster") else None
        own = dict(values) if cluster is None else {**_of_cluster(cluster, values), **values}
        if cluster is not None:
            own["scheduler_options"] = cluster.scheduler_options | dict(values.get("scheduler_options") or {})
        own["launch"] = _launches(cluster, own.get("scheduler", "local_cwd"), values.get("launch"))
        return own


class PipelineConfig(Config):
    """Every section of a run's file; the driver validates them all before it launches anything."""

    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    encoders: dict[str, dict[str, Any]] = {}
    """Further encoders, by the name of the SIDs they give (`text_sid` gives columns `item_text_sid`): what each has
    otherwise than `encoder`. Its signals and quantizer are replaced whole, other settings one by one."""
    materialize: MaterializeConfig = Field(default_factory=MaterializeConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    """Of `encoder.export`, which is no stage of the pipeline: it is run for an encoder that is to be served."""
    ranker: RankerConfig = Field(default_factory=RankerConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    """Of `ranker.score`, which is run for a ranker whose probabilities are wanted."""
    ranker_export: RankerExportConfig = Field(default_factory=RankerExportConfig)
    """Of `ranker.export`, which is run for a ranker that is to be served."""
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)
    tune: TuneConfig = Field(default_factory=TuneConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    tables: dict[str, TableConfig] = {}
    """The papers' tables by name, for `pipelines.tables`."""
    drift: DriftConfig = Field(default_factory=DriftConfig)
    """Of `pipelines.drift`, which compares a cycle's data, encoders and SIDs with those of the cycle before."""
    retrain: RetrainConfig = Field(default_factory=RetrainConfig)
    """Of `pipelines.retrain`."""
    run: RunConfig

    @model_validator(mode="after")
    def _check_arms(self) -> "PipelineConfig":
        for arm in self.arms:
            self.ranker.resolved(arm)
        if self.baseline.enabled and BASELINE in self.arms:
            raise ValueError(f"ranker.arms.{BASELINE}: is the name of section baseline's arm; must be another")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"run.arms: {list(self.arms)} names an arm twice")
        if self.compare.reference not in self.arms:
            known = ", ".join(self.arms)
            raise ValueError(f"compare.reference {self.compare.reference!r}: not trained; arms are {known}")
        return self

    @model_validator(mode="after")
    def _check_seeds(self) -> "PipelineConfig":
        """Check that the seed of the last replicate, as much higher, is one that every generator takes."""
        sections = {"ranker": self.ranker.training.seed, "baseline": self.baseline.seed}
        sections |= {f"encoder of {name}": self.encoder_of(name).training.seed for name in self.sid_names}
        for section, seed in sections.items():
            if seed + self.run.replicates > 2**31:
                raise ValueError(
                    f"seed {seed} ({section}) + run.replicates={self.run.replicates}: must stay below 2^31"
                )
        return self

    @model_validator(mode="after")
    def _check_lanes(self) -> "PipelineConfig":
        """Check what the stages check again when they begin, hours later."""
        launch = self.run.launch
        encoders = {f"encoders.{name}" if name in self.encoders else "encoder": name for name in self.sid_names}
        for section, name in encoders.items():
            _check_lanes_of(section, self.encoder_of(name).training, launch.encoder)
        _check_lanes_of("ranker", self.ranker.training, launch.ranker)
        lanes, ranks = self.ranker.training.lanes, launch.ranker.nodes * launch.ranker.ranks
        with _named("ranker.training.eval_"):
            require_lanes(self.ranker.training.eval_batch_size, lanes, ranks)
        return self

    @model_validator(mode="after")
    def _check_baseline(self) -> "PipelineConfig":
        own, arms = self.baseline.holdout, self.ranker.holdout
        if own != arms and "holdout" in self.baseline.model_fields_set:
            raise ValueError(f"baseline.holdout: {plain(own)} differs from the arms' in ranker.holdout, {plain(arms)}")
        return self

    @model_validator(mode="after")
    def _check_encoders(self) -> "PipelineConfig":
        if DEFAULT_NAME in self.encoders:
            raise ValueError(f"encoders.{DEFAULT_NAME}: is what section encoder gives; must be another name")
        for name in self.encoders:
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(f"encoders.{name}: must be of a-z, 0-9 and _, as columns are named after it")
            self.encoder_of(name)
        for name in self.materialize.prefix_lengths:
            if name not in self.sid_names:
                raise ValueError(f"materialize.prefix_lengths.{name}: SIDs are {', '.join(self.sid_names)}")
        for name in self.sid_names:
            self._check_prefixes(name)
        for name in self.run.encoders:
            if name not in self.sid_names:
                raise ValueError(f"run.encoders.{name}: SIDs are {', '.join(self.sid_names)}")
        if self.run.encoders and self.run.replicates > 1:
            raise ValueError("run.encoders: replicates would all have the same encoder; set run.replicates=1")
        for arm in self.arms:
            self._check_sids(arm)
        return self

    def _check_prefixes(self, name: str) -> None:
        """Check what materialize would refuse hours later; an encoder that is given has digits of its own."""
        lengths = self.materialize.prefix_lengths.get(name, ())
        if not lengths or name in self.run.encoders:
            return
        quantizer = self.encoder_of(name).quantizer
        with torch.device("meta"):  # sizes alone, without their memory
            digits = quantizer.build().digits
        if not prefixes_fit(lengths, digits):
            section = "encoder" if name == DEFAULT_NAME else f"encoders.{name}"
            raise ValueError(
                f"materialize.prefix_lengths.{name}: {list(lengths)} must rise within 1..{digits}, the digits of"
                f" {section}.quantizer ({quantizer.kind})"
            )

    def _check_sids(self, arm: str) -> None:
        """Check that an arm's sets of SIDs are given by some encoder, and are of whom its positions ask for."""
        content = self.ranker.arms[arm]
        for name in content.sids:
            if name not in self.sid_names:
                raise ValueError(f"ranker.arms.{arm}.sids: {name!r} is unknown; SIDs are {', '.join(self.sid_names)}")
        given = {self.encoder_of(name).entity for name in content.sids}
        for position, kind in content.kinds.items():
            entity = entity_at(position)
            if content_kinds()[kind].takes_sids and entity not in given:
                raise ValueError(f"ranker.arms.{arm}: {kind} of {entity}s; sids={list(content.sids)} are of others")

    @model_validator(mode="after")
    def _check_tables(self) -> "PipelineConfig":
        for name, table in self.tables.items():
            for arm in table.arms:
                if arm not in self.ranker.arms:
                    raise ValueError(f"tables.{name}.arms: {arm!r} is unknown; arms are {', '.join(self.ranker.arms)}")
        return self

    @model_validator(mode="after")
    def _check_store(self) -> "PipelineConfig":
        if isinstance(self.prepare.source, LogConfig):
            self.prepare.source.require_filesystem(self.run.runs_dir)
        return self

    @property
    def sid_names(self) -> tuple[str, ...]:
        """The names of all sets of SIDs."""
        return (DEFAULT_NAME, *self.encoders)

    def encoder_of(self, name: str, replicate: int = 0) -> EncoderConfig:
        """Return the configuration of one encoder in one replicate.

        Args:
            name: one of `sid_names`. replicate: added to its seed.

        Raises:
            ConfigError: what it has otherwise does not fit.
        """
        values, where = plain(self.encoder), f"encoders.{name}"
        for key, value in self.encoders.get(name, {}).items():
            is_section = key in ("network", "training", "search") and isinstance(value, dict)
            values[key] = {**values[key], **value} if is_section else value
        return _seeded(parse(EncoderConfig, values, where), replicate)

    def ranker_of(self, arm: str, replicate: int = 0) -> RankerConfig:
        """Return the configuration of one arm in one replicate, whose number is added to its seed."""
        return _seeded(self.ranker.resolved(arm), replicate)

    def baseline_of(self, replicate: int = 0) -> BaselineConfig:
        """Return the baseline's configuration in one replicate: on the arms' dates, the number added to its seed."""
        changes = {"holdout": self.ranker.holdout, "seed": self.baseline.seed + replicate}
        return self.baseline.model_copy(update=changes)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms to train, in the order they are trained in."""
        return tuple(self.ranker.arms) if self.run.arms is None else self.run.arms


def _of_cluster(cluster: Cluster, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a cluster's file gives.

    Raises:
        ValueError: the run names a scheduler that is not the cluster's.
    """
    scheduler = values.get("scheduler", cluster.scheduler)
    if scheduler != cluster.scheduler:
        raise ValueError(f"scheduler {scheduler!r}: the scheduler of {values['cluster']} is {cluster.scheduler!r}")
    settings: dict[str, Any] = {"scheduler": cluster.scheduler, "mounts": cluster.mounts}
    return settings | ({"image": cluster.image_reference} if cluster.image_reference else {})


def _launches(cluster: Cluster | None, scheduler: str, given: Any) -> Any:
    """Return what each stage is launched with: what is given, else the cluster's resources or this machine's GPUs."""
    if not isinstance(given, Mapping | None):
        return given
    resources = Resources(gpu=torch.cuda.device_count() if scheduler == "local_cwd" else 0)
    if cluster is not None and cluster.resources.model_fields_set:
        resources = cluster.resources
    values: dict[str, Any] = dict(given or {})
    for stage in StageLaunches.model_fields:
        own = values.get(stage) or {}
        if isinstance(own, Mapping):
            gpu = resources.gpu if stage in _TRAINING else 0
            values[stage] = {"gpu": gpu, "cpu": resources.cpu, "memory_mb": resources.memory_mb, **own}
    return values


def _check_lanes_of(section: str, training: EncoderTraining | RankerTraining, launch: LaunchConfig) -> None:
    """Check that lanes divide the batch, where it is given, and ranks the lanes."""
    with _named(f"{section}.training."):
        require_lanes(training.batch_size or training.lanes, training.lanes, launch.nodes * launch.ranks)


@contextmanager
def _named(prefix: str) -> Iterator[None]:
    """Put a section before the setting that an error names."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(f"{prefix}{error}") from None


def _seeded(config: Trained, replicate: int) -> Trained:
    training = config.training.model_copy(update={"seed": config.training.seed + replicate})
    return config.model_copy(update={"training": training})


def read_config(config_file: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], PipelineConfig]:
    """Read a run's file, dotted overrides applied: the values as they are written there, and what they mean.

    Raises:
        ConfigError: the file, an override or a value has a fault.
    """
    values = load_file(config_file, overrides)
    return values, parse(PipelineConfig, values, config_file.name)
