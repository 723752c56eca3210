"""The commit protocol at a URL: concurrent writers, partial uploads, altered objects, leases and checkpoints."""

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sidestack.infra import lease
from sidestack.infra.checkpoint import Checkpoint, Checkpoints
from sidestack.infra.commit import commit_alone, committing, require_free
from sidestack.infra.config import Config
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import AlreadyCommittedError, CommitError, RemoteError
from sidestack.infra.files import write_whole
from sidestack.infra.manifest import (
    MANIFEST,
    fetch_files,
    fetched,
    find_manifest,
    is_committed,
    read_manifest,
    require_whole,
    verify,
    verify_file,
)
from sidestack.infra.remote import trees
from sidestack.infra.remote.urls import local_path, mirror
from sidestack.infra.serve import model_folder
from sidestack.infra.served import CODE_FOLDER
from tests.distributed import RankFailure, run_distributed
from tests.object_store import Bucket


def commit(path: Path, text: str = "rows", **facts: str) -> Path:
    with commit_alone(path, stage="test", facts=facts) as out:
        (out / "part.txt").write_text(text)
        (out / "more").mkdir()
        (out / "more" / "b.txt").write_text("b")
    return path


def clear_mirror() -> None:
    """Delete the local copies of the store, as on another machine."""
    shutil.rmtree(mirror(), ignore_errors=True)


def test_directory_is_committed_in_the_store_and_fetched_on_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    out = commit(local_path(f"{bucket.url}/runs/x"))
    keys = bucket.keys()
    (folder,) = {key.split("/")[2] for key in keys} - {MANIFEST}
    assert keys == sorted([f"runs/x/{MANIFEST}", f"runs/x/{folder}/more/b.txt", f"runs/x/{folder}/part.txt"])
    before = sorted(file.relative_to(out) for file in out.rglob("*"))
    clear_mirror()
    assert is_committed(out) and read_manifest(out, stage="test") == find_manifest(out)
    assert not out.exists()  # reading the manifest fetches no files
    assert verify(out).digest == read_manifest(out).digest
    assert (out / "part.txt").read_text() == "rows" and sorted(f.relative_to(out) for f in out.rglob("*")) == before
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("s3:")]


def test_manifest_at_a_url_equals_that_of_a_local_directory(bucket: Bucket, tmp_path: Path) -> None:
    at_url, local = read_manifest(commit(local_path(f"{bucket.url}/x"))), verify(commit(tmp_path / "x"))
    assert at_url.digest == local.digest and at_url.files == local.files


def test_committed_url_is_not_overwritten(bucket: Bucket) -> None:
    out = commit(local_path(f"{bucket.url}/x"))
    clear_mirror()
    with pytest.raises(AlreadyCommittedError, match=f"{bucket.url}/x: is committed already"):
        commit(out, "others")
    assert verify(out) and (out / "part.txt").read_text() == "rows"


def test_url_with_foreign_objects_is_refused_and_unchanged(bucket: Bucket) -> None:
    bucket.put("x/somebody.txt", b"else")
    with pytest.raises(CommitError, match=f"not ours, {bucket.url}/x/somebody.txt"):
        require_free(local_path(f"{bucket.url}/x"))
    commit(local_path(f"{bucket.url}/x/below"))
    assert bucket.get("x/somebody.txt") == b"else"


def test_whole_bucket_is_refused_as_output(bucket: Bucket) -> None:
    assert not is_committed(local_path(bucket.url))
    with pytest.raises(RemoteError, match=f"{bucket.url}: is a whole bucket; name a folder in it"):
        commit(local_path(bucket.url))
    assert bucket.keys() == []


def test_only_one_of_two_writers_commits(bucket: Bucket) -> None:
    out, ready, ends = local_path(f"{bucket.url}/x"), threading.Barrier(2), []

    def write(text: str) -> None:
        try:
            with commit_alone(out, stage="test") as staging:
                (staging / "part.txt").write_text(text)
                ready.wait()
            ends.append(text)
        except AlreadyCommittedError:
            ends.append("refused")

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends)[:-1] == ["one"] or sorted(ends) == ["refused", "two"]
    clear_mirror()
    assert verify(out) and (out / "part.txt").read_text() in ends
    assert len(bucket.keys("x/")) == 2  # the other writer's file is removed


def test_partial_upload_is_not_committed_and_the_next_writer_removes_it(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = local_path(f"{bucket.url}/x")
    with monkeypatch.context() as patch:
        patch.setattr(trees, "commit", _killed)
        with pytest.raises(KeyboardInterrupt):
            commit(out, "torn")
    clear_mirror()
    assert bucket.keys("x/") and not is_committed(out)
    with pytest.raises(CommitError, match=f"{bucket.url}/x: not a committed directory"):
        verify(out)
    commit(out, "whole")
    clear_mirror()
    assert verify(out) and (out / "part.txt").read_text() == "whole" and len(bucket.keys("x/")) == 3


def _killed(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_failed_upload_commits_nothing_and_leaves_no_local_files(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise RemoteError("s3://…: no permission")

    monkeypatch.setattr(trees, "put_files", refuse)
    out = local_path(f"{bucket.url}/x")
    with pytest.raises(RemoteError, match="no permission"):
        commit(out)
    assert not is_committed(out) and not list(out.parent.iterdir())


def test_altered_or_removed_object_in_the_store_is_found(bucket: Bucket) -> None:
    out = commit(local_path(f"{bucket.url}/x"))
    (key,) = [one for one in bucket.keys("x/") if one.endswith("part.txt")]
    require_whole(out)
    bucket.put(key, b"ROWS")
    clear_mirror()
    with pytest.raises(CommitError, match=f"{bucket.url}/x/part.txt: SHA-256"):
        verify(out)
    assert not out.exists()
    bucket.put(key, b"longer than it was")
    with pytest.raises(CommitError, match=f"{bucket.url}/x/part.txt: has 18 bytes, {MANIFEST} says 4"):
        require_whole(out)
    bucket.remove(key)
    with pytest.raises(CommitError, match=f"{bucket.url}/x/part.txt: is missing"):
        require_whole(out)
    with pytest.raises(RemoteError, match="no such object"):
        verify(out)
    bucket.put(f"x/{MANIFEST}", b"{}")
    with pytest.raises(CommitError, match=f"{bucket.url}/x/{MANIFEST}"):
        read_manifest(out)


def test_altered_or_outdated_copy_is_fetched_again(bucket: Bucket) -> None:
    out = commit(local_path(f"{bucket.url}/x"))
    (out / "part.txt").write_text("ROWS")
    assert fetched(out) == out and (out / "part.txt").read_text() == "rows"
    for key in bucket.keys("x/"):
        bucket.remove(key)
    kept = mirror().with_name("kept")
    mirror().rename(kept)
    commit(out, "made anew")
    shutil.rmtree(mirror())
    kept.rename(mirror())
    assert (out / "part.txt").read_text() == "rows"
    assert verify(out) and (out / "part.txt").read_text() == "made anew"


def test_single_files_are_fetched_and_checked(bucket: Bucket) -> None:
    out = commit(local_path(f"{bucket.url}/x"))
    clear_mirror()
    fetch_files(out, "part.txt", "none.txt")
    assert (out / "part.txt").read_text() == "rows" and not (out / "more").exists() and not (out / MANIFEST).exists()
    assert verify_file(out, "more/b.txt") == read_manifest(out)
    assert verify(out).files.keys() == {"part.txt", "more/b.txt"}
    (key,) = [one for one in bucket.keys("x/") if one.endswith("part.txt")]
    bucket.put(key, b"ROWS")
    clear_mirror()
    with pytest.raises(CommitError, match=f"{bucket.url}/x/part.txt: SHA-256"):
        fetch_files(out, "part.txt")


def test_job_that_lost_its_lease_in_the_store_commits_nothing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    out = local_path(f"{bucket.url}/runs/x")
    write_whole(lease.lease_file(out), json.dumps({"token": "mine"}).encode())
    assert lease.lease_of(out, "mine") == f"mine {bucket.url}/runs/x.job.json"
    monkeypatch.setenv(lease.VARIABLE, lease.lease_of(out, "mine"))
    clear_mirror()  # the job runs on another host than its driver
    with pytest.raises(CommitError, match=r"runs/x.job.json: this job no longer holds the lease"):
        with commit_alone(out, stage="test") as staging:
            (staging / "part.txt").write_text("rows")
            bucket.put("runs/x.job.json", json.dumps({"token": "another"}).encode())
    assert not is_committed(out)
    bucket.put("runs/x.job.json", json.dumps({"token": "mine"}).encode())
    assert verify(commit(out))


def test_model_folder_inside_a_committed_url_is_found(bucket: Bucket) -> None:
    out = local_path(f"{bucket.url}/runs/export/key")
    with commit_alone(out, stage="export") as staging:
        server = staging / "model" / CODE_FOLDER / "infra" / "scoring_app.py"
        server.parent.mkdir(parents=True)
        server.write_text("")
    clear_mirror()
    assert model_folder(f"{bucket.url}/runs/export/key/model") == (out / "model", "infra.scoring_app")
    assert (out / "model" / CODE_FOLDER / "infra" / "scoring_app.py").is_file()


class Work(Config):
    """The configuration of the work that saves checkpoints."""

    step: int = 0


def checkpoints(bucket: Bucket) -> Checkpoints:
    return Checkpoints(local_path(f"{bucket.url}/runs/x.checkpoint"), ALONE, "test", {}, Work(), keeps=2)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {}, {}, {"note": f"step {step}"})


def test_another_machine_resumes_from_the_last_checkpoint_in_the_store(bucket: Bucket) -> None:
    kept = checkpoints(bucket)
    for step in (1, 2, 3):
        kept.begin(checkpoint(step))
        kept.finish()
    names = {key.split("/")[2] for key in bucket.keys("runs/x.checkpoint/")}
    assert names == {"step-000000000002", "step-000000000003"}
    clear_mirror()
    bucket.remove(f"runs/x.checkpoint/step-000000000003/{MANIFEST}")  # a partial upload
    resumed = checkpoints(bucket)
    found = resumed.load()
    assert found.step == 2 and found.values == {"note": "step 2"}
    resumed.save(checkpoint(3))
    resumed.remove()
    assert bucket.keys("runs/x.checkpoint/") == []


def test_altered_checkpoint_in_the_store_is_skipped(bucket: Bucket) -> None:
    kept = checkpoints(bucket)
    for step in (1, 2):
        kept.save(checkpoint(step))
    (key,) = [one for one in bucket.keys("runs/x.checkpoint/step-000000000002/") if one.endswith("values.json")]
    bucket.put(key, b"{}")
    clear_mirror()
    found = checkpoints(bucket).load()
    assert found.step == 1 and found.altered == ("step-000000000002",)
    assert {key.split("/")[2] for key in bucket.keys("runs/x.checkpoint/")} == {"step-000000000001"}


def on_own_node(world: World, folder: Path) -> World:
    """Set up a mirror for this rank alone, as on a node of its own, and return the rank's world."""
    os.environ.update(SIDESTACK_MIRROR=str(folder / f"node-{world.rank}"), LOCAL_WORLD_SIZE="1")
    return replace(world, local_rank=0)


def commit_on_two_nodes(world: World, url: str, folder: Path, names: list[str]) -> None:
    own = on_own_node(world, folder)
    with committing(local_path(url), own, stage="test") as staging:
        (staging / names[world.rank]).write_text(f"rank {world.rank}")


def test_nodes_without_a_shared_disk_upload_their_own_files(bucket: Bucket, tmp_path: Path) -> None:
    run_distributed(commit_on_two_nodes, f"{bucket.url}/x", tmp_path, ["a", "b"])
    assert verify(local_path(f"{bucket.url}/x")).files.keys() == {"a", "b"}
    assert (local_path(f"{bucket.url}/x") / "b").read_text() == "rank 1"
    assert not [path for path in tmp_path.glob("node-*/**/*") if path.is_file()]


def test_same_file_from_two_nodes_is_refused_and_nothing_is_committed(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="was written by ranks on two nodes; give the nodes one folder"):
        run_distributed(commit_on_two_nodes, f"{bucket.url}/x", tmp_path, ["a", "a"])
    assert not is_committed(local_path(f"{bucket.url}/x"))
    assert not [path for path in tmp_path.glob("node-*/**/*") if path.is_file()]
