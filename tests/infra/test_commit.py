import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

import sidestack.infra.commit
import sidestack.infra.files
import sidestack.infra.manifest
from sidestack.infra.commit import commit_alone, committing
from sidestack.infra.config import digest
from sidestack.infra.distributed import ALONE, World, broadcast, process_group
from sidestack.infra.errors import AlreadyCommittedError, CommitError
from sidestack.infra.files import write_whole
from sidestack.infra.manifest import MANIFEST, FileEntry, is_committed, read_manifest, verify
from sidestack.infra.sealed import OWN_DIGEST
from tests.distributed import RankFailure, run_distributed


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group() as world:
        yield world


def commit(out: Path, world: World, text: str = "hello") -> Path:
    with committing(out, world, stage="test", key="k", inputs={"a": "1"}, facts={"b": 2}) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "a.txt").write_text(text)
        pq.write_table(pa.table({"x": [1, 2, 3]}), staging / "t.parquet")
    return out


def test_a_committed_directory_is_whole_and_described(tmp_path: Path, world: World) -> None:
    out = commit(tmp_path / "deep" / "out", world)
    manifest = verify(out)
    assert set(manifest.files) == {"part/a.txt", "t.parquet"}
    assert manifest.files["t.parquet"].rows == 3
    assert (manifest.key, manifest.inputs, manifest.facts) == ("k", {"a": "1"}, {"b": 2})
    assert "torch" in manifest.versions
    assert os.listdir(out.parent) == ["out"]  # no temporary directory is left


def test_digest_depends_on_contents_alone(tmp_path: Path, world: World) -> None:
    first, second, third = (commit(tmp_path / name, world, text) for name, text in zip("abc", "xxy", strict=True))
    assert read_manifest(first).digest == read_manifest(second).digest != read_manifest(third).digest


def test_digest_leaves_out_the_record_of_how_long_it_took(tmp_path: Path, world: World) -> None:
    for name, seconds in (("a", "1.5"), ("b", "2.5")):
        with committing(tmp_path / name, world, stage="test") as staging:
            (staging / "data.txt").write_text("same")
            (staging / "summary.json").write_text(f'{{"seconds": {seconds}}}')
    first, second = verify(tmp_path / "a"), verify(tmp_path / "b")
    assert first.digest == second.digest
    assert first.files["summary.json"] != second.files["summary.json"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def rename_in_manifest(out: Path, name: str, other: str) -> None:
    """Have a manifest name another file, which lies outside with the same content, and seal it anew."""
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][other] = manifest["files"].pop(name)
    if other.startswith("../"):
        shutil.copy(out / name, out / other)
    del manifest[OWN_DIGEST]
    (out / MANIFEST).write_text(json.dumps({**manifest, OWN_DIGEST: digest(manifest)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: flip(out / "t.parquet"), r"t\.parquet: SHA-256 .* was altered"),
        (lambda out: os.truncate(out / "t.parquet", 10), r"t\.parquet: has 10 bytes, manifest.json says"),
        (lambda out: (out / "part/a.txt").unlink(), r"a\.txt: is named in manifest.json but missing"),
        (lambda out: (out / "new").write_text(""), r"new: is not in manifest.json"),
        (lambda out: rename_in_manifest(out, "t.parquet", "../t.parquet"), r"t\.parquet: is"),
        (lambda out: rename_in_manifest(out, "t.parquet", "/etc/hostname"), r"t\.parquet: is not in manifest.json"),
        (lambda out: (out / MANIFEST).write_text("{}"), "not a sidestack manifest"),
        (lambda out: (out / MANIFEST).unlink(), "not a committed directory"),
    ],
)
def test_verify_finds_every_damage(tmp_path: Path, world: World, damage: object, message: str) -> None:
    out = commit(tmp_path / "out", world)
    damage(out)  # type: ignore[operator]
    with pytest.raises(CommitError, match=message):
        verify(out)


@pytest.mark.parametrize(
    ("field", "value"),
    [("key", "l"), ("stage", "other"), ("facts", {"b": 3}), ("inputs", {}), ("created", "2020"), ("versions", {})],
)
def test_an_edited_manifest_is_found(tmp_path: Path, field: str, value: object) -> None:
    file = commit(tmp_path / "out", ALONE) / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(CommitError, match=r"manifest\.json: is not of the digest that it holds"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"1", b"[" * 100_000, b'{"facts": NaN}'])
def test_what_is_no_manifest_of_ours_is_named(tmp_path: Path, content: bytes) -> None:
    file = commit(tmp_path / "out", ALONE) / MANIFEST
    file.write_bytes(content)
    with pytest.raises(CommitError, match=r"manifest\.json: (not a sidestack manifest|cannot be read)"):
        read_manifest(tmp_path / "out")


def test_every_flipped_bit_of_a_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    file = commit(tmp_path / "out", ALONE) / MANIFEST
    written, content = read_manifest(tmp_path / "out"), file.read_bytes()
    num_found = 0
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            assert read_manifest(tmp_path / "out") == written  # white space became other white space
        except CommitError:
            num_found += 1
    assert num_found > 0.95 * len(content)


def test_a_manifest_of_the_format_before_is_read_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidestack.infra.manifest, "_warned_without_digest", [])
    for name in ("a", "b"):
        file = commit(tmp_path / name, ALONE) / MANIFEST
        values = {**json.loads(file.read_text()), "format": "sidestack/1"}
        del values["own_digest"]
        file.write_text(json.dumps(values))
        assert verify(tmp_path / name).key == "k"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a/manifest.json: was committed by an earlier version" in said
    file.write_text(json.dumps({**values, "format": "sidestack/2"}))
    with pytest.raises(CommitError, match="format 'sidestack/2' does not go with its own_digest"):
        read_manifest(tmp_path / "b")


def test_a_directory_of_another_stage_or_key_is_refused(tmp_path: Path) -> None:
    out = commit(tmp_path / "out", ALONE)
    assert verify(out, stage="test", key="k") == read_manifest(out)
    for check in (verify, read_manifest):
        with pytest.raises(CommitError, match="out: is of stage 'test', not of 'ranker'"):
            check(out, stage="ranker", key="k")
        with pytest.raises(CommitError, match="out: is of key 'k', not of ''"):
            check(out, key="")


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # a socket's whole path must be short


KINDS = {
    "link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "FIFO": os.mkfifo,
    "socket": bind,
    "directory": os.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["part/a.txt", MANIFEST])
def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    out = commit(tmp_path / "out", ALONE)
    (out / name).rename(tmp_path / "elsewhere")
    KINDS[kind](out / name)
    rule = (
        f"{name}: is (a {kind}|named in manifest.json but missing)" if kind == "directory" else f"{name}: is a {kind}"
    )
    with pytest.raises(CommitError, match=rule):
        verify(out)


@pytest.mark.parametrize("kind", ["link", "FIFO", "socket"])
def test_what_is_no_regular_file_is_not_committed(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CommitError, match=f"a: is a {kind}; a committed directory has regular files alone"):
        with commit_alone(tmp_path / "out", stage="test") as staging:
            (staging / "part").mkdir()
            KINDS[kind](staging / "part" / "a")
    assert os.listdir(tmp_path) == []


def test_a_linked_folder_in_a_committed_directory_is_refused_and_one_to_it_is_followed(tmp_path: Path) -> None:
    out = commit(tmp_path / "out", ALONE)
    (tmp_path / "link").symlink_to(out)
    assert verify(tmp_path / "link").key == "k"
    (out / "part").rename(tmp_path / "elsewhere")
    (out / "part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CommitError, match="part: is a link"):
        verify(out)


def test_a_file_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = commit(tmp_path / "out", ALONE)

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(sidestack.infra.files, "_hash", broken)
    with pytest.raises(CommitError, match=r"part/a\.txt: cannot be read: Input/output error"):
        verify(out)


def test_every_file_and_folder_is_synced_before_the_rename_and_its_place_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = sidestack.infra.files.sync

    def noted(path: Path) -> None:
        sync(path)
        synced.append(re.sub(r"\.out\.\w+\.tmp", "TMP", path.relative_to(tmp_path).as_posix()))

    for module in (sidestack.infra.files, sidestack.infra.commit):
        monkeypatch.setattr(module, "sync", noted)
    with commit_alone(tmp_path / "new" / "newer" / "out", stage="test") as staging:
        (staging / "a" / "b").mkdir(parents=True)
        (staging / "a" / "b" / "c").write_text("x")
    place = "new/newer"
    assert synced[:2] == [".", "new"]  # where the folders were made
    assert set(synced[2:-1]) == {f"{place}/TMP{name}" for name in ("", "/a", "/a/b", "/a/b/c", "/manifest.json")}
    assert (
        synced.index(f"{place}/TMP/a/b/c") < synced.index(f"{place}/TMP/manifest.json") < synced.index(f"{place}/TMP")
    )
    assert synced[-1] == place
    synced.clear()
    write_whole(tmp_path / "x" / "y" / "file", b"1")
    assert synced[:2] == [".", "x"] and synced[-1] == "x/y"


def test_a_committed_directory_is_never_overwritten(tmp_path: Path, world: World) -> None:
    out = commit(tmp_path / "out", world)
    with pytest.raises(CommitError, match="committed already"):
        commit(out, world, "other")
    assert (out / "part/a.txt").read_text() == "hello"


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path, world: World) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(CommitError, match="not a directory of ours"):
        commit(tmp_path / "out", world)
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("target", ["elsewhere", "absent"])
def test_a_link_is_refused_before_work_begins(tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(CommitError, match="out: is a link, which no directory can be renamed to"):
        commit(tmp_path / "out", ALONE)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]


def test_a_mount_point_is_refused_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(CommitError, match="out: is a mount point"):
        commit(tmp_path / "out", ALONE)


@pytest.mark.parametrize("name", ["file/out", "x" * 300, "x" * 250])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CommitError, match=rf"{name}: cannot be written \(.+\); nothing was committed"):
        commit(tmp_path / name, ALONE)
    assert os.listdir(tmp_path) == ["file"]


def test_what_another_process_commits_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(AlreadyCommittedError, match="out: was committed by another process meanwhile"):
        with commit_alone(tmp_path / "out", stage="test") as staging:
            (staging / "a").write_text("second")
            with commit_alone(tmp_path / "out", stage="test") as other:
                (other / "a").write_text("first")
    assert (tmp_path / "out/a").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(AlreadyCommittedError, match="committed already"):
        commit(tmp_path / "out", ALONE)


def test_what_a_writer_hashed_is_not_hashed_again(tmp_path: Path) -> None:
    written: dict[str, FileEntry] = {}
    with commit_alone(tmp_path / "out", stage="test", written=written) as staging:
        (staging / "a").write_text("12")
        (staging / "b").write_text("3")
        written["a"] = FileEntry(sha256="the writer's", bytes=2, rows=7)
    files = read_manifest(tmp_path / "out").files
    assert files["a"] == written["a"]
    assert files["b"].sha256 != "the writer's" and list(files) == ["a", "b"]


def test_a_writer_that_counted_other_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommitError, match="a: has 2 bytes, its writer counted 3"):
        with commit_alone(tmp_path / "out", stage="test", written={"a": FileEntry(sha256="", bytes=3)}) as staging:
            (staging / "a").write_text("12")
    assert os.listdir(tmp_path) == []


def test_a_failure_in_the_body_leaves_nothing(tmp_path: Path, world: World) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        with committing(tmp_path / "out", world, stage="test") as staging:
            (staging / "a").write_text("half")
            raise RuntimeError("half way")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, world: World) -> None:
    with pytest.raises(CommitError, match="no space left on the disk; nothing was committed"):
        with committing(tmp_path / "out", world, stage="test"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_one_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_taken_output_is_refused_on_every_rank(tmp_path: Path, world: World) -> None:
    commit(tmp_path / "out", world)
    with pytest.raises(RankFailure) as failure:
        run_distributed(write_own_part, tmp_path / "out")
    assert all(error and "committed already" in error for error in failure.value.errors)
    assert is_committed(tmp_path / "out")


def commit_several(world: World, out: Path) -> list[str]:
    """Write three files on each rank; return the names of those that this rank hashed."""
    hashed: list[str] = []

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return path.name

    with mock.patch("sidestack.infra.files._hash", noted), committing(out, world, stage="test") as staging:
        for number in range(3):
            (staging / f"{world.rank}-{number}").write_text("x")
    return hashed


def test_the_ranks_share_the_hashing_and_agree_on_the_manifest(tmp_path: Path) -> None:
    first, second = run_distributed(commit_several, tmp_path / "out")
    assert len(first) == len(second) == 3
    assert {name: entry.sha256 for name, entry in read_manifest(tmp_path / "out").files.items()} == {
        name: name for name in sorted([*first, *second])
    }


def commit_slowly(world: World, out: Path) -> None:
    """Write, and hash, for longer on one rank than a collective may wait."""
    impatient = replace(world, group=dist.new_group(timeout=timedelta(seconds=1)))
    hash_at_once = sidestack.infra.files._hash

    def hash_late(path: Path) -> str:
        time.sleep(2 * world.rank)
        return hash_at_once(path)

    with mock.patch("sidestack.infra.files._hash", hash_late), committing(out, impatient, stage="test") as staging:
        (staging / f"part-{world.rank}").write_text("x")
        time.sleep(2 * (1 - world.rank))


def test_waiting_for_a_rank_that_writes_or_hashes_does_not_time_out(tmp_path: Path) -> None:
    run_distributed(commit_slowly, tmp_path / "out")
    assert set(verify(tmp_path / "out").files) == {"part-0", "part-1"}


def fail_on_rank_one(world: World, out: Path) -> None:
    """Leave by an error on rank 1, and let rank 0 note what it left."""
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


def test_rank_zero_alone_removes_the_temporary_directory(tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        run_distributed(fail_on_rank_one, tmp_path / "out")
    assert (tmp_path / "is_there").read_text() == "True"
    assert sorted(os.listdir(tmp_path)) == ["has_left", "is_there"]


def commit_on_two_disks(world: World, disks: tuple[Path, Path]) -> None:
    """Commit with a rank for which the same path is a place on another disk."""

    def seen_from_here(world: World, value: str) -> str:
        return broadcast(world, value).replace(str(disks[0]), str(disks[world.rank]))

    with (
        mock.patch("sidestack.infra.commit.broadcast", seen_from_here),
        mock.patch("socket.gethostname", lambda: "h" * 3),
    ):
        with committing(disks[world.rank] / "out", world, stage="test"):
            raise AssertionError("the body began")


def test_ranks_with_disks_of_their_own_are_refused_before_work_begins(tmp_path: Path) -> None:
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


def test_a_directory_that_was_removed_while_it_was_written_is_not_committed(tmp_path: Path) -> None:
    """A driver that was killed leaves its stage alive; the next one removes what the stage has written so far."""
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
