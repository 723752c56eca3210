"""Committing a directory: atomicity, refused places, errors, and commits by several ranks."""

import errno
import os
import re
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

import sidestack.infra.commit
import sidestack.infra.files
from sidestack.infra.commit import commit_alone, committing
from sidestack.infra.distributed import ALONE, World, broadcast
from sidestack.infra.errors import AlreadyCommittedError, CommitError
from sidestack.infra.files import write_whole
from sidestack.infra.manifest import FileEntry, is_committed, read_manifest, verify
from tests.distributed import RankFailure, run_distributed
from tests.infra.committed import IRREGULAR, commit


def test_committed_directory_is_complete_and_described(tmp_path: Path, world: World) -> None:
    out = commit(tmp_path / "deep" / "out", world)
    manifest = verify(out)
    assert set(manifest.files) == {"part/a.txt", "t.parquet"}
    assert manifest.files["t.parquet"].rows == 3
    assert (manifest.key, manifest.inputs, manifest.facts) == ("k", {"a": "1"}, {"b": 2})
    assert "torch" in manifest.versions
    assert os.listdir(out.parent) == ["out"]  # no temporary directory is left


@pytest.mark.parametrize("kind", ["link", "FIFO", "socket"])
def test_irregular_file_is_not_committed(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CommitError, match=f"a: is a {kind}; a committed directory has regular files alone"):
        with commit_alone(tmp_path / "out", stage="test") as staging:
            (staging / "part").mkdir()
            IRREGULAR[kind](staging / "part" / "a")
    assert os.listdir(tmp_path) == []


def test_files_are_synced_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = sidestack.infra.files.sync

    def recorded(path: Path) -> None:
        sync(path)
        synced.append(re.sub(r"\.out\.\w+\.tmp", "TMP", path.relative_to(tmp_path).as_posix()))

    for module in (sidestack.infra.files, sidestack.infra.commit):
        monkeypatch.setattr(module, "sync", recorded)
    with commit_alone(tmp_path / "new" / "newer" / "out", stage="test") as staging:
        (staging / "a" / "b").mkdir(parents=True)
        (staging / "a" / "b" / "c").write_text("x")
    place = "new/newer"
    assert synced[:2] == [".", "new"]  # the parents of new folders
    assert set(synced[2:-1]) == {f"{place}/TMP{name}" for name in ("", "/a", "/a/b", "/a/b/c", "/manifest.json")}
    assert (
        synced.index(f"{place}/TMP/a/b/c") < synced.index(f"{place}/TMP/manifest.json") < synced.index(f"{place}/TMP")
    )
    assert synced[-1] == place
    synced.clear()
    write_whole(tmp_path / "x" / "y" / "file", b"1")
    assert synced[:2] == [".", "x"] and synced[-1] == "x/y"


def test_committed_directory_is_not_overwritten(tmp_path: Path, world: World) -> None:
    out = commit(tmp_path / "out", world)
    with pytest.raises(CommitError, match="committed already"):
        commit(out, world, "other")
    assert (out / "part/a.txt").read_text() == "hello"


def test_foreign_directory_is_refused_and_unchanged(tmp_path: Path, world: World) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(CommitError, match="not a directory of ours"):
        commit(tmp_path / "out", world)
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("target", ["elsewhere", "absent"])
def test_link_is_refused_before_work_begins(tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(CommitError, match="out: is a link, which no directory can be renamed to"):
        commit(tmp_path / "out", ALONE)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]


def test_mount_point_is_refused_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(CommitError, match="out: is a mount point"):
        commit(tmp_path / "out", ALONE)


@pytest.mark.parametrize("name", ["file/out", "x" * 300, "x" * 250])
def test_path_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CommitError, match=rf"{name}: cannot be written \(.+\); nothing was committed"):
        commit(tmp_path / name, ALONE)
    assert os.listdir(tmp_path) == ["file"]


def test_output_that_another_process_commits_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(AlreadyCommittedError, match="out: was committed by another process meanwhile"):
        with commit_alone(tmp_path / "out", stage="test") as staging:
            (staging / "a").write_text("second")
            with commit_alone(tmp_path / "out", stage="test") as other:
                (other / "a").write_text("first")
    assert (tmp_path / "out/a").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(AlreadyCommittedError, match="committed already"):
        commit(tmp_path / "out", ALONE)


def test_file_that_its_writer_hashed_is_not_hashed_again(tmp_path: Path) -> None:
    written: dict[str, FileEntry] = {}
    with commit_alone(tmp_path / "out", stage="test", written=written) as staging:
        (staging / "a").write_text("12")
        (staging / "b").write_text("3")
        written["a"] = FileEntry(sha256="the writer's", bytes=2, rows=7)
    files = read_manifest(tmp_path / "out").files
    assert files["a"] == written["a"]
    assert files["b"].sha256 != "the writer's" and list(files) == ["a", "b"]


def test_wrong_byte_count_of_a_writer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommitError, match="a: has 2 bytes, its writer counted 3"):
        with commit_alone(tmp_path / "out", stage="test", written={"a": FileEntry(sha256="", bytes=3)}) as staging:
            (staging / "a").write_text("12")
    assert os.listdir(tmp_path) == []


def test_failure_in_the_body_leaves_no_files(tmp_path: Path, world: World) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        with committing(tmp_path / "out", world, stage="test") as staging:
            (staging / "a").write_text("half")
            raise RuntimeError("half way")
    assert os.listdir(tmp_path) == []


def test_full_disk_is_named_and_leaves_no_files(tmp_path: Path, world: World) -> None:
    with pytest.raises(CommitError, match="no space left on the disk; nothing was committed"):
        with committing(tmp_path / "out", world, stage="test"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_write_whole_replaces_a_file_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"old")
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sidestack.infra.files, "sync", full)
    with pytest.raises(CommitError, match=f"{tmp_path / 'a'}: no space left on the disk; nothing was committed"):
        write_whole(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def write_own_part(world: World, out: Path) -> None:
    with committing(out, world, stage="test") as staging:
        (staging / f"part-{world.rank}").write_text(str(world.rank))


def test_every_rank_writes_its_own_part(tmp_path: Path) -> None:
    run_distributed(write_own_part, tmp_path / "out")
    assert set(verify(tmp_path / "out").files) == {"part-0", "part-1"}


def test_committed_output_is_refused_on_every_rank(tmp_path: Path, world: World) -> None:
    commit(tmp_path / "out", world)
    with pytest.raises(RankFailure) as failure:
        run_distributed(write_own_part, tmp_path / "out")
    assert all(error and "committed already" in error for error in failure.value.errors)
    assert is_committed(tmp_path / "out")


def commit_several(world: World, out: Path) -> list[str]:
    """Write three files on each rank; return the names of those that this rank hashed."""
    hashed: list[str] = []

    def recorded(path: Path) -> str:
        hashed.append(path.name)
        return path.name

    with mock.patch("sidestack.infra.files._hash", recorded), committing(out, world, stage="test") as staging:
        for number in range(3):
            (staging / f"{world.rank}-{number}").write_text("x")
    return hashed


def test_ranks_share_the_hashing_and_agree_on_the_manifest(tmp_path: Path) -> None:
    first, second = run_distributed(commit_several, tmp_path / "out")
    assert len(first) == len(second) == 3
    assert {name: entry.sha256 for name, entry in read_manifest(tmp_path / "out").files.items()} == {
        name: name for name in sorted([*first, *second])
    }


def commit_slowly(world: World, out: Path) -> None:
    """Write longer than the collective timeout on rank 0, and hash longer on rank 1."""
    short_timeout = replace(world, group=dist.new_group(timeout=timedelta(seconds=1)))
    hash_file = sidestack.infra.files._hash

    def hash_slowly(path: Path) -> str:
        time.sleep(2 * world.rank)
        return hash_file(path)

    with (
        mock.patch("sidestack.infra.files._hash", hash_slowly),
        committing(out, short_timeout, stage="test") as staging,
    ):
        (staging / f"part-{world.rank}").write_text("x")
        time.sleep(2 * (1 - world.rank))


def test_slow_writing_or_hashing_on_one_rank_does_not_time_out(tmp_path: Path) -> None:
    run_distributed(commit_slowly, tmp_path / "out")
    assert set(verify(tmp_path / "out").files) == {"part-0", "part-1"}


def fail_on_rank_one(world: World, out: Path) -> None:
    """Raise an error on rank 1, and record on rank 0 whether the temporary directory exists after it."""
    has_left = out.with_name("has_left")
    try:
        with committing(out, world, stage="test") as staging:
            if world.rank == 1:
                raise RuntimeError("half way")
            while not has_left.exists():
                time.sleep(0.01)
            out.with_name("is_there").write_text(str(staging.is_dir()))
    except RuntimeError:
        if world.rank == 1:
            has_left.touch()
        raise


def test_only_rank_0_removes_the_temporary_directory(tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        run_distributed(fail_on_rank_one, tmp_path / "out")
    assert (tmp_path / "is_there").read_text() == "True"
    assert sorted(os.listdir(tmp_path)) == ["has_left", "is_there"]


def commit_on_two_disks(world: World, disks: tuple[Path, Path]) -> None:
    """Commit with two ranks for which the same path is on different disks."""

    def path_on_this_rank(world: World, value: str) -> str:
        return broadcast(world, value).replace(str(disks[0]), str(disks[world.rank]))

    with (
        mock.patch("sidestack.infra.commit.broadcast", path_on_this_rank),
        mock.patch("socket.gethostname", lambda: "h" * 3),
    ):
        with committing(disks[world.rank] / "out", world, stage="test"):
            raise AssertionError("the body began")


def test_ranks_without_a_shared_disk_are_refused_before_work_begins(tmp_path: Path) -> None:
    disks = (tmp_path / "a", tmp_path / "b")
    for disk in disks:
        disk.mkdir()
    with pytest.raises(RankFailure) as failure:
        run_distributed(commit_on_two_disks, disks)
    for error, disk in zip(failure.value.errors, disks, strict=True):
        assert error and f"{disk}: rank 1 (host hhh) cannot read what rank 0 (host hhh) writes there" in error
    assert [os.listdir(disk) for disk in disks] == [[], []]


def commit_on_rank_one(world: World, out: Path) -> None:
    if world.rank == 1:
        with commit_alone(out, stage="test") as staging:
            (staging / "a").write_text("x")


def test_one_rank_commits_without_the_others(tmp_path: Path) -> None:
    run_distributed(commit_on_rank_one, tmp_path / "out")
    assert set(verify(tmp_path / "out").files) == {"a"}


def test_directory_that_was_removed_while_written_is_not_committed(tmp_path: Path) -> None:
    """A killed driver leaves its stage running, and the next driver removes the stage's temporary directory."""
    out = tmp_path / "out"
    with (
        pytest.raises(CommitError, match="was removed by another process while it was written; nothing was committed"),
        commit_alone(out, stage="test") as staging,
    ):
        (staging / "first.txt").write_text("first")
        shutil.rmtree(staging)
        staging.mkdir(parents=True)
        (staging / "second.txt").write_text("second")
    assert not out.exists()
    assert not list(tmp_path.iterdir())
