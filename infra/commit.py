"""The commit protocol: a directory is either whole and described by its manifest, or it does not count.

A writer fills a fresh temporary directory beside the target, syncs every file, writes `manifest.json` last, and
renames. A reader ignores what has no manifest and verifies what has: sizes and SHA-256 of every file. The same
protocol carries checkpoints, caches, Parquet outputs and whole stages.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.config import Config
from infra.distributed import World, barrier, broadcast, together
from infra.errors import CommitError
from infra.record import HISTORY_FILE, SUMMARY_FILE

MANIFEST = "manifest.json"
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
    file = Path(path) / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise CommitError(f"{path}: not a committed directory (no {MANIFEST})") from error
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
    for name, found in _hash_all(path, list(manifest.files)).items():
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
) -> Iterator[Path]:
    """Give all ranks one temporary directory, and commit it as `out` when every rank leaves without error.

    Args:
        out: the directory to appear, by rename, at the end. It must not exist, or be empty.
        world: the process group; every rank enters, any rank may write its own files.
        stage: what made it. key: the work's digest. inputs: name -> digest of an input's manifest.
        facts: read at commit time, so that the body may still add to the mapping it passed.

    Raises:
        CommitError: `out` is committed already (never overwritten) or holds files that are not ours, or the disk
            is full.
    """
    out = Path(out).absolute()
    with together(world, f"opening {out}"):
        refuse_taken(out)
    staging = Path(broadcast(world, str(out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"))))
    with together(world, f"creating {staging}"):
        staging.mkdir(parents=True, exist_ok=True)
    try:
        # Not under `together`: a rank that fails in the body leaves at once, and its launcher ends the others,
        # which may be waiting for it in a collective of the body.
        yield staging
        barrier(world)  # nobody seals before everybody has written
        with together(world, f"committing {out}"):
            if world.is_main:
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
                        files=_describe(staging),
                    ),
                )
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CommitError(f"{out}: no space left on the disk; nothing was committed") from error
        raise


def refuse_taken(out: Path) -> None:
    """Check that `out` is free to be committed to.

    Raises:
        CommitError: it is a file, is committed already, or holds something that is not ours.
    """
    if is_committed(out):
        raise CommitError(f"{out}: is committed already and is never overwritten; choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommitError(f"{out}: exists and is not a directory of ours (no {MANIFEST}); choose another --out")


def _seal(staging: Path, out: Path, manifest: Manifest) -> None:
    file = staging / MANIFEST
    file.write_text(manifest.model_dump_json(indent=1))
    _sync(file)
    _sync(staging)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    staging.rename(out)
    _sync(out.parent)


def _describe(root: Path) -> dict[str, FileEntry]:
    names = _files(root)
    for name in names:
        _sync(root / name)
    digests = _hash_all(root, names)
    return {
        name: FileEntry(
            sha256=digests[name],
            bytes=(root / name).stat().st_size,
            rows=pq.read_metadata(root / name).num_rows if name.endswith(".parquet") else None,
        )
        for name in names
    }


def _files(root: Path) -> list[str]:
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def _hash_all(root: Path, names: list[str]) -> dict[str, str]:
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


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
