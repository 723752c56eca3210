"""Local paths of URLs, and URLs that are refused."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from sidestack.infra.config import Config, digest, parse, plain
from sidestack.infra.errors import AddressError, ConfigError
from sidestack.infra.remote.fields import LocalPath, Place, PlaceText
from sidestack.infra.remote.urls import (
    address,
    local_argument,
    local_path,
    mirror,
    path_argument,
    require_local,
    url_of,
    with_urls,
)
from tests.components.golden import ROOT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIDESTACK_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


URLS = ["s3://bucket/a/b", "s3://bucket", "gs://b/date=2024-01-01/x.parquet", "hdfs://name:8020/a",
        "abfs://box@account.dfs.core.windows.net/a", "s3://b/logs/*/part-?.parquet"]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_url_is_mapped_to_a_local_path_and_back(url: str) -> None:
    path = local_path(url)
    assert path.is_relative_to(mirror()) and address(path) == url_of(path) == url
    assert url_of(path / "x" / "y") == f"{url}/x/y"
    assert url_of(path / "x" / ".." / "y") == f"{url}/y"
    assert with_urls(f"{path}: is no file") == f"{url}: is no file"
    assert local_path(path) == path and local_path(f"{url}/") == path


@pytest.mark.parametrize("text", ["runs", "/data/runs", "./a/../b", "a:b/c", "s3/bucket", "date=2024-01-01"])
def test_local_paths_are_unchanged(text: str) -> None:
    assert local_path(text) == Path(text) and url_of(text) is None and address(Path(text)) == str(Path(text))


def test_file_urls_are_local_paths() -> None:
    assert local_path("file:///data/runs") == require_local("file:///data/runs") == Path("/data/runs")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("s3:/bucket/runs", "two slashes"),
        ("file:/data", "two slashes"),
        ("file://data", "three slashes"),
        ("s3a://bucket/x", "write s3://"),
        ("https://host/x", "schemes are"),
        ("s3://", "names no bucket"),
        ("s3:///runs", "names no bucket"),
        ("hdfs:///runs", "names no host"),
        ("s3://b/../c", "empty part"),
        ("s3://b//c", "empty part"),
        ("s3://b/a\nb", "control character"),
        ("s3://../x", "names no bucket"),
        ("s3://key:hidden@bucket/x", "no credential"),
        ("hdfs://me:hidden@host/x", "no credential"),
        ("nope://me:hidden@host/x", "schemes are"),
    ],
)
def test_invalid_url_is_refused_without_printing_its_password(text: str, rule: str) -> None:
    with pytest.raises(AddressError, match=rule) as caught:
        local_path(text)
    assert "hidden" not in str(caught.value)


def test_url_is_refused_when_a_path_must_be_local() -> None:
    with pytest.raises(AddressError, match="'s3://b/x': must be a path on this machine"):
        require_local("s3://b/x")
    with pytest.raises(argparse.ArgumentTypeError, match="must be a path on this machine"):
        local_argument("s3://b/x")
    with pytest.raises(argparse.ArgumentTypeError, match="two slashes"):
        path_argument("s3:/b/x")


class Settings(Config):
    runs: Place
    key: LocalPath = Path("key")
    files: tuple[PlaceText, ...] = ()


def test_settings_hold_paths_and_are_written_as_urls(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(Settings, {"runs": "s3://b/runs", "files": ["s3://b/*.csv"]}, "test")
    assert settings.runs == local_path("s3://b/runs")
    assert plain(settings) == {"runs": "s3://b/runs", "key": "key", "files": ["s3://b/*.csv"]}
    monkeypatch.setenv("SIDESTACK_MIRROR", str(here / "another"))
    assert digest(parse(Settings, plain(settings), "test")) == digest({**plain(settings)})
    with pytest.raises(ConfigError, match="test.runs: 's3:/b': a URL has two slashes"):
        parse(Settings, {"runs": "s3:/b"}, "test")
    with pytest.raises(ConfigError, match="test.key: .*must be a path on this machine"):
        parse(Settings, {"runs": "runs", "key": "gs://b/key"}, "test")
    with pytest.raises(ConfigError, match="test.files.0: .*schemes are"):
        parse(Settings, {"runs": "runs", "files": ["ftp://b/key"]}, "test")


def test_module_prints_the_local_path_of_a_url(here: Path) -> None:
    command = [sys.executable, "-m", "sidestack.infra.remote.urls", "s3://b/runs/x"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output == f"{here}/mirror/s3/b/runs/x\n"
