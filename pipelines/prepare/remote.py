"""Sources in an object store: their files are copied to the machine that reads them."""

from pathlib import Path

from infra.distributed import World, together
from infra.errors import ConfigError
from infra.remote.copies import bring_sources
from infra.remote.urls import place, url_of
from pipelines.prepare.config import PrepareConfig, Tables
from pipelines.prepare.log.config import Log
from pipelines.prepare.log.files import paths_of


def bring_source(config: PrepareConfig) -> None:
    """Have a source's files on this machine: those that are new or were changed are fetched; no-op for local ones.

    Raises:
        DataError: there is nothing at a URL. RemoteError: its store cannot be reached, or refuses.
    """
    bring_sources(_urls(config))


def bring_source_to_nodes(config: PrepareConfig, world: World) -> None:
    """Have a source's files on every node; every rank calls.

    Raises:
        DataError, RemoteError: see `bring_source`. StageError: the same, on another rank.
    """
    if not _urls(config):
        return
    with together(world.committing, "fetching the source"):
        if world.local_rank == 0:
            bring_source(config)


def require_filesystem(source: Log, path: Path) -> None:
    """Check that what a raw log is configured for can be had where its store is to be.

    Args:
        source: the log. path: the store, or a folder above it.

    Raises:
        ConfigError: it is at a URL, where nothing is deleted, and which Spark's executors do not see.
    """
    url, privacy = url_of(path), source.privacy
    if url is not None and privacy.retention_days is not None:
        raise ConfigError(
            f"prepare.source.privacy.retention_days: nothing would be deleted at {url}; keep the run on a filesystem,"
            " where pipelines.privacy.expire deletes"
        )
    if url is not None and source.engine == "spark":
        raise ConfigError(f"prepare.source.engine: spark: its executors do not see {url}; keep the run on a filesystem")


def _urls(config: PrepareConfig) -> list[Path]:
    """Return the paths of a source that stand for URLs."""
    match config.source:
        case Tables() as source:
            found = [source.path]
        case Log() as source:
            found = [place(path) for paths in paths_of(source).values() for path in paths]
        case _:
            found = []
    return [path for path in found if url_of(path) is not None]
