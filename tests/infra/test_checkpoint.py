"""Checkpoints: the state is restored from the last intact checkpoint, and never from one of other work."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestack.infra.checkpoint import Checkpoint, Checkpoints
from sidestack.infra.config import VERSION, Config
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import CommitError
from sidestack.infra.shards import Shard, Spread
from tests.distributed import run_distributed

WORK = {"key": "k", "inputs": {"dataset": "d"}}


class Settings(Config):
    rate: float = 0.1


class LaterSettings(Settings):
    """The settings of a later version of the code."""

    momentum: float = 0.9


def checkpoints(path: Path, stage: str = "encoder", world: World = ALONE, config: Config | None = None) -> Checkpoints:
    return Checkpoints(path / "out.checkpoint", world, stage, WORK, config or Settings())


def save_two(path: Path) -> Checkpoints:
    """Save two checkpoints, of steps 10 and 11, and keep both."""
    kept = checkpoints(path)
    kept.keeps = 2
    for step in (10, 11):
        kept.save(checkpoint(step))
    return kept


def checkpoint(step: int, rank: int = 0) -> Checkpoint:
    table = torch.arange(6.0).view(2, 3) / 7 + step
    shared = {
        "table": table,
        "transposed": table.T,
        "counts": torch.tensor(step),
        "bytes": torch.tensor([1], dtype=torch.uint8),
    }
    return Checkpoint(step, shared, {"own": torch.tensor([rank, step])}, {"rate": 1 / 3, "history": '{"step": 1}\n'})


def require_equal(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.step, found.values) == (expected.step, expected.values)
    for part in ("shared", "own"):
        tensors, wanted = getattr(found, part), getattr(expected, part)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
        assert all(tensors[name].dtype == wanted[name].dtype for name in wanted)


def test_last_checkpoint_is_loaded_and_earlier_ones_are_removed(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    assert kept.load() is None
    for step in (9, 10, 100):
        kept.save(checkpoint(step))
    require_equal(kept.load(), checkpoint(100))
    assert [path.name for path in kept.path.iterdir()] == ["step-000000000100"]
    files = {path.suffix for path in kept.path.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}  # no pickles
    kept.remove()
    assert list(tmp_path.iterdir()) == []
    kept.remove()  # a no-op


def test_begun_checkpoint_counts_once_finished_and_has_the_values_at_begin(tmp_path: Path) -> None:
    kept, later = checkpoints(tmp_path), checkpoint(10)
    kept.save(checkpoint(9))
    kept.begin(later)
    for tensor in (*later.shared.values(), *later.own.values()):
        tensor.zero_()  # training changes them in place
    later.values["rate"] = 5
    require_equal(checkpoints(tmp_path).load(), checkpoint(9))
    kept.finish()
    require_equal(kept.load(), checkpoint(10))
    kept.finish()  # a no-op
    kept.begin(checkpoint(11))
    kept.begin(checkpoint(12))  # finishes the one before
    require_equal(checkpoints(tmp_path).load(), checkpoint(11))
    kept.finish()


def test_error_of_the_writing_thread_is_raised_and_nothing_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoints(tmp_path)
    kept.save(checkpoint(9))
    with monkeypatch.context() as patch:
        patch.setattr(
            "sidestack.infra.checkpoint.write_tensors", lambda *_: (_ for _ in ()).throw(OSError("no such disk"))
        )
        kept.begin(checkpoint(10))
        with pytest.raises(OSError, match="no such disk"):
            kept.finish()
    assert [path.name for path in kept.path.iterdir()] == ["step-000000000009"]


def test_last_checkpoints_are_kept_and_a_damaged_one_is_skipped(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.keeps = 2
    for step in (9, 10, 11):
        kept.save(checkpoint(step))
    assert sorted(path.name for path in kept.path.iterdir()) == ["step-000000000010", "step-000000000011"]
    (kept.path / "step-000000000011" / "shared.safetensors").write_bytes(b"other")
    found = kept.load()
    require_equal(found, checkpoint(10))
    assert found is not None and found.altered == ("step-000000000011",)
    kept.save(checkpoint(11))  # replaces the damaged one
    (kept.path / "step-000000000011" / "shared.safetensors").write_bytes(b"other")
    require_equal(kept.load(), checkpoint(10))
    (kept.path / "step-000000000010" / "values.json").write_bytes(b"other")
    with pytest.raises(CommitError, match=r"step-000000000010.*values\.json"):
        kept.load()
    assert (kept.path / "step-000000000010").is_dir()


def flip_a_bit(path: Path) -> None:
    file = path / "shared.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def link_a_file(path: Path) -> None:
    (path / "values.json").rename(path.parent / "elsewhere")
    (path / "values.json").symlink_to(path.parent / "elsewhere")


def replace_a_file_by_an_older_one(path: Path) -> None:
    shutil.copy(path.with_name("step-000000000010") / "values.json", path / "values.json")


def replace_by_an_older_one(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000000000010"), path)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: (path / "rank-0000.safetensors").unlink(),
        lambda path: os.truncate(path / "shared.safetensors", 9),
        lambda path: (path / "values.json").write_text("{}"),
        lambda path: (path / "manifest.json").write_text("{}"),
        lambda path: (path / "more").write_text(""),
        link_a_file,
        replace_a_file_by_an_older_one,
    ],
    ids=["flip", "deletion", "truncation", "edit", "manifest", "addition", "link", "older"],
)
def test_damaged_newest_checkpoint_is_skipped_and_reported(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    kept = save_two(tmp_path)
    damage(kept.path / "step-000000000011")
    found = kept.load()
    require_equal(found, checkpoint(10))
    assert found is not None and found.altered == ("step-000000000011",)
    kept.save(checkpoint(11))  # the resumed run reaches the same step again
    require_equal(kept.load(), checkpoint(11))
    assert {path.name for path in kept.path.glob("step-*")} == {"step-000000000010", "step-000000000011"}


def test_checkpoint_without_a_manifest_is_ignored(tmp_path: Path) -> None:
    kept = save_two(tmp_path)
    (kept.path / "step-000000000011" / "manifest.json").unlink()
    require_equal(kept.load(), checkpoint(10))
    kept.save(checkpoint(11))
    require_equal(kept.load(), checkpoint(11))


@pytest.mark.parametrize("place", [link, replace_by_an_older_one])
def test_link_or_older_checkpoint_under_a_newer_name_is_skipped(tmp_path: Path, place: Callable[[Path], None]) -> None:
    kept = save_two(tmp_path)
    place(kept.path / "step-000000000011")
    found = kept.load()
    assert found is not None and (found.step, found.altered) == (10, ("step-000000000011",))


def test_remove_leaves_checkpoints_of_another_stage(tmp_path: Path) -> None:
    checkpoints(tmp_path).save(checkpoint(9))
    other = checkpoints(tmp_path, "materialize")
    other.remove()
    assert [path.name for path in other.path.iterdir()] == ["step-000000000009"]


def test_remove_leaves_other_directories(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    (kept.path / "mine").mkdir(parents=True)
    kept.save(checkpoint(9))
    kept.remove()
    assert [path.name for path in kept.path.iterdir()] == ["mine"]


def test_partial_checkpoint_is_ignored(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.save(checkpoint(9))
    torn = kept.path / ".step-000000000010.abcd.tmp"
    torn.mkdir()
    (torn / "values.json").write_text('{"st')
    (kept.path / "step-000000000011").mkdir()
    require_equal(kept.load(), checkpoint(9))
    kept.save(checkpoint(12))
    assert [path.name for path in kept.path.iterdir()] == ["step-000000000012"]


def test_only_checkpoint_is_refused_when_damaged(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.save(checkpoint(9))
    (file,) = kept.path.glob("*/shared.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CommitError, match=r"shared\.safetensors: SHA-256"):
        kept.load()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("key", "l", "key: 'k' there, 'l' here"),
        ("config", "e", "config: '[0-9a-f]{64}' there, 'e' here"),
        ("inputs", {"dataset": "f"}, "inputs: {'dataset': 'd'} there, {'dataset': 'f'} here"),
    ],
)
def test_checkpoint_of_other_work_is_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    checkpoints(tmp_path).save(checkpoint(9))
    other = checkpoints(tmp_path)
    other.work[name] = value
    with pytest.raises(CommitError, match=message):
        other.load()
    assert list((tmp_path / "out.checkpoint").iterdir())


@pytest.mark.parametrize(
    ("name", "value", "keeps_own"),
    [("torch", "2.0", True), ("threads", 99, True), ("ranks", 2, False), ("device", "cuda", False)],
)
def test_checkpoint_of_another_environment_is_loaded_and_recorded(
    tmp_path: Path, name: str, value: Any, keeps_own: bool
) -> None:
    kept = checkpoints(tmp_path)
    kept.save(checkpoint(9))
    assert kept.facts == {}
    other = checkpoints(tmp_path)
    other.work[name] = value
    found = other.load()
    assert (found.step, found.environment_change, bool(found.own)) == (9, (name,), keeps_own)
    other.save(checkpoint(12))
    again = checkpoints(tmp_path)
    again.work[name] = value
    assert again.load().environment_change == ()
    assert other.facts == again.facts == {"resumed_with_other": [name]}


def test_checkpoint_begins_when_due_and_is_committed_some_steps_later(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    committed = []
    for step in range(1, 17):
        kept.keep(step, 8, 16, lambda step=step: checkpoint(step))  # type: ignore[misc]
        committed.append(sorted(int(path.name[5:]) for path in kept.path.glob("step-*")))
    assert committed == [*[[]] * 9, *[[8]] * 7]  # none at the last step
    kept.keep(8, 0, 16, lambda: checkpoint(8))
    require_equal(kept.load(), checkpoint(8))


def test_checkpoint_of_an_older_version_is_loaded_when_newer_settings_have_their_defaults(tmp_path: Path) -> None:
    checkpoints(tmp_path).save(checkpoint(9))
    require_equal(checkpoints(tmp_path, config=LaterSettings()).load(), checkpoint(9))
    with pytest.raises(CommitError, match="is a checkpoint of other work .config: "):
        checkpoints(tmp_path, config=LaterSettings(momentum=0.5)).load()


def test_checkpoint_with_an_unknown_setting_names_both_versions(tmp_path: Path) -> None:
    checkpoints(tmp_path, config=LaterSettings()).save(checkpoint(9))
    with pytest.raises(CommitError, match=rf"(?s)momentum: unknown key.*written by sidestack {VERSION}, this is"):
        checkpoints(tmp_path).load()


def save_and_load(world: World, path: Path) -> list[int]:
    kept = checkpoints(path, "encoder", world)
    kept.save(checkpoint(5, world.rank))
    found = kept.load()
    require_equal(found, checkpoint(5, world.rank))
    assert found is not None
    return [int(x) for x in found.own["own"]]


def test_each_rank_loads_its_own_tensors(tmp_path: Path) -> None:
    assert run_distributed(save_and_load, tmp_path) == [[0, 5], [1, 5]]


def spread(world: World, path: Path, rows: int) -> list[int]:
    """Save a table that is sharded over the ranks, and return the rows that this rank loads."""
    each = rows // world.size
    first = world.rank * each
    table = torch.arange(first, first + each)
    kept = checkpoints(path, "ranker", world)
    kept.save(Checkpoint(7, {}, {}, {}, {"table": Spread((rows,), [Shard((first,), table)])}))
    out = torch.zeros_like(table)
    found = kept.load({"table": Spread((rows,), [Shard((first,), out)])})
    assert found is not None
    assert (found.step, found.environment_change) == (7, ())
    return out.tolist()


def test_sharded_table_is_loaded_by_any_number_of_ranks(tmp_path: Path) -> None:
    assert run_distributed(spread, tmp_path, 10) == [list(range(5)), list(range(5, 10))]
    out = torch.zeros(10, dtype=torch.int64)
    found = checkpoints(tmp_path, "ranker").load({"table": Spread((10,), [Shard((0,), out)])})
    assert found is not None
    assert "ranks" in found.environment_change
    assert out.tolist() == list(range(10))
    with pytest.raises(CommitError, match="is a checkpoint of other work"):
        checkpoints(tmp_path, "ranker", config=Settings(rate=0.2)).load({})
    larger = Spread((11,), [Shard((0,), torch.zeros(11))])
    with pytest.raises(CommitError, match=r"table: was saved with shape \(10,\), now has \(11,\)"):
        checkpoints(tmp_path, "ranker").load({"table": larger})
