"""Airflow loads and runs the DAG; needs an environment with requirements/airflow.txt."""

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sidestack.infra.code import DEPLOY, ROOT

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.skipif(importlib.util.find_spec("airflow") is None, reason="not installed: apache-airflow"),
]

# A fake driver: it creates a file when its signal handler is set, and prints "stopped" on the signal.
DRIVER = """
import pathlib
import signal
import sys

signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("stopped")))
pathlib.Path("listens").touch()
signal.pause()
"""


@pytest.fixture(scope="module")
def dag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Load the DAG as Airflow does, with Airflow's own files in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
        patch.setenv("AIRFLOW__CORE__LOAD_EXAMPLES", "False")
        from airflow.dag_processing.dagbag import DagBag

        bag = DagBag(ROOT / DEPLOY / "schedule")
        assert bag.import_errors == {}
        (found,) = bag.dags.values()
        yield found


def test_dag_runs_hourly_one_at_a_time_without_catch_up(dag: Any) -> None:
    assert (dag.schedule, dag.max_active_runs, dag.catchup) == ("@hourly", 1, False)
    (task,) = dag.tasks
    assert task.retries == 0


def test_kill_of_the_task_reaches_the_driver(dag: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sidestack/pipelines"
    package.mkdir(parents=True)
    for folder in (package.parent, package):  # regular packages, which take precedence over an installed sidestack
        (folder / "__init__.py").touch()
    (package / "retrain.py").write_text(DRIVER)
    (task,) = dag.tasks
    monkeypatch.setattr(task, "cwd", str(tmp_path))
    monkeypatch.setattr(task, "bash_command", task.bash_command.replace(".venv/bin/python", sys.executable))
    stopper = Thread(target=_stop_when_listening, args=(task, tmp_path / "listens"), daemon=True)
    stopper.start()
    assert task.execute({}) == "stopped"


def _stop_when_listening(task: Any, file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)
    task.on_kill()
