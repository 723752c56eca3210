"""Google's, Azure's and Hadoop's stores, by pyarrow.fs, which has no conditional put.

Credentials come from each one's usual chain. `write_new` checks, writes, and reads back: two writers at the same moment
may both succeed. The output's lease still prevents this for jobs of a driver.
"""

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from pyarrow import fs

from sidestack.infra.errors import RemoteError
from sidestack.infra.masking import one_line
from sidestack.infra.remote.objects import Found, Retries, UnavailableError

_RETRY = timedelta(seconds=20)
"""Retry limit: Google's client retries for a quarter of an hour by default."""
_CHUNK = 8 << 20
_HAS_FOLDERS = ("hdfs", "file")
"""Stores in which a file is visible while it is written, and empty folders stay."""


def filesystem_of(scheme: str, host: str) -> Any:
    """Return pyarrow's filesystem for a bucket, container or name node.

    Raises:
        RemoteError: this build of pyarrow has none for the scheme, or the store's client lacks settings or a library.
    """
    try:
        if scheme == "gs":
            return fs.GcsFileSystem(retry_time_limit=_RETRY)
        filesystem, _ = fs.FileSystem.from_uri(f"{scheme}://{host}/")
        return filesystem
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise RemoteError(f"{scheme}://{host}: cannot be opened: {one_line(error)}") from error


class ArrowObjects:
    """The objects of one bucket; see `infra.remote.objects.Objects`."""

    def __init__(self, filesystem: Any, scheme: str, host: str) -> None:
        """Hold a pyarrow filesystem."""
        self._fs = filesystem
        self._scheme = scheme
        self._host = host
        self._retries = Retries()

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes; None: there is none."""

        def get() -> bytes | None:
            with self._translate_errors(key):
                if self._fs.get_file_info(self._path(key)).type != fs.FileType.File:
                    return None
                with self._fs.open_input_stream(self._path(key)) as opened:
                    content: bytes = opened.read()
                    return content

        return self._retries.call(get)

    def write(self, key: str, content: bytes) -> None:
        """Write an object, or replace it."""

        def put() -> None:
            with self._translate_errors(key), self._writing(key) as opened:
                opened.write(content)

        self._retries.call(put)

    def write_new(self, key: str, content: bytes, writer: str) -> bool:
        """Write an object unless there is one; return whether the object then has this writer's bytes."""
        found = self.read(key)
        if found is None:
            self.write(key, content)
            found = self.read(key)
        return found == content

    def upload(self, file: Path, key: str) -> None:
        """Write a local file's bytes as an object."""

        def put() -> None:
            with self._translate_errors(key), file.open("rb") as source, self._writing(key) as opened:
                shutil.copyfileobj(source, opened, _CHUNK)

        self._retries.call(put)

    def download(self, key: str, file: Path) -> None:
        """Write an object's bytes into a local file."""

        def get() -> None:
            with (
                self._translate_errors(key),
                self._fs.open_input_stream(self._path(key)) as source,
                file.open("wb") as opened,
            ):
                shutil.copyfileobj(source, opened, _CHUNK)

        self._retries.call(get)

    def listed(self, prefix: str, at_most: int | None = None) -> list[Found]:
        """Return the objects whose keys begin with a prefix, in order; all, or the first `at_most`."""
        folder = prefix.rpartition("/")[0]

        def found() -> list[Found]:
            with self._translate_errors(prefix):
                selector = fs.FileSelector(self._path(folder), recursive=True, allow_not_found=True)
                infos = self._fs.get_file_info(selector)
            files = [one for one in infos if one.type == fs.FileType.File]
            own = [Found(self._key(one.path), one.size, one.mtime_ns or 0) for one in files]
            return sorted(one for one in own if one.key.startswith(prefix))[:at_most]

        return self._retries.call(found)

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects; missing ones are ignored."""
        for key in keys:

            def delete(key: str = key) -> None:
                with self._translate_errors(key), contextlib.suppress(FileNotFoundError):
                    self._fs.delete_file(self._path(key))

            self._retries.call(delete)

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[Any]:
        """Open an object for writing; it appears atomically."""
        if self._scheme not in _HAS_FOLDERS:
            with self._fs.open_output_stream(self._path(key)) as opened:
                yield opened
            return
        folder, _, name = key.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        self._fs.create_dir(self._path(folder), recursive=True)
        with self._fs.open_output_stream(self._path(temporary)) as opened:
            yield opened
        with contextlib.suppress(FileNotFoundError):
            if self._scheme == "hdfs":  # its rename does not replace files
                self._fs.delete_file(self._path(key))
        self._fs.move(self._path(temporary), self._path(key))

    def _path(self, key: str) -> str:
        """Return a key as a path of the filesystem: below the bucket, unless the host is the whole store."""
        return f"/{key}" if self._scheme in _HAS_FOLDERS else f"{self._container}/{key}".rstrip("/")

    def _key(self, path: str) -> str:
        return path.removeprefix("/") if self._scheme in _HAS_FOLDERS else path.removeprefix(f"{self._container}/")

    @property
    def _container(self) -> str:
        """The bucket; for `container@account.dfs.core.windows.net` the container."""
        return self._host.partition("@")[0]

    @contextlib.contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        """Convert pyarrow's errors into ours."""
        url = f"{self._scheme}://{self._host}/{key}".rstrip("/")
        try:
            yield
        except FileNotFoundError as error:
            raise RemoteError(f"{url}: there is no such bucket or object; correct the URL") from error
        except PermissionError as error:
            raise RemoteError(f"{url}: no permission: {one_line(error)}") from error
        except (TimeoutError, ConnectionError) as error:
            raise UnavailableError(f"{url}: the store cannot be reached: {one_line(error)}") from error
        except OSError as error:
            raise RemoteError(f"{url}: the store cannot be used: {one_line(error)}") from error
