"""Saving and loading MLflow models that are whole in themselves: our own code, safetensors, pinned requirements."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "pyyaml")
"""What those packages import when they serve."""
PICKLES_VARIABLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
"""What MLflow reads before it unpickles."""


def save_served(path: Path, code: Path, artifacts: Mapping[str, Path], packages: Sequence[str], **saved: Any) -> None:
    """Save an MLflow pyfunc model "from code".

    Args:
        path: the folder to make. code: the file that MLflow runs. artifacts: files or folders, by name.
        packages: ours that the model carries. saved: what else `mlflow.pyfunc.save_model` takes.
    """
    with quiet_mlflow():
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            path=path,
            python_model=str(code),
            artifacts={name: str(artifact) for name, artifact in artifacts.items()},
            code_paths=[str(ROOT / package) for package in packages],
            pip_requirements=requirements(),
            **saved,
        )


def requirements() -> list[str]:
    """Pin what the model imports to the versions that save it; a build such as `+cpu` is the server's choice."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def load_served(path: Path) -> "PyFuncModel":
    """Load a saved model as a server does.

    Raises:
        MlflowException: it is no model, or one that would have to be unpickled.
    """
    with quiet_mlflow(), refusing_pickles():
        import mlflow.pyfunc

        return mlflow.pyfunc.load_model(str(path))


@contextmanager
def refusing_pickles() -> Iterator[None]:
    """Have MLflow refuse models that name a pickle; ours are code and safetensors."""
    before = os.environ.get(PICKLES_VARIABLE)
    os.environ[PICKLES_VARIABLE] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PICKLES_VARIABLE]
        else:
            os.environ[PICKLES_VARIABLE] = before


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Import mlflow without its telemetry and warnings."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow  # noqa: F401

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # mlflow configures it while it is imported
        yield
