"""One arm of the ranker in training, for benchmarks: a few steps at a time, and the time of each part of a step."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import count, cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding, BatchedFusedEmbeddingBag
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from sidestack.infra.distributed import World
from sidestack.infra.lanes import LaneReader
from sidestack.infra.snapshot import Dataset
from sidestack.ranker.budget import DecidedConfig, DecidedTraining
from sidestack.ranker.config import ArmConfig, ModelConfig, RankerConfig
from sidestack.ranker.constants import read_constants
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.reader import Split, to_ranker_batch
from sidestack.ranker.sharding import ShardedRanker, build_sharded
from sidestack.ranker.step_runner import StepRunner

ARMS = {
    name: arm.model_copy(update={"max_rows": 2**18})
    for name, arm in {**RankerConfig().arms, "hde": ArmConfig(item="hde", history="hde")}.items()
}
"""The arms of the default contest and of the second paper; their tables and batches have fixed sizes."""
TRAINING = DecidedTraining(epochs=1, batch_size=1024, validation_days=0)


DEFAULT_MODEL = ModelConfig()


def config_of(arm: str, model: ModelConfig = DEFAULT_MODEL) -> DecidedConfig:
    """Return an arm's configuration, with defaults for all else."""
    return DecidedConfig(arm=arm, arms=ARMS, model=model, training=TRAINING).resolved()


def training_split(dataset: Dataset, arm: str) -> Split:
    """Lay out an arm over the training events."""
    return open_splits(dataset, config_of(arm))[0]


class Trial:
    """An arm that trains on its events, read from disk by the ranker's own reader, epoch after epoch.

    Args of the constructor:
        dataset: the events. arm: its name in `ARMS`. world: the process group.
        way: the variant of `StepRunner` that passes batches through the pipeline. model: the network's sizes.
        rows_per_request: number of rows of a request that stay together; by default all.
        batch_size: rows of a global batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        arm: str,
        world: World,
        way: type[StepRunner] = StepRunner,
        model: ModelConfig = DEFAULT_MODEL,
        rows_per_request: int | None = None,
        batch_size: int = TRAINING.batch_size,
    ) -> None:
        config, split = config_of(arm, model), training_split(dataset, arm)
        changes = {"rows_per_request": rows_per_request, "batch_size": batch_size}
        training = config.training.model_copy(update=changes)
        self.dataset, self.config, self.features = dataset, config, split.features
        self.sharded = build_sharded(split.features, config, world, read_constants(dataset, split.features.constants))
        self.sharded.model.train()
        self.runner = way(self.sharded, split.features, world, NewestEntries())
        self.pipeline = self.runner.pipeline
        self.reader = split.open(training, world, is_training=True)
        self._outputs: Generator[Any, None, None] = self._endless(self.reader)

    def steps(self, number: int) -> None:
        """Take `number` steps."""
        deque(islice(self._outputs, number), maxlen=0)

    def hold(self, number: int) -> None:
        """From now on, train repeatedly on `number` batches in memory instead of reading."""
        self._outputs.close()
        held = [to_ranker_batch(batch, self.features) for batch in islice(self.reader.epoch(0), number)]
        self._outputs = self._held(self.runner.in_lockstep(cycle(held)))

    def close(self) -> None:
        """Stop the prefetching threads."""
        self._outputs.close()

    def _held(self, source: Iterator[Any]) -> Generator[Any, None, None]:
        while True:
            yield self.pipeline.progress(source)

    def _endless(self, reader: LaneReader) -> Generator[Any, None, None]:
        for epoch in count():
            yield from self.runner.run(reader, epoch)


def progress(pipeline: TrainPipelineSparseDist[Any, Any], source: Iterator[Any], steps: int) -> None:
    """Take `steps` steps of a pipeline, on batches in memory."""
    for _ in range(steps):
        pipeline.progress(source)


def kernels(sharded: ShardedRanker) -> Iterator[BatchedFusedEmbedding | BatchedFusedEmbeddingBag]:
    """Yield the kernels that hold and look up this rank's tables; torchrec keeps them out of a model's modules."""
    for lookup in (lookup for collection in sharded.model.module.collections for lookup in collection._lookups):
        for module in lookup.modules():
            if isinstance(module, BatchedFusedEmbedding | BatchedFusedEmbeddingBag):
                yield module


PARTS = (
    "waiting for data", "forward: lookups", "forward: dense part", "loss", "backward: dense part",
    "backward: tables and their optimizer", "gradient averaging", "dense optimizer", "everything else",
)  # fmt: skip


class StepParts:
    """Timers on the parts of a trial's step, for CPUs, where a call returns when its work is done.

    The tables' optimizer runs inside their backward pass. "everything else" is the remainder of the step: distributing
    ids, the pipeline itself, zeroing gradients, reporting to the other ranks that reading succeeded.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._began: dict[str, float] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        sharded, pipeline = trial.sharded, trial.pipeline
        ranker = sharded.model.module
        for module, part in (
            *((collection, "forward: lookups") for collection in ranker.collections),
            (ranker.body, "forward: dense part"),
            (ranker.loss, "loss"),
        ):
            module.register_forward_pre_hook(lambda *_, part=part: self._start(part))
            module.register_forward_hook(lambda *_, part=part: self._stop(part))
        for kernel in kernels(sharded):
            kernel.emb_module.register_forward_hook(self._clock_backward)
        pipeline._backward = self._clocked("backward", pipeline._backward)
        self._clock_optimizer(sharded)

    def milliseconds(self, steps: int) -> Mapping[str, float]:
        """Take `steps` steps and return the time per step of each of `PARTS`, and of "step", the whole."""
        self._seconds.clear()
        began, waited = time.perf_counter(), self.trial.runner.waited
        self.trial.steps(steps)
        step = time.perf_counter() - began
        found = self._seconds
        found["waiting for data"] = self.trial.runner.waited - waited
        found["backward: dense part"] = found.pop("backward") - found["backward: tables and their optimizer"]
        found["everything else"] = step - sum(found.values())
        return {part: found[part] * 1e3 / steps for part in PARTS} | {"step": step * 1e3 / steps}

    def _start(self, part: str) -> None:
        self._began[part] = time.perf_counter()

    def _stop(self, part: str) -> None:
        self._seconds[part] += time.perf_counter() - self._began[part]

    def _clocked(self, part: str, call: Callable[..., None]) -> Callable[..., None]:
        def clocked(*args: Any, **kwargs: Any) -> None:
            self._start(part)
            call(*args, **kwargs)
            self._stop(part)

        return clocked

    def _clock_backward(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        node = output.grad_fn
        if node is not None:
            part = "backward: tables and their optimizer"
            node.register_prehook(lambda *_: self._start(part))
            node.register_hook(lambda *_: self._stop(part))

    def _clock_optimizer(self, sharded: ShardedRanker) -> None:
        """Time Adam, and the averaging of gradients, which is the first of the hooks before it."""
        dense = sharded.dense_optimizer
        adam: torch.optim.Optimizer = dense._optimizer
        step = dense.step

        def stepped(*args: Any, **kwargs: Any) -> None:
            self._start("gradient averaging")
            step(*args, **kwargs)
            self._stop("dense optimizer")

        def averaged(*_: Any) -> None:
            self._stop("gradient averaging")
            self._start("dense optimizer")

        adam.register_step_pre_hook(averaged)
        dense.step = stepped
