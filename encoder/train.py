"""Stage `encoder`: train the VQ-fusion auto-encoder on the items table, on any number of ranks.

Read from the top: `train` is the stage; the rest are its parts in the order they run.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from encoder.bundle import save_bundle
from encoder.config import EncoderConfig, TrainingConfig
from encoder.evaluation import evaluate
from encoder.fusion import Losses, VQFusion
from encoder.holdout import collect_held_out, held_out
from encoder.quantizers import StructuredConfig
from encoder.signals import SignalBatch, SignalSpec, chosen_signals, signal_batch, signal_check
from infra.distributed import World, gather, lockstep, sum_over_ranks, together
from infra.errors import ConfigError, DataError
from infra.parquet import Batch, LaneReader, RowGroup
from infra.stage import StageRun, run_stage
from infra.tables import Dataset, read_dataset

_SAMPLE_ROWS = 8192


def train(run: StageRun[EncoderConfig]) -> None:
    """Train, measure on held-out items, and leave the encoder bundle in `run.out`.

    Raises:
        ConfigError, DataError: a setting or a row breaks a rule, or the loss stops being finite.
    """
    config, world = run.config, run.world
    with together(world, "opening the dataset"):
        dataset = read_dataset(run.inputs["dataset"])
        signals = chosen_signals(config.signals, dataset.spec)
        reader = item_reader(dataset, signals, config.training, world, shuffled=True)
    torch.manual_seed(config.training.seed)  # the same initial weights on every rank
    model = VQFusion(config, signals).to(world.device)
    holdout = _holdout(dataset, signals, config.training, world)
    trainer = Trainer(model, reader, holdout, run)
    with run.log.progress(trainer.num_steps, "encoder: steps") as advance:
        for epoch in range(config.training.epochs):
            trainer.run_epoch(epoch, advance)
    run.log.summary(trainer.summary())
    with together(world, "writing the encoder bundle"):
        if world.is_main:
            run.facts["fingerprint"] = save_bundle(run.out, model, config).fingerprint
    run.log.say(trainer.closing_words())


def item_reader(
    dataset: Dataset, signals: SignalSpec, training: TrainingConfig, world: World, *, shuffled: bool
) -> LaneReader:
    """Give a reader of the items' signals, shuffled without a last partial batch, or in order."""
    return LaneReader(
        dataset.item_files,
        signals.columns,
        batch_size=training.batch_size,
        lanes=training.lanes,
        rank=world.rank,
        world_size=world.size,
        seed=training.seed if shuffled else None,
        check=signal_check(dataset.spec),
    )


def _holdout(dataset: Dataset, signals: SignalSpec, training: TrainingConfig, world: World) -> SignalBatch:
    with together(world, "reading the held-out items"):
        reader = item_reader(dataset, signals, training, world, shuffled=False)
        rows = training.holdout_rows // world.size
        holdout = collect_held_out(reader, signals, training.holdout_share, rows)
    if not sum(gather(world, len(holdout))):
        raise ConfigError(
            f"encoder.training.holdout_share={training.holdout_share}: holds out none of the"
            f" {dataset.spec.num_items} items"
        )
    return holdout.to(world.device)


class Trainer:
    """The training loop and what it has to remember."""

    def __init__(self, model: VQFusion, reader: LaneReader, holdout: SignalBatch, run: StageRun[EncoderConfig]) -> None:
        self.model = model
        self.reader = reader
        self.holdout = holdout
        self.log = run.log
        self.world = run.world
        self.config = run.config.training
        self.revives = isinstance(run.config.quantizer, StructuredConfig) and run.config.quantizer.lines > 1
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.num_steps = self.config.epochs * reader.num_batches
        self.starts = {int(share * self.num_steps) for share in self.config.codebook_starts}
        self.optimizer = _optimizer(model, self.config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.replicas = _replicated(model, run.world)
        self.step = 0
        self.revived = 0
        self.started = time.monotonic()
        self.window = _Window(len(model.signals.names), run.world)
        self.sample: list[SignalBatch] = []
        self.measured: dict[str, Any] = {}

    def run_epoch(self, epoch: int, advance: Callable[[int], None]) -> None:
        """Train one epoch and measure on the held-out items."""
        self.model.train()
        for source, batch in self._training_batches(epoch):
            if self.step in self.starts:
                self._start_codebook()
            self._take_step(source, batch)
            if self.revives and self.step % self.config.revive_every == 0:
                self._revive(batch)
            if self.step % self.config.log_every == 0:
                self.log.metrics(self.step, self._training_metrics())
            advance(1)
        self.model.eval()
        self.measured = evaluate(self.model, self.holdout, self.world)
        self.log.metrics(self.step, _flat(self.measured))

    def summary(self) -> dict[str, Any]:
        """Give the closing numbers: held-out measures, sizes and speed."""
        seconds = time.monotonic() - self.started
        return {
            "items": self.reader.num_rows,
            "steps": self.step,
            "seconds": seconds,
            "items_per_second": self.step * self.config.batch_size / seconds,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "revived_lines": self.revived,
            "holdout": self.measured,
        }

    def closing_words(self) -> str:
        """Give one line for people."""
        losses = ", ".join(f"{name} {m['loss']:.4f}" for name, m in self.measured["signals"].items())
        return f"encoder: held-out {losses}; unique SIDs {self.measured['unique_share']:.1%}"

    def _training_batches(self, epoch: int) -> Iterator[tuple[Batch, SignalBatch]]:
        for batch in lockstep(self.world, self.reader.epoch(epoch), "reading items"):
            ids_N = batch.table["item_id"].to_numpy()
            kept = batch.table.filter(~held_out(ids_N, self.config.holdout_share))
            yield batch, signal_batch(kept, self.model.signals).to(self.world.device)

    def _take_step(self, source: Batch, batch: SignalBatch) -> None:
        losses: Losses = self.replicas(batch, self.config.batch_size // self.world.size)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._require_finite(losses.total, norm, source)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.window.add(losses, norm)

    def _require_finite(self, loss: Tensor, norm: Tensor, source: Batch) -> None:
        """Refuse to step on a loss or gradient that is not finite, on every rank at once."""
        bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm))
        if not sum_over_ranks(self.world, bad.int()).item():
            return
        value = float(loss.detach())
        report = None if math.isfinite(value) else f"rank {self.world.rank}: loss {value} on {self._origin(source)}"
        reports = [text for text in gather(self.world, report) if text] or ["finite losses, but gradient is not"]
        raise DataError(f"encoder: step {self.step}: loss or gradient is not finite; " + "; ".join(reports))

    def _origin(self, source: Batch) -> str:
        low, high = int(source.rows_N.min()), int(source.rows_N.max())
        touched = [group for group in self.reader.groups if _meets(group, source)]
        return f"rows {low} to {high}: " + ", ".join(map(str, touched))

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Set the codebook from the latent vectors of the first training rows."""
        if not self.sample:  # as many batches on every rank, for the ranks read in step
            batches = -(-_SAMPLE_ROWS // self.config.batch_size)
            self.sample = [batch for _, batch in itertools.islice(self._training_batches(epoch=0), batches)]
        h_BH = torch.cat([self.model.encoder(batch) for batch in self.sample])
        sample_NH = common_sample(self.world, h_BH, _SAMPLE_ROWS)
        if not torch.isfinite(sample_NH).all():  # the same sample, hence the same decision, on every rank
            raise DataError(f"encoder: step {self.step}: latent vectors are not finite: the training has diverged")
        self.model.quantizer.start(sample_NH, self.generator)

    @torch.no_grad()
    def _revive(self, batch: SignalBatch) -> None:
        sample_NH = common_sample(self.world, self.model.encoder(batch), _SAMPLE_ROWS)
        self.revived += self.model.quantizer.revive(sample_NH, self.generator)

    def _rate(self, step: int) -> float:
        warmup = max(int(self.config.warmup_share * self.num_steps), 1)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.num_steps - warmup, 1)))

    def _training_metrics(self) -> dict[str, float]:
        metrics = self.window.means(self.model.signals.names, self.config.batch_size)
        return {**metrics, "train/learning_rate": float(self.schedule.get_last_lr()[0])}


class _Window:
    """Sums of losses since the last record, reduced over ranks only when they are recorded."""

    def __init__(self, num_signals: int, world: World) -> None:
        self.world = world
        self.shape = (2, num_signals)
        self._reset()

    def _reset(self) -> None:
        self.signals = torch.zeros(self.shape, dtype=torch.float64, device=self.world.device)
        self.scalars = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        self.steps = 0
        self.since = time.monotonic()

    def add(self, losses: Losses, norm: Tensor) -> None:
        self.signals += torch.stack([losses.signal_sums, losses.present]).double()
        self.scalars += torch.stack([losses.total.detach(), losses.codebook, losses.commitment, norm]).double()
        self.steps += 1

    def means(self, names: tuple[str, ...], batch_size: int) -> dict[str, float]:
        sums, present = sum_over_ranks(self.world, self.signals).tolist()
        scalars = (sum_over_ranks(self.world, self.scalars) / (self.steps * self.world.size)).tolist()
        metrics = dict(zip(("loss", "codebook", "commitment", "gradient_norm"), scalars, strict=True))
        metrics["items_per_second"] = self.steps * batch_size / (time.monotonic() - self.since)
        for name, total, count in zip(names, sums, present, strict=True):
            metrics[f"{name}/loss"] = total / max(count, 1)
        self._reset()
        return {f"train/{name}": value for name, value in metrics.items()}


def common_sample(world: World, h_BH: Tensor, rows: int) -> Tensor:
    """Give every rank the same sample of all ranks' latent vectors.

    Args:
        world: the process group.
        h_BH: this rank's vectors.
        rows: the most rows of the sample, which bounds it whatever the number of ranks.

    Returns:
        float32 [N, latent_dim], equal on every rank.
    """
    each = min([rows // world.size, *gather(world, len(h_BH))])
    sample = h_BH.new_zeros(world.size, each, h_BH.shape[1])
    sample[world.rank] = h_BH[:each]
    return sum_over_ranks(world, sample).flatten(0, 1)


def _optimizer(model: VQFusion, config: TrainingConfig) -> torch.optim.Optimizer:
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [parameter for parameter in model.parameters() if id(parameter) in linear]
    others = [parameter for parameter in model.parameters() if id(parameter) not in linear]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _replicated(model: VQFusion, world: World) -> nn.Module:
    if world.size == 1:
        return model
    devices = [world.local_rank] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _meets(group: RowGroup, source: Batch) -> bool:
    return bool(((source.rows_N >= group.start) & (source.rows_N < group.start + group.rows)).any())


def _flat(measured: dict[str, Any]) -> dict[str, float]:
    """Give the scalars of an evaluation under the names of the history."""
    metrics = {"holdout/unique_share": measured["unique_share"]}
    for name, values in measured["signals"].items():
        metrics |= {f"holdout/{name}/{what}": value for what, value in values.items()}
    for digit, bits in enumerate(measured["digits"]["entropy_bits"]):
        metrics[f"holdout/entropy_bits/{digit:02d}"] = bits
    dead = measured["digits"]["dead_share"]
    return {**metrics, "holdout/dead_share": sum(dead) / len(dead)}


if __name__ == "__main__":
    run_stage("encoder", "encoder", EncoderConfig, ["dataset"], train)
