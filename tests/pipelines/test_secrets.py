"""Planted secrets reach the stages, but no file, log, store or process argument."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.components.torchrun import Launch, app
from sidestack.infra.clusters.config import SECRETS_KEY
from sidestack.infra.errors import ConfigError
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.environment import job_environment, name_secrets, require_secrets, without_values
from sidestack.pipelines.run_config import RunConfig
from tests.components.golden import ROOT
from tests.tracking_server import tracking_server

PASSWORD, INHERITED = "planted-password", "planted-inherited"
WRITTEN = "planted $$ ${app_id} $(HOME) `id` a,b=c 'quoted' \"twice\" ${replica_id}\nanother line"
PLANTED = (PASSWORD, INHERITED, WRITTEN, "planted $", "planted")


def run_file(folder: Path) -> Path:
    stage = {"text": "hello", "variables": ["PLAIN", "SECRET"]}
    values = {
        "prepare": stage,
        "ranker": stage,
        "run": {"name": "fake", "runs_dir": str(folder / "runs"), "env": {"PLAIN": WRITTEN}, "secrets": ["SECRET"]},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@contextmanager
def arguments_of_processes() -> Iterator[set[str]]:
    """Collect the command lines of the processes that are seen while the body runs."""
    seen: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.05):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue  # it has ended

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()


def holding(folder: Path, text: str) -> list[Path]:
    """Return the files below a folder that contain a text."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [file for file in files if text.encode() in file.read_bytes()]


@pytest.mark.whole
def test_run_passes_its_secrets_to_the_stages_and_writes_them_nowhere(tmp_path: Path) -> None:
    stored, work = tmp_path / "server", tmp_path / "work"
    stored.mkdir()
    work.mkdir()
    with tracking_server(stored) as server, arguments_of_processes() as arguments:
        uri = server.uri.replace("://", f"://somebody:{PASSWORD}@")
        environment = {**os.environ, URI_VARIABLE: uri, "SECRET": INHERITED, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "tests.pipelines.fake_plan", "--config", str(run_file(work))],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, umask=0o027,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in
                (("PLAIN", WRITTEN), ("SECRET", INHERITED))}  # fmt: skip
    found = list((work / "runs").rglob("variables.json"))
    assert [json.loads(file.read_text()) for file in found] == [expected, expected]

    assert f"http://***@127.0.0.1:{server.port}" in done.stdout
    for planted in PLANTED:
        assert planted not in done.stdout + done.stderr
        assert holding(work / "runs", planted) == []
        assert holding(stored, planted) == []
        assert not [line for line in arguments if planted in line]
    # Check the search itself: it finds the variable's name with its mask, and the jobs' own arguments.
    assert holding(work / "runs/fake/configs", "PLAIN: '***'")
    assert stored / "server.db" in holding(stored, "run.env.PLAIN")
    assert [line for line in arguments if "--parent-run" in line]

    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (work / "runs").rglob("*")}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o027} == {}


def run_config(**values: Any) -> RunConfig:
    return RunConfig(name="r", **values)


def test_copied_run_file_has_masked_values_and_is_refused_unchanged() -> None:
    values = {"prepare": {}, "run": {"name": "r", "env": {"TOKEN": "planted"}}}
    copied = without_values(values)
    assert copied == {"prepare": {}, "run": {"name": "r", "env": {"TOKEN": "***"}}}
    assert values["run"] == {"name": "r", "env": {"TOKEN": "planted"}}
    with pytest.raises(ValueError, match="TOKEN: is masked.*must be set anew"):
        run_config(env=copied["run"]["env"])


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"env": {"TOKEN": 1234567}}, "TOKEN: must be text; put quotes around it"),
        ({"env": {"TO KEN": "x"}}, "TO KEN.*must be a name of letters"),
        ({"env": {"TOKEN": "a\0b"}}, "TOKEN: must be text"),
        ({"secrets": ["A=1234567"]}, "must be a name of letters"),
        ({"secrets": ["TOKEN"], "env": {"TOKEN": "x"}}, "TOKEN stands in env, too"),
    ],
)
def test_error_names_the_key_without_the_value(values: dict[str, Any], rule: str) -> None:
    from sidestack.infra.config import parse

    with pytest.raises(ConfigError, match=rule) as caught:
        parse(PipelineConfig, {"run": {"name": "r", **values}}, "run.yaml")
    if "env" in values:
        assert "1234567" not in str(caught.value)


def test_secret_missing_from_the_drivers_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKEN", raising=False)
    with pytest.raises(ConfigError, match="run.secrets: TOKEN: is not set in the driver's environment"):
        require_secrets(run_config(secrets=["TOKEN"]))
    require_secrets(run_config(secrets=["TOKEN"]).model_copy(update={"scheduler": "kubernetes"}))  # by reference


@pytest.mark.parametrize(
    ("scheduler", "uri", "is_passed"),
    [
        ("slurm", "http://store", False),  # inherited
        ("kubernetes", "http://store", True),
        ("kubernetes", "http://user:planted@store", False),
        ("kubernetes", "postgresql://store/mlflow?user=u&password=planted", False),
    ],
)
def test_tracking_address_with_password_is_not_passed_to_kubernetes(
    monkeypatch: pytest.MonkeyPatch, scheduler: Any, uri: str, is_passed: bool
) -> None:
    monkeypatch.setenv(URI_VARIABLE, uri)
    options = {"queue": "default"} if scheduler == "kubernetes" else {}
    environment = job_environment(run_config(scheduler=scheduler, scheduler_options=options), is_tracked=True)
    assert (URI_VARIABLE in environment) == is_passed
    assert "planted" not in str(environment)


def test_local_container_gets_the_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "planted")
    environment = job_environment(run_config(scheduler="local_docker", secrets=["TOKEN"]), is_tracked=False)
    assert environment["TOKEN"] == "planted"


def test_kubernetes_job_gets_only_the_names_of_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "planted")
    job = app("encoder", ["true"], Launch())
    run = run_config(secrets=["TOKEN"])
    name_secrets(job, run)
    assert job.roles[0].metadata == {}  # it inherits them
    name_secrets(job, run.model_copy(update={"scheduler": "kubernetes"}))
    assert job.roles[0].metadata == {SECRETS_KEY: ["TOKEN"]}
    assert "planted" not in str(job)
