"""Sources in an object store: copy their files to the machine that reads them."""

from pathlib import Path

from sidestack.infra.distributed import World, raise_on_all_ranks
from sidestack.infra.remote.copies import fetch_sources
from sidestack.infra.remote.urls import url_of
from sidestack.pipelines.prepare.contract import SourceConfig


def fetch_source(source: SourceConfig) -> None:
    """Fetch a source's new or changed files to this machine; no-op for local files.

    Raises:
        DataError: there is nothing at a URL. RemoteError: the store cannot be reached or refuses access.
    """
    fetch_sources(_of_urls(source))


def fetch_source_to_nodes(source: SourceConfig, world: World) -> None:
    """Fetch a source's files to every node; every rank must call it.

    Raises:
        DataError, RemoteError: see `fetch_source`. StageError: the same, on another rank.
    """
    if not _of_urls(source):
        return
    with raise_on_all_ranks(world.committing, "fetching the source"):
        if world.local_rank == 0:
            fetch_source(source)


def _of_urls(source: SourceConfig) -> list[Path]:
    return [path for path in source.paths() if url_of(path) is not None]
