"""Checkpoints of a running stage, from which it resumes when it is started again.

They are stored beside the output, in `<out>.checkpoint/`, because the output's own temporary directory is removed after
a failure. They are removed once the output is committed. Each one is a committed directory of its own (`infra.commit`),
so that it is whole or does not count, and holds safetensors and JSON: no pickle is ever loaded.

On the same machine a resumed run writes the same bytes as one that was never stopped. With another number of ranks or
threads, another device or torch version (`MACHINE`), it takes the same steps but its bits may differ:
`Checkpoint.environment_change` lists the changes, and the output's manifest keeps them (`Checkpoints.facts`). A
checkpoint of other work (another config, another input) is refused, not ignored: it may hold hours of work, and a run
that ignored it would overwrite it.

A checkpoint may be written while training continues: `begin` copies its tensors to the host and has a thread write
them; `finish` commits them. Until then the previous checkpoint counts.

A checkpoint holds its stage's resolved section. A later version of the code may have further settings. The section is
then read with their defaults, and must equal the requested one for the checkpoint to count as the same work.
"""

import contextlib
import copy
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sidestack.infra.commit import committing
from sidestack.infra.config import Config, digest, parse_written
from sidestack.infra.distributed import World, broadcast, raise_on_all_ranks
from sidestack.infra.errors import CommitError, ConfigError, StageError
from sidestack.infra.manifest import MANIFEST, Manifest, is_committed, read_manifest, verify
from sidestack.infra.remote.copies import folders, remove_folder
from sidestack.infra.shards import Shard, Shards
from sidestack.infra.state import read_state, write_state
from sidestack.infra.tensors import write_tensors

VALUES_FILE = "values.json"
MACHINE = ("ranks", "device", "torch", "threads")
"""The environment fingerprint: what else than the work decides a run's last bits."""
_SETTINGS = "settings"
_PARTS = "parts"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a stage at one step.

    Attributes:
        step: the number of steps taken.
        shared: tensors that are the same on every rank; rank 0's are kept.
        own: this rank's own tensors; `load` returns none where the number of ranks or the device has changed.
        values: JSON-ready values; rank 0's are kept.
        shards: tensors that are sharded over the ranks. `load` fills the parts this rank holds in place.
        environment_change: the entries of `MACHINE` that have changed, such as `ranks`.
        altered: later checkpoints with altered files, which `load` skipped and removed.
    """

    step: int
    shared: dict[str, Tensor]
    own: dict[str, Tensor]
    values: dict[str, Any]
    shards: Shards = field(default_factory=dict)
    environment_change: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()

    def resume_message(self, stage: str, step: int, num_steps: int, differs: str) -> str:
        """Return the lines to log when a training resumes from this checkpoint.

        Args:
            stage: the stage's name. step, num_steps: the current step and the total.
            differs: what may differ from an uninterrupted training if the environment has changed.
        """
        altered = f"{stage}: altered, and passed over: {', '.join(self.altered)}\n" if self.altered else ""
        others = ", ".join(self.environment_change)
        changed = f", with other {others}: {differs} may differ" if others else ""
        return f"{altered}{stage}: resumes from the checkpoint at step {step} of {num_steps}{changed}"

    def on_host(self) -> "Checkpoint":
        """Return a copy with its tensors on the host, where further training does not change them."""
        shards = {
            name: spread._replace(parts=[Shard(part.offset, _copied(part.tensor)) for part in spread.parts])
            for name, spread in self.shards.items()
        }
        shared, own = ({name: _copied(x) for name, x in tensors.items()} for tensors in (self.shared, self.own))
        return replace(self, shared=shared, own=own, shards=shards, values=copy.deepcopy(self.values))


class Checkpoints:
    """The checkpoints of one stage's work; every method is called on every rank.

    Args:
        path: the directory that has them, the same for every rank.
        world: the process group.
        stage: the stage's name.
        work: what else than the config decides the stage's bytes, by name, as JSON-ready values. Ranks, device,
            threads and torch are added to it.
        config: the stage's resolved section.
        keeps: how many checkpoints are kept. `load` reads the last; if its files were altered, it removes that one and
            reads the one before.
    """

    def __init__(
        self, path: Path, world: World, stage: str, work: Mapping[str, Any], config: Config, keeps: int = 1
    ) -> None:
        self.path = Path(path).absolute()
        self.world = world
        self.stage = stage
        self.config = config
        machine = {"ranks": world.size, "device": world.device.type, "torch": str(torch.__version__)}
        machine["threads"] = torch.get_num_threads()  # decides the order in which sums are added up
        self.work = {**work, "config": digest(config), **machine}
        self.keeps = keeps
        self._changed: set[str] = set()
        self._are_ours = False
        self._begun: _Begun | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Commit a checkpoint, then remove those that are no longer kept.

        Raises:
            CommitError: the disk is full.
        """
        self.finish()
        with self.world.state.finishing(), self._committing(checkpoint) as out:
            self._write(checkpoint, out)
        self._note_saved()

    def save_before_stop(self, checkpoint: Checkpoint) -> None:
        """Commit a checkpoint of the step at which a stage stops, unless that step has one.

        Raises:
            CommitError: see `save`.
        """
        self.finish()
        if not broadcast(self.world.committing, is_committed(self._place(checkpoint))):
            self.save(checkpoint)

    def begin(self, checkpoint: Checkpoint) -> None:
        """Start writing a checkpoint in a thread, from a copy of its tensors on the host; `finish` commits it.

        A checkpoint that was begun earlier is finished first.

        Raises:
            CommitError: see `save`.
        """
        self.finish()
        opened = ExitStack()
        with self.world.state.finishing():
            out = opened.enter_context(self._committing(checkpoint))
        held = checkpoint.on_host()
        self._begun = _Begun(opened, _in_thread(lambda: self._write(held, out)))

    def finish(self) -> None:
        """Wait for the checkpoint that was begun, if any, and commit it; every rank calls at the same step.

        Raises:
            CommitError: see `save`.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        with self.world.state.finishing(), begun.opened:
            begun.written.result()
        self._note_saved()

    def _committing(self, checkpoint: Checkpoint) -> AbstractContextManager[Path]:
        facts = {**self.work, _SETTINGS: self.config.identity()}
        path = self._place(checkpoint)
        return committing(path, self.world, stage=f"{self.stage}-checkpoint", key=path.name, facts=facts)

    def _place(self, checkpoint: Checkpoint) -> Path:
        return self.path / f"step-{checkpoint.step:012d}"

    def _note_saved(self) -> None:
        """Remove the checkpoints that are no longer kept after one was committed."""
        self._are_ours = True
        if self.world.is_main:
            self._remove(keeping=self.keeps)

    def _write(self, checkpoint: Checkpoint, out: Path) -> None:
        write_tensors(checkpoint.own, out / _own_file(self.world.rank))
        write_state(out, checkpoint.shared, checkpoint.shards, self.world.rank)
        if self.world.is_main:
            values = json.dumps({"step": checkpoint.step, "moved": sorted(self._changed), **checkpoint.values})
            (out / VALUES_FILE).write_text(values, encoding="utf-8")

    def keep(self, step: int, every: int, end: int, state: Callable[[], Checkpoint]) -> None:
        """Begin a checkpoint where one is due, and commit it some steps later, once it is written.

        Args:
            step: the number of steps taken. every: steps between checkpoints; 0: no checkpoints. end: the last step,
                after which none is due. state: returns the checkpoint of this step.

        Raises:
            CommitError: see `save`.
        """
        if every and step % every == 0 and step < end:
            self.begin(state())
        elif every and step % every == every // 4:
            self.finish()

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the output's manifest: the environment changes with which the work was resumed, if any."""
        return {"resumed_with_other": sorted(self._changed)} if self._changed else {}

    def load(self, shards: Shards | None = None) -> Checkpoint | None:
        """Return the last committed checkpoint; None if there is none.

        Args:
            shards: tensors that are sharded over the ranks; this rank's parts are filled in place.

        Raises:
            CommitError: it is of other work, it was altered and there is none before it, or this version cannot read
                its config; nothing is removed then.
        """
        with raise_on_all_ranks(self.world.committing, f"listing {self.path}"):
            committed = sorted(self._committed(), reverse=True)
        for number, entry in enumerate(committed):
            try:
                with raise_on_all_ranks(self.world.committing, f"verifying {entry}"):
                    manifest = self._verified(entry)
            except (CommitError, StageError):
                if entry == committed[-1]:
                    raise
                continue
            with raise_on_all_ranks(self.world.committing, f"reading {entry}"):
                found = self._read(entry, manifest, shards or {})
            self._are_ours = True
            self._remove_after(entry)
            return replace(found, altered=tuple(one.name for one in committed[:number]))
        return None

    def _verified(self, entry: Path) -> Manifest:
        if entry.is_symlink():
            raise CommitError(f"{entry}: is a link; checkpoints are directories")
        manifest = verify(entry) if self.world.local_rank == 0 else read_manifest(entry)
        if manifest.key not in (entry.name, ""):  # earlier versions wrote no key
            raise CommitError(f"{entry}: is the checkpoint {manifest.key} under another name")
        return manifest

    def _remove_after(self, loaded: Path) -> None:
        """Remove the checkpoints after a loaded one: the run will reach and save those steps again."""
        with raise_on_all_ranks(self.world.committing, f"removing what lies after {loaded}"):
            after = {*self.path.glob("step-*"), *self._committed()} if self.world.is_main else set()
            for entry in after:
                if entry.name <= loaded.name:
                    continue
                if entry.is_symlink():
                    entry.unlink()
                else:
                    remove_folder(entry, first=MANIFEST)
                    if entry.exists():
                        shutil.rmtree(entry)

    @property
    def parts(self) -> Path:
        """A directory for parts of the output that a stage commits one by one; removed with the checkpoints."""
        self._are_ours = True
        return self.path / _PARTS

    def remove(self) -> None:
        """Remove the checkpoints that this run loaded or saved, and their directory; called after the commit."""
        if self.world.is_main and self._are_ours:
            self._remove()
            remove_folder(self.path / _PARTS)
            with contextlib.suppress(OSError):  # it holds other files, which are not ours to remove
                self.path.rmdir()

    def _remove(self, keeping: int = 0) -> None:
        committed = sorted(self._committed())
        kept = committed[len(committed) - keeping :]
        torn = [entry for entry in folders(self.path) if entry.name.startswith("step-")]
        for entry in {*committed, *torn, *self.path.glob("step-*"), *self.path.glob(".step-*.tmp")}:
            if entry not in kept:
                remove_folder(entry, first=MANIFEST)

    def _committed(self) -> list[Path]:
        """Return the committed checkpoints; for a URL those in the store."""
        return [entry for entry in folders(self.path, having=MANIFEST) if entry.name.startswith("step-")]

    def _read(self, path: Path, manifest: Manifest, shards: Shards) -> Checkpoint:
        facts = self._facts(path, manifest)
        changed = []
        for name in sorted(facts.keys() | self.work.keys()):
            found, wanted = facts.get(name), self.work.get(name)
            if found == wanted:
                continue
            if name not in MACHINE:
                raise CommitError(
                    f"{self.path}: is a checkpoint of other work ({name}: {found!r} there, {wanted!r} here); start that"
                    " work again to resume it, or remove the directory to begin anew"
                )
            changed.append(name)
        try:
            shared = read_state(path, shards)
            own = {} if {"ranks", "device"} & {*changed} else load_file(path / _own_file(self.world.rank))
            values = json.loads((path / VALUES_FILE).read_text(encoding="utf-8"))
            self._changed = {*values.pop("moved", ()), *changed}
            return Checkpoint(values.pop("step"), shared, own, values, shards, tuple(changed))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CommitError(f"{path}: cannot be loaded as a checkpoint of this work: {error}") from error

    def _facts(self, path: Path, manifest: Manifest) -> dict[str, Any]:
        """Return the work of a checkpoint; its config's digest is computed as this version of the code reads it."""
        facts = dict(manifest.facts)
        version = manifest.versions.get("sidestack")
        try:
            config = parse_written(type(self.config), facts.pop(_SETTINGS, None), f"{path}: config", version)
        except ConfigError as error:
            raise CommitError(str(error)) from error
        return {**facts, "config": digest(config)}


@dataclass(frozen=True)
class _Begun:
    """A checkpoint that is being written: its uncommitted directory, and the thread's result."""

    opened: ExitStack
    written: Future[None]


def _in_thread(work: Callable[[], None]) -> Future[None]:
    """Run work in a daemon thread; the returned future raises what the work raises."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, daemon=True, name="checkpoint").start()
    return done


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _own_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"
