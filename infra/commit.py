"""The commit protocol: a directory is either whole and described by its manifest, or it does not count.

The ranks fill a fresh temporary directory beside the target. Each syncs and hashes its share of the files; then rank 0
writes `manifest.json` and renames the directory. A reader ignores directories without a manifest and verifies the
others: that the manifest is unaltered, that the directory holds exactly the files it names, all of them regular files,
and each file's size and SHA-256. The same protocol serves checkpoints, caches, Parquet outputs and whole stages.
docs/integrity.md lists what verification cannot detect.

A directory may be in an object store (`infra.remote`). It is first written on this machine like any other, then its
files are uploaded, and it counts once its manifest is uploaded, which succeeds for one writer only. Nodes need not
share a disk: each uploads what its ranks wrote. Each reading node fetches the directory once, and verifies the copy.

A rank waits up to `infra.distributed.Timeouts.commit_s` for others to write, sync or hash. Only rank 0 removes the
temporary directory after a failure, so that no other rank removes it during the commit. If rank 0 is killed, the
directory stays, named `.<name>.<random>.tmp`; readers ignore it.
"""

import contextlib
import errno
import functools
import importlib.metadata
import itertools
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sidestack.infra.distributed import ALONE, World, broadcast, gather, raise_on_all_ranks
from sidestack.infra.errors import AlreadyCommittedError, CommitError
from sidestack.infra.files import (
    disk_error,
    folders_of,
    hash_all,
    make_folder,
    naming_disk_errors,
    regular_files,
    sync,
)
from sidestack.infra.lease import require_lease
from sidestack.infra.manifest import MANIFEST, FileEntry, Manifest, digests, is_committed
from sidestack.infra.remote import trees
from sidestack.infra.remote.urls import address, url_of
from sidestack.infra.sealed import seal

OWNER = ".owner"
"""The file that distinguishes a directory that is being written from another of the same name."""
VERSIONS = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchx", "pyarrow", "mlflow", "sidestack")


@contextlib.contextmanager
def committing(
    out: Path,
    world: World,
    *,
    stage: str,
    key: str = "",
    inputs: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    written: Mapping[str, FileEntry] | None = None,
) -> Iterator[Path]:
    """Open one temporary directory for all ranks, and commit it as `out` when every rank leaves without error.

    Args:
        out: the directory that appears, by rename, at the end. It must be missing or empty.
        world: the process group; every rank enters, any rank may write its own files.
        stage: the stage that writes it. key: the work's digest. inputs: name -> digest of an input's manifest.
        facts: read at commit time, so that the body may still add to the mapping it passed.
        written: name -> entry of files that this rank wrote and hashed while writing; also read at commit time. The
            other files are distributed over the ranks by name, and each rank hashes its share.

    Raises:
        AlreadyCommittedError: `out` is committed already, or another process committed it meanwhile; the committed
            directory stays, and the files written here are removed.
        CommitError: `out` holds files that are not ours or cannot be written, the disk is full, the ranks do not share
            a filesystem, a file in `written` is not as described, or this job lost its lease (`infra.lease`).
    """
    out, world = Path(out).absolute(), world.committing
    is_remote = url_of(out) is not None
    with raise_on_all_ranks(world, f"opening {out}"):
        require_free(out)
        require_lease()
    owner = broadcast(world, uuid.uuid4().hex)
    staging = out.with_name(f".{out.name}.{owner[:8]}.tmp")

    def manifest_of(files: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            stage=stage,
            key=key,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            inputs=dict(inputs or {}),
            facts=dict(facts or {}),
            versions=_versions(),
            files=files,
        )

    try:
        _open_staging(world, out, staging, owner)
        # Not under `raise_on_all_ranks`: a rank that fails in the body exits at once, and its launcher ends the
        # others, which may be waiting for it in a collective of the body.
        yield staging
        _commit_staging(world, out, staging, owner, written or {}, manifest_of)
    except BaseException as error:
        if world.is_main or (is_remote and world.local_rank == 0):
            shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise disk_error(out, error) from error
        raise


def _open_staging(world: World, out: Path, staging: Path, owner: str) -> None:
    """Create the temporary directory, on each node if `out` is a URL, and check that all ranks see it."""
    with raise_on_all_ranks(world, f"creating {staging}"), naming_disk_errors(out):
        if world.is_main:
            make_folder(out.parent)
            _create(staging, owner)
    if url_of(out) is not None:
        _create_on_each_node(world, out, staging, owner)
    _require_one_filesystem(world, staging, owner)


def _commit_staging(
    world: World,
    out: Path,
    staging: Path,
    owner: str,
    written: Mapping[str, FileEntry],
    manifest_of: Callable[[dict[str, FileEntry]], Manifest],
) -> None:
    """Describe all ranks' files, and commit them: in the object store if `out` is a URL, and by rename."""
    is_remote = url_of(out) is not None
    nodes = gather(world, (staging / OWNER).read_text(encoding="utf-8") if is_remote else owner)
    files, own = _describe_together(world, staging, nodes, written)
    if is_remote:
        with raise_on_all_ranks(world, f"putting {out}"):
            trees.put_files(out, staging, own, digests(files))
    with raise_on_all_ranks(world, f"committing {out}"), naming_disk_errors(out):
        if world.is_main:
            _require_own(staging, owner)
            require_lease()
            manifest = manifest_of(files)
            if is_remote:
                trees.commit(out, MANIFEST, seal(manifest), digests(files), owner)
            if len(set(nodes)) == 1:
                _seal(staging, out, manifest)
    if len(set(nodes)) > 1:  # several nodes: none has all files
        shutil.rmtree(staging, ignore_errors=True)


def commit_alone(
    out: Path,
    *,
    stage: str,
    key: str = "",
    inputs: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    written: Mapping[str, FileEntry] | None = None,
) -> AbstractContextManager[Path]:
    """Commit a directory that this process alone fills, independently of other ranks; no collective is called.

    Arguments and errors are those of `committing`. Two processes may commit the same `out`: the first to finish does,
    the other gets an `AlreadyCommittedError`.
    """
    return committing(out, ALONE, stage=stage, key=key, inputs=inputs, facts=facts, written=written)


def require_free(out: Path) -> None:
    """Check that `out` is free to be committed to.

    Raises:
        AlreadyCommittedError: it is committed already.
        CommitError: it is a file, a link or a mount point, holds something that is not ours, or cannot be read.
    """
    if url_of(out) is not None:
        return _require_free_url(out)
    try:
        if is_committed(out):
            raise AlreadyCommittedError(f"{out}: is committed already and is never overwritten; choose another --out")
        for is_fixed, what in ((out.is_symlink(), "link"), (out.is_mount(), "mount point")):
            if is_fixed:
                raise CommitError(f"{out}: is a {what}, which no directory can be renamed to; choose one below it")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CommitError(f"{out}: exists and is not a directory of ours (no {MANIFEST}); choose another --out")
    except OSError as error:
        raise disk_error(out, error) from error


def _require_free_url(out: Path) -> None:
    is_there, other = trees.inspect_directory(out, MANIFEST)
    if is_there:
        raise AlreadyCommittedError(
            f"{address(out)}: is committed already and is never overwritten; choose another --out"
        )
    if other is not None:
        raise CommitError(f"{address(out)}: has something that is not ours, {other}; choose another --out")


def _create(staging: Path, owner: str) -> None:
    staging.mkdir()
    (staging / OWNER).write_text(owner, encoding="utf-8")


def _create_on_each_node(world: World, out: Path, staging: Path, owner: str) -> None:
    """Create the temporary directory on nodes that do not see rank 0's: with a store, they need not share a disk."""
    with raise_on_all_ranks(world, f"creating {staging} on each node"), naming_disk_errors(out):
        if world.local_rank == 0 and not _is_own(staging, owner):
            make_folder(out.parent)
            _create(staging, f"{owner} {world.rank}")


def _require_one_filesystem(world: World, staging: Path, owner: str) -> None:
    """Check that every rank reads in `staging` what rank 0 wrote there.

    Raises:
        CommitError: on every rank; names the ranks that read something else, their hosts, and the directory.
    """
    seen = gather(world, (socket.gethostname(), _is_own(staging, owner)))
    others = [f"rank {rank} (host {host})" for rank, (host, is_seen) in enumerate(seen) if not is_seen]
    if others:
        raise CommitError(
            f"{staging.parent}: {', '.join(others)} cannot read what rank 0 (host {seen[0][0]}) writes there;"
            " all ranks must share one filesystem"
        )


def _is_own(staging: Path, owner: str) -> bool:
    file = staging / OWNER
    return file.is_file() and file.read_text(encoding="utf-8").partition(" ")[0] == owner


def _require_own(staging: Path, owner: str) -> None:
    """Check that the directory is still the one that was created, and remove its owner file.

    A driver removes the temporary directories that stages of a killed driver left. If such a stage still runs, its next
    file would create the directory anew, and it would commit that file alone.

    Raises:
        CommitError: another process removed the directory, and perhaps created it again.
    """
    if not _is_own(staging, owner):
        raise CommitError(f"{staging}: was removed by another process while it was written; nothing was committed")
    (staging / OWNER).unlink()


def _describe_together(
    world: World, staging: Path, nodes: Sequence[str], written: Mapping[str, FileEntry]
) -> tuple[dict[str, FileEntry], list[str]]:
    """Sync and describe all files, each by one rank; return when every rank has written.

    Args:
        world: the ranks. staging: the directory of the files. nodes: the node of each rank; ranks of one node see the
            same files. written: see `committing`.

    Returns:
        the entries of all files, the same on each rank, and the names of the files that this rank described.

    Raises:
        CommitError: a file is not as its writer described it, or two nodes wrote files of the same name.
    """
    with raise_on_all_ranks(world, f"syncing {staging}"):
        for name, entry in written.items():
            _check_written(staging / name, entry)
    claimed = gather(world, list(written))
    members = [rank for rank, node in enumerate(nodes) if node == nodes[world.rank]]
    of_node = {name for rank in members for name in claimed[rank]}
    with raise_on_all_ranks(world, f"listing {staging}"):
        listed = (
            [name for name in regular_files(staging) if name not in {*of_node, OWNER, MANIFEST}]
            if world.rank == members[0]
            else []
        )
    names = gather(world, listed)[members[0]]
    with raise_on_all_ranks(world, f"hashing {staging}"):
        described = _describe(staging, names[members.index(world.rank) :: len(members)])
    own = {**written, **described}
    entries = gather(world, own)
    names = sorted(name for part in entries for name in part)
    twice = next((name for name, after in itertools.pairwise(names) if name == after), None)
    if twice is not None and len(set(nodes)) > 1:
        raise CommitError(
            f"{staging / twice}: was written by ranks on two nodes; give the nodes one folder (SIDESTACK_MIRROR) on a"
            " filesystem that they share, or run this stage on one node"
        )
    return dict(sorted(item for part in entries for item in part.items())), list(own)


def _check_written(file: Path, entry: FileEntry) -> None:
    """Sync a file, and check that it has the size that its writer counted."""
    sync(file)
    size = file.stat().st_size
    if size != entry.bytes:
        raise CommitError(f"{file}: has {size} bytes, its writer counted {entry.bytes}")


def _describe(root: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    for name in names:
        sync(root / name)
    digests = hash_all(root, names)
    return {
        name: FileEntry(
            sha256=digests[name],
            bytes=(root / name).stat().st_size,
            rows=pq.read_metadata(root / name).num_rows if name.endswith(".parquet") else None,
        )
        for name in names
    }


def _seal(staging: Path, out: Path, manifest: Manifest) -> None:
    file = staging / MANIFEST
    file.write_bytes(seal(manifest))
    sync(file)
    for folder in {staging, *(parent for name in manifest.files for parent in folders_of(staging, name))}:
        sync(folder)
    if url_of(out) is not None:
        shutil.rmtree(out, ignore_errors=True)  # a full or partial copy of a directory that is no longer in the store
    try:
        staging.rename(out)  # replaces an empty directory, but never one that another process has filled
    except OSError as error:
        if is_committed(out):
            raise AlreadyCommittedError(f"{out}: was committed by another process meanwhile") from error
        raise
    sync(out.parent)


@functools.cache  # a date's partitions are small: reading packages' metadata takes longer than writing one
def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
