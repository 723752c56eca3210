"""The commit protocol: a directory is either whole and described by its manifest, or it does not count.

The ranks fill a fresh temporary directory beside the target. Each syncs and hashes its share of the files; then rank 0
writes `manifest.json` and renames. A reader ignores what has no manifest and verifies what has: sizes and SHA-256 of
every file. The same protocol carries checkpoints, caches, Parquet outputs and whole stages.

A rank that waits for others to write, sync or hash waits as long as `infra.distributed.Timeouts.commit_s`. Rank 0 alone
removes the temporary directory after a failure, so that no other rank takes away what is being sealed. Where rank 0 is
killed it stays, named `.<name>.<random>.tmp`; readers ignore it.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.config import Config
from infra.distributed import ALONE, World, broadcast, gather, together
from infra.errors import AlreadyCommittedError, CommitError
from infra.lease import require_lease
from infra.record import HISTORY_FILE, SUMMARY_FILE

MANIFEST = "manifest.json"
OWNER = ".owner"
"""The file by which a directory that is being written is told from another of its name."""
VERSIONS = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchx", "pyarrow", "mlflow", "sidestack")


class FileEntry(Config):
    """What the manifest says of one file: digest, size, and the number of rows where it is a Parquet file."""

    sha256: str
    bytes: int
    rows: int | None = None


class Manifest(Config):
    """The description of a committed directory, and by its presence the mark that it is whole.

    `key` names the work (config, inputs, code), `inputs` the digests of the manifests it was made from, `facts`
    what the stage adds (the resolved config's digest, world size, a codebook's fingerprint).
    """

    format: Literal["sidestack/1"] = "sidestack/1"
    stage: str
    key: str = ""
    created: str
    inputs: dict[str, str] = {}
    facts: dict[str, Any] = {}
    versions: dict[str, str] = {}
    files: dict[str, FileEntry]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of the files, the stage's record aside.

        The record (history and summary) tells how long things took; without it, the same work made twice has the same
        digest, and what comes after it the same key.
        """
        data = {name: entry.sha256 for name, entry in self.files.items() if name not in (HISTORY_FILE, SUMMARY_FILE)}
        lines = [f"{name} {sha256}" for name, sha256 in sorted(data.items())]
        return hashlib.sha256("\n".join([self.stage, *lines]).encode()).hexdigest()


def is_committed(path: Path) -> bool:
    """Whether the directory carries a manifest."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read a committed directory's manifest without hashing its files.

    Raises:
        CommitError: there is no manifest, or it is not one of ours.
    """
    found = find_manifest(path)
    if found is None:
        raise CommitError(f"{path}: not a committed directory (no {MANIFEST})")
    return found


def find_manifest(path: Path | str) -> Manifest | None:
    """Read a committed directory's manifest; None where the directory is not committed.

    Raises:
        CommitError: the manifest is not one of ours.
    """
    file = f"{path}/{MANIFEST}"
    try:
        with Path(file).open("rb") as opened:
            return Manifest.model_validate_json(opened.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise CommitError(f"{file}: not a sidestack manifest ({error.error_count()} faults)") from error


def verify(path: Path) -> Manifest:
    """Read the manifest and check every file's size and SHA-256 against it.

    Raises:
        CommitError: a file is missing, of another size, altered, or not named in the manifest.
    """
    path = Path(path)
    manifest = read_manifest(path)
    present = set(_files(path))
    for name in sorted(present - set(manifest.files)):
        raise CommitError(f"{path / name}: is not in {MANIFEST}: the directory was altered after its commit")
    for name, entry in manifest.files.items():
        if name not in present:
            raise CommitError(f"{path / name}: is named in {MANIFEST} but missing")
        size = (path / name).stat().st_size
        if size != entry.bytes:
            raise CommitError(f"{path / name}: has {size} bytes, {MANIFEST} says {entry.bytes}: truncated or altered")
    for name, found in hash_all(path, list(manifest.files)).items():
        if found != manifest.files[name].sha256:
            raise CommitError(f"{path / name}: SHA-256 {found[:12]}… is not the {MANIFEST}'s: the file was altered")
    return manifest


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
        out: the directory to appear, by rename, at the end. It must not exist, or be empty.
        world: the process group; every rank enters, any rank may write its own files.
        stage: what made it. key: the work's digest. inputs: name -> digest of an input's manifest.
        facts: read at commit time, so that the body may still add to the mapping it passed.
        written: name -> entry of files that this rank wrote and hashed while writing; read at commit time, too. The
            other files are shared out over the ranks by name, each of which hashes its share.

    Raises:
        AlreadyCommittedError: `out` is committed already, or another process committed it meanwhile; what is there
            stays, and what was written here is removed.
        CommitError: `out` holds files that are not ours or cannot be written, the disk is full, the ranks do not see
            one filesystem, a file in `written` is not as described, or this job lost its lease (`infra.lease`).
    """
    out, world = Path(out).absolute(), world.committing
    with together(world, f"opening {out}"):
        refuse_taken(out)
        require_lease()
    owner = broadcast(world, uuid.uuid4().hex)
    staging = out.with_name(f".{out.name}.{owner[:8]}.tmp")
    try:
        with together(world, f"creating {staging}"), _naming_disk_errors(out):
            if world.is_main:
                staging.mkdir(parents=True)
                (staging / OWNER).write_text(owner)
        _require_one_filesystem(world, staging, owner)
        # Not under `together`: a rank that fails in the body leaves at once, and its launcher ends the others,
        # which may be waiting for it in a collective of the body.
        yield staging
        files = _describe_together(world, staging, written or {})
        with together(world, f"committing {out}"), _naming_disk_errors(out):
            if world.is_main:
                _require_own(staging, owner)
                require_lease()
                _seal(
                    staging,
                    out,
                    Manifest(
                        stage=stage,
                        key=key,
                        created=datetime.now(UTC).isoformat(timespec="seconds"),
                        inputs=dict(inputs or {}),
                        facts=dict(facts or {}),
                        versions=_versions(),
                        files=files,
                    ),
                )
    except BaseException as error:
        if world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise _disk_error(out, error) from error
        raise


def commit_alone(
    out: Path,
    *,
    stage: str,
    key: str = "",
    inputs: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    written: Mapping[str, FileEntry] | None = None,
) -> AbstractContextManager[Path]:
    """Commit a directory that this process alone fills, whatever other ranks do; no collective is called.

    Arguments and errors are those of `committing`. Two processes may commit the same `out`: the first to finish does,
    the other gets an `AlreadyCommittedError`.
    """
    return committing(out, ALONE, stage=stage, key=key, inputs=inputs, facts=facts, written=written)


def write_whole(file: Path, content: bytes) -> None:
    """Write one file so that a reader sees all of it or what was there before, even after a crash.

    Raises:
        CommitError: it cannot be written, or the disk is full.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _naming_disk_errors(file):
            temporary.write_bytes(content)
            _sync(temporary)
            temporary.replace(file)
            _sync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_taken(out: Path) -> None:
    """Check that `out` is free to be committed to.

    Raises:
        AlreadyCommittedError: it is committed already.
        CommitError: it is a file, a link or a mount point, holds something that is not ours, or cannot be looked at.
    """
    try:
        if is_committed(out):
            raise AlreadyCommittedError(f"{out}: is committed already and is never overwritten; choose another --out")
        for is_fixed, what in ((out.is_symlink(), "link"), (out.is_mount(), "mount point")):
            if is_fixed:
                raise CommitError(f"{out}: is a {what}, which no directory can be renamed to; choose one below it")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CommitError(f"{out}: exists and is not a directory of ours (no {MANIFEST}); choose another --out")
    except OSError as error:
        raise _disk_error(out, error) from error


def _require_one_filesystem(world: World, staging: Path, owner: str) -> None:
    """Check that every rank reads in `staging` what rank 0 wrote there.

    Raises:
        CommitError: on every rank; names the ranks that do not, their hosts, and the directory.
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
    return file.is_file() and file.read_text() == owner


def _require_own(staging: Path, owner: str) -> None:
    """Check that the directory is still the one that was made, and end its mark.

    A driver removes what a killed one's stages left. Where such a stage lives, a file that it writes later would make
    the directory anew, and it would commit that file alone.

    Raises:
        CommitError: it was removed, and maybe made again, by another process.
    """
    if not _is_own(staging, owner):
        raise CommitError(f"{staging}: was removed by another process while it was written; nothing was committed")
    (staging / OWNER).unlink()


def _describe_together(world: World, staging: Path, written: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Sync and describe all files, each by one rank; returns when every rank has written, the same on each."""
    with together(world, f"syncing {staging}"):
        for name, entry in written.items():
            _check_written(staging / name, entry)
    claimed = {name for names in gather(world, list(written)) for name in names}
    with together(world, f"listing {staging}"):
        listed = [name for name in _files(staging) if name not in {*claimed, OWNER}] if world.is_main else []
    names = broadcast(world, listed)
    with together(world, f"hashing {staging}"):
        described = _describe(staging, names[world.rank :: world.size])
    entries = gather(world, {**written, **described})
    return dict(sorted(item for part in entries for item in part.items()))


def _check_written(file: Path, entry: FileEntry) -> None:
    """Sync a file, and check that it has the size that its writer counted."""
    _sync(file)
    size = file.stat().st_size
    if size != entry.bytes:
        raise CommitError(f"{file}: has {size} bytes, its writer counted {entry.bytes}")


def _describe(root: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    for name in names:
        _sync(root / name)
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
    file.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    _sync(file)
    _sync(staging)
    try:
        staging.rename(out)  # over an empty directory, but never over one that another process has filled
    except OSError as error:
        if is_committed(out):
            raise AlreadyCommittedError(f"{out}: was committed by another process meanwhile") from error
        raise
    _sync(out.parent)


@contextlib.contextmanager
def _naming_disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _disk_error(out, error) from error


def _disk_error(out: Path, error: OSError) -> CommitError:
    is_full = error.errno == errno.ENOSPC
    reason = "no space left on the disk" if is_full else f"cannot be written ({error.strerror})"
    return CommitError(f"{out}: {reason}; nothing was committed")


def _files(root: Path) -> list[str]:
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def hash_all(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 (hex) of files by their names, which are paths within a folder."""
    # hashlib releases the GIL, so threads read and hash several files at once.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(root / name), names), strict=True))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@functools.cache  # a day's partitions are small, and reading packages' metadata takes longer than writing one
def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
