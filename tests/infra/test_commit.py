import errno
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.commit import MANIFEST, committing, is_committed, read_manifest, verify
from infra.distributed import World, started
from infra.errors import CommitError
from tests.distributed import RankFailure, run_distributed


@pytest.fixture(scope="module")
def world() -> World:
    with started() as world:
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: flip(out / "t.parquet"), r"t\.parquet: SHA-256 .* was altered"),
        (lambda out: os.truncate(out / "t.parquet", 10), r"t\.parquet: has 10 bytes, manifest.json says"),
        (lambda out: (out / "part/a.txt").unlink(), r"a\.txt: is named in manifest.json but missing"),
        (lambda out: (out / "new").write_text(""), r"new: is not in manifest.json"),
        (lambda out: (out / MANIFEST).write_text("{}"), "not a sidestack manifest"),
        (lambda out: (out / MANIFEST).unlink(), "not a committed directory"),
    ],
)
def test_verify_finds_every_damage(tmp_path: Path, world: World, damage: object, message: str) -> None:
    out = commit(tmp_path / "out", world)
    damage(out)  # type: ignore[operator]
    with pytest.raises(CommitError, match=message):
        verify(out)


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
