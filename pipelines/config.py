"""The whole run file: the stages' sections, and `run`, which configures how they are launched."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, model_validator

from sidestack.encoder.config import EncoderConfig, MaterializeConfig
from sidestack.encoder.config import TrainingConfig as EncoderTraining
from sidestack.encoder.export_config import ExportConfig
from sidestack.encoder.sid.spec import DEFAULT_NAME, prefixes_fit
from sidestack.infra.config import Config, load_file, parse, plain
from sidestack.infra.errors import ConfigError
from sidestack.infra.lanes import require_lanes
from sidestack.pipelines.drift.config import DriftConfig
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.log.config import LogConfig
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.retrain.config import RetrainConfig
from sidestack.pipelines.run_config import LaunchConfig, RunConfig
from sidestack.pipelines.studies.tables.config import TableConfig
from sidestack.pipelines.studies.tune.config import TuneConfig
from sidestack.ranker.baseline.config import ARM as BASELINE
from sidestack.ranker.baseline.config import BaselineConfig
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.config import TrainingConfig as RankerTraining
from sidestack.ranker.contents import content_kinds
from sidestack.ranker.contents.contract import entity_at
from sidestack.ranker.export_config import RankerExportConfig
from sidestack.ranker.score_config import ScoreConfig

WITHOUT_BASELINE = "baseline.enabled=false"
"""Override for runs that compare only the arms with each other."""

Trained = TypeVar("Trained", EncoderConfig, RankerConfig)


class PipelineConfig(Config):
    """Every section of a run's file; the driver validates them all before it launches anything."""

    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    encoders: dict[str, dict[str, Any]] = {}
    """Further encoders, by the name of the SIDs they produce (`text_sid` produces columns `item_text_sid`): the
    settings that differ from `encoder`. Signals and quantizer are replaced as a whole, other settings one by one."""
    materialize: MaterializeConfig = Field(default_factory=MaterializeConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    """Settings of `encoder.export`, which is not a stage of the pipeline; run it for serving."""
    ranker: RankerConfig = Field(default_factory=RankerConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    """Settings of `ranker.score`, which writes a ranker's probabilities."""
    ranker_export: RankerExportConfig = Field(default_factory=RankerExportConfig)
    """Settings of `ranker.export`, which exports a ranker for serving."""
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)
    tune: TuneConfig = Field(default_factory=TuneConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    tables: dict[str, TableConfig] = {}
    """The papers' tables by name, for `pipelines.studies.tables`."""
    drift: DriftConfig = Field(default_factory=DriftConfig)
    """Settings of `pipelines.drift`, which compares a cycle's data, encoders and SIDs with the previous cycle's."""
    retrain: RetrainConfig = Field(default_factory=RetrainConfig)
    """Settings of `pipelines.retrain`."""
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
        """Check that the seed of the last replicate (seed + replicate) is in the range of every generator."""
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
        """Check early what the stages check again when they begin, hours later."""
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
        """Check prefix lengths, which materialize would reject hours later; a given encoder has its own digits."""
        lengths = self.materialize.prefix_lengths.get(name, ())
        if not lengths or name in self.run.encoders:
            return
        quantizer = self.encoder_of(name).quantizer
        with torch.device("meta"):  # shapes only, no memory
            digits = quantizer.build().digits
        if not prefixes_fit(lengths, digits):
            section = "encoder" if name == DEFAULT_NAME else f"encoders.{name}"
            raise ValueError(
                f"materialize.prefix_lengths.{name}: {list(lengths)} must rise within 1..{digits}, the digits of"
                f" {section}.quantizer ({quantizer.kind})"
            )

    def _check_sids(self, arm: str) -> None:
        """Check that encoders produce an arm's sets of SIDs, for the entity (item or user) that each position needs."""
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
        """Return the configuration of an encoder in one replicate.

        Args:
            name: one of `sid_names`. replicate: added to its seed.

        Raises:
            ConfigError: its own settings are invalid on top of `encoder`.
        """
        values, where = plain(self.encoder), f"encoders.{name}"
        for key, value in self.encoders.get(name, {}).items():
            is_section = key in ("network", "training", "search") and isinstance(value, dict)
            values[key] = {**values[key], **value} if is_section else value
        return _seeded(parse(EncoderConfig, values, where), replicate)

    def ranker_of(self, arm: str, replicate: int = 0) -> RankerConfig:
        """Return the configuration of one arm in one replicate; the replicate's number is added to the seed."""
        return _seeded(self.ranker.resolved(arm), replicate)

    def baseline_of(self, replicate: int = 0) -> BaselineConfig:
        """Return the baseline's configuration in one replicate: on the arms' dates, its seed plus the replicate."""
        changes = {"holdout": self.ranker.holdout, "seed": self.baseline.seed + replicate}
        return self.baseline.model_copy(update=changes)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms to train, in training order."""
        return tuple(self.ranker.arms) if self.run.arms is None else self.run.arms


def _check_lanes_of(section: str, training: EncoderTraining | RankerTraining, launch: LaunchConfig) -> None:
    """Check that lanes divide the batch size, if it is set, and that ranks divide the lanes."""
    with _named(f"{section}.training."):
        require_lanes(training.batch_size or training.lanes, training.lanes, launch.nodes * launch.ranks)


@contextmanager
def _named(prefix: str) -> Iterator[None]:
    """Prefix the setting that an error names with its section."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(f"{prefix}{error}") from None


def _seeded(config: Trained, replicate: int) -> Trained:
    training = config.training.model_copy(update={"seed": config.training.seed + replicate})
    return config.model_copy(update={"training": training})


def read_config(config_file: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], PipelineConfig]:
    """Read a run file and apply dotted overrides; return the raw values and the parsed configuration.

    Raises:
        ConfigError: the file, an override or a value is invalid.
    """
    values = load_file(config_file, overrides)
    return values, parse(PipelineConfig, values, config_file.name)
