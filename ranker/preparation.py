"""What a training of one arm needs before its model is built: splits, decided settings, admitted ids, constants."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sidestack.infra.distributed import raise_on_all_ranks
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import StageRun
from sidestack.ranker.admission import Turnover
from sidestack.ranker.budget import Day, DecidedConfig, decide, training_days
from sidestack.ranker.bundle import FOLDER as MODEL
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.constants import ModelConstants, read_constants
from sidestack.ranker.cost import expected_traffic
from sidestack.ranker.features import ArmFeatures, arm_features, dataset_sids
from sidestack.ranker.id_counts import admit_ids
from sidestack.ranker.planner import Traffic
from sidestack.ranker.reader import Split, content_read
from sidestack.ranker.row_maps import with_row_maps
from sidestack.ranker.scaling import dense_moments
from sidestack.ranker.warm_start import WarmStart, open_start


@dataclass(frozen=True)
class OpenedInputs:
    """The opened inputs of a stage.

    Attributes:
        fitting: the rows to train on. held_out: those to measure on. days: the training dates.
        start: the earlier ranker of a warm start; None: initial weights.
        config: with every rule decided.
    """

    dataset: Dataset
    fitting: Split
    held_out: Split
    days: list[Day]
    start: WarmStart | None
    config: DecidedConfig


@dataclass(frozen=True)
class PreparedTraining(OpenedInputs):
    """The opened inputs, with what the model's construction needs.

    Attributes:
        constants: what content needs. traffic: what the planner expects of a batch.
        turnover: the ids that gained or lost a row, by column with admission.
    """

    constants: ModelConstants
    traffic: Traffic
    turnover: Mapping[str, Turnover]

    @property
    def features(self) -> ArmFeatures:
        """What the arm reads."""
        return self.fitting.features


def open_inputs(run: StageRun[RankerConfig]) -> OpenedInputs:
    """Open the dataset and the earlier ranker, and return them with the arm's splits and decided configuration.

    Raises:
        ConfigError, SpecError, DataError: see `ranker.train.train`.
    """
    dataset = read_dataset(run.inputs["dataset"])
    fitting, held_out = open_splits(dataset, run.config)
    start = None
    if "start" in run.inputs:
        start = open_start(run.inputs["start"], run.config, dataset.spec, fitting.features)
        features = start.features(fitting.features)
        fitting, held_out = (replace(split, features=features) for split in (fitting, held_out))
    days = training_days(dataset, *(span.dates for span in fitting.spans))
    return OpenedInputs(dataset, fitting, held_out, days, start, decide(run.config, days))


def open_splits(dataset: Dataset, config: RankerConfig) -> tuple[Split, Split]:
    """Return the arm's training and held-out splits of the dataset.

    Raises:
        SpecError: the arm's SIDs are missing. DataError: a split has no events. ConfigError: a task is unknown.
    """
    holdout = config.holdout
    holdout.require_tasks(dataset.spec.tasks)
    features = arm_features(dataset.spec, config, dataset_sids(dataset))
    dates, held_out_dates = holdout.windows(dataset.spec)
    fitting = Split(dates, dataset, features, holdout.learned_labels, config.model.history.max_length)
    held_out = Split(held_out_dates, dataset, features, holdout.measured_labels)
    for split in (fitting, held_out):
        split.rows()
    return fitting, held_out


def prepare_training(run: StageRun[RankerConfig]) -> PreparedTraining:
    """Open and verify the inputs, admit ids, and read what the model needs; every rank must call.

    Raises:
        ConfigError, SpecError, DataError, CommitError: see `ranker.train.train`.
    """
    world, ids = run.world, run.out / MODEL
    with raise_on_all_ranks(world, "opening the dataset"):
        opened = open_inputs(run)
    dataset, fitting, held_out, start = opened.dataset, opened.fitting, opened.held_out, opened.start
    content = content_read(dataset, fitting.features)
    dataset.verify(world, [*content, *fitting.partitions, *held_out.partitions])
    earlier = None if start is None else start.bundle.path
    turnover = admit_ids(ids, fitting, opened.config.model.admission, earlier, world)
    with raise_on_all_ranks(world, "reading the rows of ids"):
        features = with_row_maps(fitting.features, ids)
    fitting, held_out = (replace(split, features=features) for split in (fitting, held_out))
    with raise_on_all_ranks(world, "reading what content needs"):
        constants = read_constants(dataset, features.constants)
        traffic = expected_traffic(dataset, fitting.dates, opened.config.training)
    if start is None:
        constants = replace(constants, dense_2F=dense_moments(fitting, world))
    return PreparedTraining(dataset, fitting, held_out, opened.days, start, opened.config, constants, traffic, turnover)
