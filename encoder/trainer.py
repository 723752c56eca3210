"""The encoder's training loop: steps, codebook starts and revivals, evaluation and checkpoints, in execution order."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sidestack.encoder.budget import DecidedTraining
from sidestack.encoder.bundle import codebook_digest, network_digest
from sidestack.encoder.config import EncoderConfig, TrainingConfig
from sidestack.encoder.evaluation import as_metrics, evaluate
from sidestack.encoder.fusion import Losses, VQFusion
from sidestack.encoder.holdout import held_out
from sidestack.encoder.nonfinite import diagnosis, finite_or_zero
from sidestack.encoder.signals import SignalBatch, signal_batch
from sidestack.encoder.training_state import (
    load_optimizer_state,
    load_random_state,
    load_schedule_state,
    optimizer_state,
    part,
    prefixed,
    random_state,
    schedule_state,
    seed_rank,
)
from sidestack.encoder.window import CollapseWatch, Window
from sidestack.infra.checkpoint import Checkpoint
from sidestack.infra.distributed import World, gather, lockstep, require_same, sum_over_ranks
from sidestack.infra.errors import DataError, PreemptedError
from sidestack.infra.gradients import average_gradients
from sidestack.infra.lane import Batch
from sidestack.infra.lanes import LaneReader
from sidestack.infra.learning_curve import is_point, point_every
from sidestack.infra.prefetch import prefetched
from sidestack.infra.revisions import Revisions
from sidestack.infra.stage import StageRun

_SAMPLE_ROWS = 8192
_CHECKPOINTS_KEPT = 2
"""If the last checkpoint was altered, the training resumes from the one before."""


class TrainingRows(NamedTuple):
    """This rank's part of a global batch; held-out items, and rows that a later part revises, are left out.

    Attributes:
        signals: of B rows. rows_B: their global row numbers.
    """

    signals: SignalBatch
    rows_B: npt.NDArray[np.int64]


class Trainer:
    """The training loop and its state."""

    def __init__(
        self,
        model: VQFusion,
        training: DecidedTraining,
        reader: LaneReader,
        revisions: Revisions,
        holdout: SignalBatch,
        run: StageRun[EncoderConfig],
    ) -> None:
        self.model = model
        self.reader = reader
        self.revisions = revisions
        self.holdout = holdout
        self.log = run.log
        self.world = run.world
        self.checkpoints = run.checkpoints
        self.profile = run.profile
        self.config = training
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.num_steps = self.config.epochs * reader.num_batches
        self.point_every = point_every(self.num_steps, self.config.log_every)
        self.is_refresh = model.quantizer.is_frozen
        shares = () if self.is_refresh else self.config.codebook_starts
        self.starts = {int(share * self.num_steps) for share in shares}
        self.optimizer = _optimizer(model, self.config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        spec = model.quantizer.sid_spec("")
        self.window = Window(model.signals.names, spec, run.world)
        self.collapse = CollapseWatch(self.config, spec, after=max(self.starts, default=0))
        model.quantizer.register_forward_pre_hook(self._guard_latents)
        self.step = 0
        self.resumed_from: int | None = None
        self.revived = 0
        self.waited = 0.0
        self.started = time.monotonic()
        self.sample: list[SignalBatch] = []
        self.measured: dict[str, Any] = {}

    def resume(self) -> None:
        """Resume from the last checkpoint, if there is one.

        Raises:
            CommitError: the checkpoint is of other work.
        """
        if self.checkpoints is None:
            return
        self.checkpoints.keeps = _CHECKPOINTS_KEPT
        checkpoint = self.checkpoints.load()
        if checkpoint is None:
            return
        self._restore(checkpoint)
        differs = "last bits" if checkpoint.own else "random draws and last bits"
        self.log.info(checkpoint.resume_message("encoder", self.step, self.num_steps, differs))

    def run(self, advance: Callable[[int], None]) -> None:
        """Run the remaining steps, and evaluate on the held-out items after each epoch."""
        self._require_same_state()
        advance(self.step)
        self.model.train()
        left = self._rows_left()
        if self.step == 0 and not self.is_refresh:
            self._start_linear()
        for rows in left:
            if self.step in self.starts:
                self._start_codebook()
            self.world.state.move(f"step {self.step}")
            self._take_step(rows)
            self._after_step(rows)
            advance(1)
            self.profile.step()
            self._stop_if_agreed()
        self.profile.close()
        if self.checkpoints is not None:
            self.checkpoints.finish()

    def summary(self) -> dict[str, Any]:
        """Return the summary: held-out metrics, sizes and speed."""
        seconds = time.monotonic() - self.started
        waited = sum(gather(self.world, self.waited)) / self.world.size
        return {
            "items": self.reader.num_rows,
            "steps": self.step,
            "resumed_from_step": self.resumed_from,
            "seconds": seconds,
            "items_per_second": self.step * self.config.batch_size / seconds,
            "data_wait_share": waited / seconds,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "revived_lines": self.revived,
            "collapsed_digits": sorted(self.collapse.collapsed),
            "codebook_sha256": codebook_digest(self.model),
            "holdout": self.measured,
        }

    def closing_line(self) -> str:
        """Return the summary as one log line."""
        losses = ", ".join(f"{name} {m['loss']:.4f}" for name, m in self.measured["signals"].items())
        return f"encoder: held-out {losses}; unique SIDs {self.measured['unique_share']:.1%}"

    def _rows_left(self) -> Iterator[TrainingRows]:
        """Return the rows of the remaining steps."""
        epoch, start = divmod(self.step, self.reader.num_batches)
        rows = self._training_rows(range(epoch, self.config.epochs), start)
        if self.step > 0 or self.is_refresh:
            return rows
        first = list(itertools.islice(rows, self._sample_batches))  # kept, so that they are not read twice
        self.sample = [each.signals for each in first]
        return itertools.chain(first, rows)

    @property
    def _sample_batches(self) -> int:
        """The number of batches that hold the sample; equal on every rank, because the ranks read in lockstep."""
        return min(-(-_SAMPLE_ROWS // self.config.batch_size), self.reader.num_batches)

    def _training_rows(self, epochs: range, start: int = 0) -> Iterator[TrainingRows]:
        # Prefetched and converted to tensors in the reader's thread, so that the loop waits for neither.
        ahead = prefetched(map(self._select_rows, self.reader.batches(epochs, start)), depth=3)
        for rows in lockstep(self.world, self._timed(ahead), "reading items"):
            yield rows._replace(signals=rows.signals.to(self.world.device))

    def _select_rows(self, batch: Batch) -> TrainingRows:
        ids_N = batch.table[self.model.signals.id_column].to_numpy()
        kept_N = ~held_out(ids_N, self.config.holdout_share) & self.revisions.are_newest(ids_N, batch.rows_N)
        return TrainingRows(signal_batch(batch.table.filter(kept_N), self.model.signals), batch.rows_N[kept_N])

    def _timed(self, source: Iterator[TrainingRows]) -> Iterator[TrainingRows]:
        """Measure the time that this rank waits for its own data (not for other ranks) after its first rows."""
        rows = next(source, None)
        while rows is not None:
            yield rows
            asked = time.monotonic()
            rows = next(source, None)
            waited = time.monotonic() - asked
            self.waited += waited
            self.window.waited += waited

    def _take_step(self, rows: TrainingRows) -> None:
        with self._autocast():
            losses: Losses = self.model(rows.signals, self.config.batch_size // self.world.size)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.total)
        average_gradients(self.world, self.model.parameters())
        norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        self._require_finite(losses.total, norm, rows)  # before clipping, which would spread a NaN to all gradients
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
        self.optimizer.step()
        self.schedule.step()
        if not self.is_refresh:
            self.model.quantizer.after_step(self.world)
        self.step += 1
        self.window.add(losses, norm)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _guard_latents(self, quantizer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        # A non-finite vector has no digits, and on a GPU a digit out of range aborts the process. So the vector is
        # zeroed here, and `_require_finite` then refuses the step on every rank.
        (h_BH,) = inputs
        self.latents_are_finite = torch.isfinite(h_BH.detach()).all()
        return finite_or_zero(h_BH)

    def _require_finite(self, loss: Tensor, norm: Tensor, rows: TrainingRows) -> None:
        """Raise on every rank if any rank's loss or gradient is not finite."""
        own = torch.isfinite(loss.detach()) & self.latents_are_finite
        if not sum_over_ranks(self.world, (~(own & torch.isfinite(norm))).int()).item():
            return
        finite = gather(self.world, bool(own))
        report = None
        if not finite[self.world.rank] or all(finite):  # if all losses are finite, a gradient is not
            with self._autocast():
                groups = self.reader.groups_of(rows.rows_B)
                report = f"rank {self.world.rank}: {diagnosis(self.model, rows.signals, rows.rows_B, groups)}"
        reports = [text for text in gather(self.world, report) if text]
        raise DataError(f"encoder: step {self.step}: loss or gradient is not finite; " + "; ".join(reports))

    def _after_step(self, rows: TrainingRows) -> None:
        """Run what is due after this step; the checkpoint comes last, so that it includes the rest."""
        if self.model.quantizer.revives and not self.is_refresh and self.step % self.config.revive_every == 0:
            self._revive(rows.signals)
        if is_point(self.step, self.point_every, self.num_steps):
            self._record()
        if self.step % self.reader.num_batches == 0:
            self._measure()
        if self.checkpoints is not None:
            self.checkpoints.keep(self.step, self.config.checkpoint_every, self.num_steps, self._checkpoint)

    def _stop_if_agreed(self) -> None:
        """Save this step and stop the training on all ranks, if any rank was asked to stop."""
        if self.step == self.num_steps:
            return  # the rest takes seconds
        try:
            self.world.state.stop_if_agreed()
        except PreemptedError as stop:
            if self.checkpoints is None or not self.config.checkpoint_every:
                raise
            self._require_same_state()  # not noted: the history stays that of an uninterrupted training
            self.checkpoints.save_before_stop(self._state())
            raise PreemptedError(stop.signal, self.step) from stop

    def _record(self) -> None:
        first_step = self.step - self.window.steps
        metrics, use_N = self.window.close(self.config.batch_size)
        self.log.metrics(self.step, {**metrics, "train/learning_rate": float(self.schedule.get_last_lr()[0])})
        for warning in self.collapse.check(first_step, self.step, use_N):
            self.log.warn(warning)

    def _measure(self) -> None:
        self.model.eval()
        self.measured = evaluate(self.model, self.holdout, self.world)
        self.model.train()
        self.log.metrics(self.step, as_metrics(self.measured))
        self._log_state_digest("epoch")

    @torch.no_grad()
    def _start_linear(self) -> None:
        """Set the networks' linear paths from the embeddings of the first training rows."""
        if not self.model.signals.embeddings:
            return
        x_BD = torch.cat([self.model.weighted_units(batch) for batch in self.sample])
        self.model.start_linear(self._common_rows(x_BD, "embeddings"))

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Set the codebook from the latent vectors of the first training rows."""
        if not self.sample:  # resumed from a checkpoint
            self.sample = [
                rows.signals for rows in itertools.islice(self._training_rows(range(1)), self._sample_batches)
            ]
        h_BH = torch.cat([self.model.encoder(batch) for batch in self.sample])
        self.model.quantizer.start(self._common_rows(h_BH, "latent vectors"), self.generator)
        self._log_state_digest("start")

    def _common_rows(self, x_BH: Tensor, what: str) -> Tensor:
        sample_NH = common_sample(self.world, x_BH, _SAMPLE_ROWS)
        if not torch.isfinite(sample_NH).all():  # the same sample, hence the same decision, on every rank
            raise DataError(f"encoder: step {self.step}: {what} are not finite: the training has diverged")
        return sample_NH

    @torch.no_grad()
    def _revive(self, batch: SignalBatch) -> None:
        sample_NH = self._common_rows(self.model.encoder(batch), "latent vectors")
        self.revived += self.model.quantizer.revive(sample_NH, self.generator)
        self._log_state_digest("revival")

    def _log_state_digest(self, after: str) -> None:
        self._require_same_state()
        self.log.note(self.step, {"codebook_sha256": codebook_digest(self.model), "after": after})

    def _require_same_state(self) -> None:
        """Check that all ranks have the same codebook and networks."""
        where = f"encoder: step {self.step}: the SHA-256 of the"
        require_same(self.world, codebook_digest(self.model), f"{where} codebook")
        require_same(self.world, network_digest(self.model), f"{where} networks")

    def _rate(self, step: int) -> float:
        warmup = max(int(self.config.warmup_share * self.num_steps), 1)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.num_steps - warmup, 1)))

    def _checkpoint(self) -> Checkpoint:
        """Return the checkpoint of a step at which one is due."""
        self._log_state_digest("checkpoint")
        return self._state()

    def _state(self) -> Checkpoint:
        """Return the state that the rest of the training depends on; the step is also the position in the data."""
        shared = prefixed("model", self.model.state_dict()) | prefixed("optimizer", optimizer_state(self.optimizer))
        shared["generator"] = self.generator.get_state()
        own = prefixed("random", random_state(self.world.device)) | prefixed("window", self.window.state())
        values = {
            "schedule": schedule_state(self.schedule),
            "revived": self.revived,
            "collapsed": sorted(self.collapse.collapsed),
            "seconds": time.monotonic() - self.started,
            "waited": self.waited,
            "history": self.log.history(),
        }
        return Checkpoint(self.step, shared, own, values)

    def _restore(self, checkpoint: Checkpoint) -> None:
        shared, own, values = checkpoint.shared, checkpoint.own, checkpoint.values
        self.model.load_state_dict(part("model", shared))
        load_optimizer_state(self.optimizer, part("optimizer", shared))
        load_schedule_state(self.schedule, values["schedule"])
        self.generator.set_state(shared["generator"])
        self.step = self.resumed_from = checkpoint.step
        if own:
            load_random_state(part("random", own), self.world.device)
            self.window.load_state(part("window", own))
        else:  # saved by other ranks: the window starts empty; the draws differ from those at the training's start
            seed_rank(self.config.seed + self.step, self.world)
        self.revived = values["revived"]
        self.collapse.collapsed = set(values["collapsed"])
        self.started = time.monotonic() - values["seconds"]
        self.waited = values["waited"]  # rank 0's; the mean over ranks is reported
        self.log.resume(values["history"])


def common_sample(world: World, h_BH: Tensor, rows: int) -> Tensor:
    """Return the same sample of all ranks' latent vectors on every rank.

    Args:
        world: the process group.
        h_BH: this rank's vectors.
        rows: the maximum number of rows in the sample, over all ranks.

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
