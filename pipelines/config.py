"""The whole of a run's file: the stages' sections, and `run`, which says how they are launched."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from components.torchrun import IMAGE
from encoder.config import EncoderConfig, MaterializeConfig
from encoder.export_config import ExportConfig
from infra.config import Config
from pipelines.prepare.config import PrepareConfig
from pipelines.report.config import CompareConfig
from ranker.config import RankerConfig


class LaunchConfig(Config):
    """What one stage is launched with."""

    nodes: PositiveInt = 1
    ranks: PositiveInt = 2
    """Ranks a node."""
    cpu: PositiveInt = 2
    """CPU cores a node, shared out over its ranks' threads."""
    gpu: Annotated[int, Field(ge=0)] = 0
    """GPUs a node."""
    memory_mb: PositiveInt = 6144
    """Memory a node, in MB; schedulers enforce it, `local_cwd` does not."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often torchrun starts the ranks anew after a failure."""
    max_retries: Annotated[int, Field(ge=0)] = 0
    """How often the scheduler runs the whole job anew."""


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
    compare: SingleRankConfig = SingleRankConfig()


class RunConfig(Config):
    """The `run` section."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """Names the run's directory and its MLflow experiment."""
    runs_dir: Path = Path("runs")
    """Where runs lie; on more than one node, on a filesystem that all nodes share."""
    arms: tuple[str, ...] | None = None
    """Which of `ranker.arms` to train and compare; by default all."""
    scheduler: Literal["local_cwd", "local_docker", "slurm", "kubernetes", "aws_batch"] = "local_cwd"
    """Where the stages run."""
    scheduler_options: dict[str, str | int | float | bool] = {}
    """The scheduler's own options, such as `partition` or `queue` (`torchx runopts`)."""
    image: str = IMAGE
    """The container image, where the scheduler uses one."""
    mounts: tuple[str, ...] = ()
    """Mounts as `type=bind,src=/shared,dst=/shared`."""
    env: dict[str, str] = {}
    """Environment variables of every stage."""
    launch: StageLaunches = StageLaunches()
    """Nodes, ranks and resources by stage."""
    timeout_minutes: PositiveFloat = 1440.0
    """A stage that takes longer, waiting in the scheduler's queue included, is cancelled."""


class PipelineConfig(Config):
    """Every section of a run's file; the driver validates them all before it launches anything."""

    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    materialize: MaterializeConfig = Field(default_factory=MaterializeConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    """Of `encoder.export`, which is no stage of the pipeline: it is run for an encoder that is to be served."""
    ranker: RankerConfig = Field(default_factory=RankerConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    run: RunConfig

    @model_validator(mode="after")
    def _check_arms(self) -> "PipelineConfig":
        for arm in self.arms:
            self.ranker.resolved(arm)
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"run.arms: {list(self.arms)} names an arm twice")
        if self.compare.reference not in self.arms:
            known = ", ".join(self.arms)
            raise ValueError(f"compare.reference {self.compare.reference!r}: not trained; arms are {known}")
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms to train, in the order they are trained in."""
        return tuple(self.ranker.arms) if self.run.arms is None else self.run.arms
