"""The commit protocol: a directory is either whole and described by its manifest, or it does not count.

The ranks fill a fresh temporary directory beside the target. Each syncs and hashes its share of the files; then rank 0
writes `manifest.json` and renames. A reader ignores what has no manifest and verifies what has: that the manifest is as
it was written, that the directory holds the files it names and no others, all of them regular files, and each file's
size and SHA-256. The same protocol carries checkpoints, caches, Parquet outputs and whole stages. What
verification cannot find is told in docs/integrity.md.

A directory may lie in an object store (`infra.remote`). It is then written on this machine as any other, its files are
put into the store, and it counts once its manifest is put there, which succeeds for one writer alone. Nodes need not
share a disk: each puts what its ranks wrote. A reader fetches it once a node, and verifies the copy.

A rank that waits for others to write, sync or hash waits as long as `infra.distributed.Timeouts.commit_s`. Rank 0 alone
removes the temporary directory after a failure, so that no other rank takes away what is being sealed. Where rank 0 is
killed it stays, named `.<name>.<random>.tmp`; readers ignore it.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import itertools
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import ValidationError

from sidestack.infra.config import Config
from sidestack.infra.distributed import ALONE, World, broadcast, gather, raise_on_all_ranks
from sidestack.infra.errors import AlreadyCommittedError, CommitError
from sidestack.infra.lease import require_lease
from sidestack.infra.logs import LOG
from sidestack.infra.record import HISTORY_FILE, SUMMARY_FILE
from sidestack.infra.remote import copies, trees
from sidestack.infra.remote.urls import address, url_of
from sidestack.infra.sealed import OWN_DIGEST, sealed, unsealed

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

    On disk it holds a digest of itself (`infra.sealed`), so that an edited key, stage or fact is found. Manifests of
    format `sidestack/1` hold none; they are read, and the first that a process reads is said on stderr.
    """

    format: Literal["sidestack/1", "sidestack/2"] = "sidestack/2"
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

    @classmethod
    def of_json(cls, content: bytes, file: str) -> "Manifest":
        """Parse the content of a manifest's file.

        Raises:
            CommitError: it is none of ours, or was altered.
        """
        values, has_digest = unsealed(content, file)
        try:
            manifest = cls.model_validate(values)
        except ValidationError as error:
            raise CommitError(f"{file}: not a sidestack manifest ({error.error_count()} faults)") from error
        if has_digest != (manifest.format != _WITHOUT_DIGEST):
            raise CommitError(f"{file}: format {manifest.format!r} does not go with its {OWN_DIGEST}: it was altered")
        if not has_digest:
            _say_without_digest(file)
        return manifest


_WITHOUT_DIGEST = "sidestack/1"
_said_without_digest: list[str] = []


def _say_without_digest(file: str) -> None:
    if not _said_without_digest:
        _said_without_digest.append(file)
        LOG.warning(
            f"{file}: was committed by an earlier version, whose manifests hold no digest of themselves: its files are"
            " checked, an edited key or fact of it is not found; so with others of that version"
        )


def is_committed(path: Path) -> bool:
    """Whether the directory carries a manifest."""
    if url_of(path) is not None:
        return trees.read_manifest_bytes(Path(path), MANIFEST) is not None
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: Path, *, stage: str | None = None, key: str | None = None) -> Manifest:
    """Read a committed directory's manifest without hashing its files.

    Args:
        path: the directory. stage, key: what its manifest must say, where they are given.

    Raises:
        CommitError: there is no manifest, it is not one of ours or was altered, or it is of another stage or key.
    """
    found = find_manifest(path, stage=stage, key=key)
    if found is None:
        raise CommitError(f"{address(path)}: not a committed directory (no {MANIFEST})")
    return found


def find_manifest(path: Path | str, *, stage: str | None = None, key: str | None = None) -> Manifest | None:
    """Read a committed directory's manifest; None where the directory is not committed.

    Args:
        path: the directory. stage, key: see `read_manifest`.

    Raises:
        CommitError: the manifest is not one of ours or was altered, or it is of another stage or key.
    """
    file = f"{address(path)}/{MANIFEST}"
    content = _manifest_bytes(path, file)
    if content is None:
        return None
    found = Manifest.of_json(content, file)
    for what, is_there, wanted in (("stage", found.stage, stage), ("key", found.key, key)):
        if wanted is not None and is_there != wanted:
            raise CommitError(
                f"{address(path)}: is of {what} {is_there[:24]!r}, not of {wanted[:24]!r}: another one's output"
            )
    return found


def _manifest_bytes(path: Path | str, file: str) -> bytes | None:
    if url_of(path) is not None:
        return trees.read_manifest_bytes(Path(path), MANIFEST)
    try:
        with open_regular(file) as opened:
            return opened.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CommitError(f"{file}: cannot be read: {error.strerror}") from error


def verify(path: Path, *, stage: str | None = None, key: str | None = None) -> Manifest:
    """Read the manifest and check every file's size and SHA-256 against it; of a URL, those of this machine's copy,
    which is fetched where there is none.

    Args:
        path: the directory. stage, key: see `read_manifest`.

    Raises:
        CommitError: see `read_manifest`; a file is missing, of another size, altered, not named in the manifest, not a
            regular file, or cannot be read.
    """
    path = Path(path)
    manifest = read_manifest(path, stage=stage, key=key)
    try:
        if url_of(path) is None:
            _verify_files(path, manifest)
        else:
            _verify_copy(path, manifest)
    except OSError as error:
        raise CommitError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    return manifest


def _verify_copy(path: Path, manifest: Manifest) -> None:
    """Check this machine's copy of a directory in a store, and fetch it if it is missing, altered or out of date.

    Raises:
        CommitError: what the store has is not what its manifest says. OSError: the copy cannot be read or written.
    """
    with contextlib.suppress(CommitError, FileNotFoundError):
        if Manifest.of_json((path / MANIFEST).read_bytes(), str(path)) == manifest:
            return _verify_files(path, manifest)
    with trees.fetching(path, list(manifest.files), _digests(manifest.files)) as staging:
        (staging / MANIFEST).write_bytes(sealed(manifest))
        try:
            _verify_files(staging, manifest)
        except CommitError as error:
            raise CommitError(str(error).replace(str(staging), address(path))) from error
    return None


def fetched(path: Path) -> Path:
    """Return a committed directory whose files are on this machine: of a URL, its copy, verified; a local one as it is.

    Raises:
        CommitError: see `verify`.
    """
    if url_of(path) is not None:
        verify(path)
    return path


def fetch_files(path: Path, *names: str) -> None:
    """Have some files of a committed directory on this machine, those of them that it has; no-op for a local path.

    Raises:
        CommitError: the directory is not committed, or a file in the store is not what its manifest says.
    """
    if url_of(path) is None:
        return
    manifest = read_manifest(path)
    files = {name: entry for name, entry in manifest.files.items() if name in names}
    lacking = []
    for name, entry in files.items():
        try:
            _require_bytes(path, {name: entry})
        except (CommitError, OSError):
            lacking.append(name)
    if not lacking:
        return
    with trees.fetching_into(path, lacking, _digests(manifest.files)) as staging:
        try:
            _require_bytes(staging, {name: files[name] for name in lacking})
        except CommitError as error:
            raise CommitError(str(error).replace(str(staging), address(path))) from error


def require_whole(path: Path, *, stage: str | None = None, key: str | None = None) -> None:
    """Check a directory that others will read: as `verify` does; of a URL the sizes of its files, which stay there.

    Raises:
        CommitError: see `verify`.
    """
    if url_of(path) is None:
        verify(path, stage=stage, key=key)
        return
    manifest = read_manifest(path, stage=stage, key=key)
    found = trees.sizes(Path(path), _digests(manifest.files))
    for name, entry in manifest.files.items():
        if found.get(name) != entry.bytes:
            there = f"has {found[name]} bytes" if name in found else "is missing"
            raise CommitError(f"{address(path)}/{name}: {there}, {MANIFEST} says {entry.bytes}")


def _digests(files: Mapping[str, FileEntry]) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in files.items()}


def verify_file(path: Path, name: str) -> Manifest:
    """Check one file of a committed directory against its manifest, and no other.

    Raises:
        CommitError: see `verify`.
    """
    manifest = read_manifest(path)
    try:
        if name not in manifest.files:
            raise CommitError(f"{path / name}: is not in {MANIFEST}")
        fetch_files(path, name)
        _require_bytes(path, {name: manifest.files[name]})
    except OSError as error:
        raise CommitError(f"{path / name}: cannot be read: {error.strerror}") from error
    return manifest


def _verify_files(path: Path, manifest: Manifest) -> None:
    present = set(regular_files(path)) - {MANIFEST}
    for name in sorted(present - set(manifest.files)):
        raise CommitError(f"{path / name}: is not in {MANIFEST}: the directory was altered after its commit")
    for name in manifest.files:
        if name not in present:
            raise CommitError(f"{path / name}: is named in {MANIFEST} but missing")
    _require_bytes(path, manifest.files)


def _require_bytes(path: Path, files: Mapping[str, FileEntry]) -> None:
    """Check that files have the sizes and SHA-256 of their entries.

    Raises:
        CommitError: one has others. OSError: one cannot be read.
    """
    for name, entry in files.items():
        size = (path / name).stat().st_size
        if size != entry.bytes:
            raise CommitError(f"{path / name}: has {size} bytes, {MANIFEST} says {entry.bytes}: truncated or altered")
    for name, found in hash_all(path, list(files)).items():
        if found != files[name].sha256:
            raise CommitError(f"{path / name}: SHA-256 {found[:12]}… is not the {MANIFEST}'s: the file was altered")


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
    is_remote = url_of(out) is not None
    with raise_on_all_ranks(world, f"opening {out}"):
        refuse_taken(out)
        require_lease()
    owner = broadcast(world, uuid.uuid4().hex)
    staging = out.with_name(f".{out.name}.{owner[:8]}.tmp")
    try:
        with raise_on_all_ranks(world, f"creating {staging}"), _naming_disk_errors(out):
            if world.is_main:
                make_folder(out.parent)
                _create(staging, owner)
        if is_remote:
            _create_on_each_node(world, out, staging, owner)
        _require_one_filesystem(world, staging, owner)
        # Not under `raise_on_all_ranks`: a rank that fails in the body leaves at once, and its launcher ends the
        # others, which may be waiting for it in a collective of the body.
        yield staging
        nodes = gather(world, (staging / OWNER).read_text(encoding="utf-8") if is_remote else owner)
        files, own = _describe_together(world, staging, nodes, written or {})
        if is_remote:
            with raise_on_all_ranks(world, f"putting {out}"):
                trees.put_files(out, staging, own, _digests(files))
        with raise_on_all_ranks(world, f"committing {out}"), _naming_disk_errors(out):
            if world.is_main:
                _require_own(staging, owner)
                require_lease()
                manifest = Manifest(
                    stage=stage,
                    key=key,
                    created=datetime.now(UTC).isoformat(timespec="seconds"),
                    inputs=dict(inputs or {}),
                    facts=dict(facts or {}),
                    versions=_versions(),
                    files=files,
                )
                if is_remote:
                    trees.commit(out, MANIFEST, sealed(manifest), _digests(files), owner)
                if len(set(nodes)) == 1:
                    _seal(staging, out, manifest)
        if len(set(nodes)) > 1:  # no node has all files
            shutil.rmtree(staging, ignore_errors=True)
    except BaseException as error:
        if world.is_main or (is_remote and world.local_rank == 0):
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
    """Write one file, and the folders it lies in, so that a reader sees all of it or what was there before, even after
    a crash; a URL's both on this machine and in the store.

    Raises:
        CommitError: it cannot be written, or the disk is full.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _naming_disk_errors(file):
            make_folder(file.parent)
            temporary.write_bytes(content)
            _sync(temporary)
            temporary.replace(file)
            _sync(file.parent)
        copies.put(file)
    finally:
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, so that they stay after a crash.

    Raises:
        OSError: one cannot be made.
    """
    for folder in reversed([one for one in (path, *path.parents) if not one.exists()]):
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def refuse_taken(out: Path) -> None:
    """Check that `out` is free to be committed to.

    Raises:
        AlreadyCommittedError: it is committed already.
        CommitError: it is a file, a link or a mount point, holds something that is not ours, or cannot be looked at.
    """
    if url_of(out) is not None:
        return _refuse_taken_url(out)
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


def _refuse_taken_url(out: Path) -> None:
    is_there, other = trees.what_is_there(out, MANIFEST)
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
    """Make the temporary directory on nodes that do not see rank 0's: with a store, they need not share a disk."""
    with raise_on_all_ranks(world, f"creating {staging} on each node"), _naming_disk_errors(out):
        if world.local_rank == 0 and not _is_own(staging, owner):
            make_folder(out.parent)
            _create(staging, f"{owner} {world.rank}")


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
    return file.is_file() and file.read_text(encoding="utf-8").partition(" ")[0] == owner


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


def _describe_together(
    world: World, staging: Path, nodes: Sequence[str], written: Mapping[str, FileEntry]
) -> tuple[dict[str, FileEntry], list[str]]:
    """Sync and describe all files, each by one rank; returns when every rank has written.

    Args:
        world: the ranks. staging: where the files lie. nodes: of each rank, what names its node, whose ranks see the
            same files. written: see `committing`.

    Returns:
        the entries of all files, the same on each rank, and the names of those that this rank described.

    Raises:
        CommitError: a file is not as its writer described it, or two nodes wrote one of the same name.
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
    file.write_bytes(sealed(manifest))
    _sync(file)
    for folder in {staging, *(parent for name in manifest.files for parent in _folders(staging, name))}:
        _sync(folder)
    if url_of(out) is not None:
        shutil.rmtree(out, ignore_errors=True)  # a copy, or a part of one, of what the store has no longer
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


def _folders(root: Path, name: str) -> Iterable[Path]:
    """Return the folders between a directory and a file in it."""
    return (root / parent for parent in Path(name).parents[:-1])


def regular_files(root: Path) -> list[str]:
    """List the files of a directory and the folders in it, by their paths from it, in order.

    Raises:
        CommitError: there is something else in it: a link, FIFO, socket or device. A link's target may change unseen,
            and reading a FIFO waits for a writer.
    """
    names: list[str] = []
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    names.append(Path(entry.path).relative_to(root).as_posix())
                else:
                    raise _not_regular(entry.path, entry.stat(follow_symlinks=False).st_mode)
    return sorted(names)


_KINDS = {
    stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
    stat.S_IFDIR: "directory",
}  # fmt: skip


def _not_regular(path: str | Path, mode: int) -> CommitError:
    return CommitError(f"{path}: is a {_KINDS[stat.S_IFMT(mode)]}; a committed directory has regular files alone")


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file of a committed directory for reading; returns at once, where a FIFO would wait for a writer.

    Raises:
        CommitError: it is a link, FIFO, socket, device or directory. OSError: it cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # what Linux says of a link, and of a socket
            raise _not_regular(path, os.lstat(path).st_mode) from error
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise _not_regular(path, mode)
    return os.fdopen(handle, "rb")


def hash_all(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 (hex) of files by their names, which are paths within a folder."""
    # hashlib releases the GIL, so threads read and hash several files at once.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(root / name), names), strict=True))


def _hash(path: Path) -> str:
    with open_regular(path) as file:
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
