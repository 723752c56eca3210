"""Save and load self-contained MLflow models: our own code, safetensors, pinned requirements."""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

import sidestack
from sidestack.infra.code import DEPLOY, ROOT

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

REQUIREMENTS = (
    "mlflow",
    "torch",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "safetensors",
    "pyyaml",
    "starlette",
    "uvicorn",
)
"""The packages imported for serving."""
MODEL_FILE = "MLmodel"
CODE_FOLDER = "code"
"""In a saved model: the description, and the folder of its code, a package `sidestack`."""
ANSWERS = "answers"
"""The metadata key with the function by which `infra.scoring_app` loads the model."""
PICKLES_VARIABLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
"""The variable by which MLflow decides whether it may unpickle."""


def save_served(
    path: Path,
    code: Path,
    answers: str,
    artifacts: Mapping[str, Path],
    packages: Sequence[str],
    metadata: Mapping[str, Any],
    **saved: Any,
) -> None:
    """Save an MLflow pyfunc model "from code".

    Args:
        path: the folder to create. code: the file that MLflow runs.
        answers: ``module:function``, by which `infra.scoring_app` loads the model.
        artifacts: files or folders, by name. packages: our packages to copy into the model.
        metadata: further metadata of the model. saved: further arguments of `mlflow.pyfunc.save_model`.
    """
    with quiet_mlflow(), _copied_packages(packages) as carried:
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            path=path,
            python_model=str(code),
            artifacts={name: str(artifact) for name, artifact in artifacts.items()},
            code_paths=[str(carried)],
            pip_requirements=requirements(),
            metadata={**metadata, ANSWERS: answers},
            **saved,
        )
    _drop_volatile_fields(path / "MLmodel")


@contextmanager
def _copied_packages(packages: Sequence[str]) -> Iterator[Path]:
    """Yield a folder `sidestack` with copies of some of our packages, under the names by which they are imported."""
    with TemporaryDirectory() as folder:
        place = Path(folder) / sidestack.__name__
        place.mkdir()
        shutil.copyfile(sidestack.__file__, place / "__init__.py")
        for package in packages:
            shutil.copytree(
                ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__", Path(DEPLOY).name)
            )
        yield place


def _drop_volatile_fields(file: Path) -> None:
    """Remove a random id, the time, and artifacts' source folders from a saved model's description.

    Then the same model saved twice has the same bytes.
    """
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name in ("model_uuid", "utc_time_created"):
        values.pop(name, None)
    for artifact in values["flavors"]["python_function"].get("artifacts", {}).values():
        artifact["uri"] = artifact["path"]
    file.write_text(yaml.safe_dump(values, sort_keys=True), encoding="utf-8")


def requirements() -> list[str]:
    """Return the model's imports, pinned to the installed versions; a build such as `+cpu` is the server's choice."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def load_served(path: Path) -> "PyFuncModel":
    """Load a saved model as a server does.

    Raises:
        MlflowException: it is not a model, or would have to be unpickled.
    """
    with quiet_mlflow(), refusing_pickles():
        import mlflow.pyfunc

        return mlflow.pyfunc.load_model(str(path))


@contextmanager
def refusing_pickles() -> Iterator[None]:
    """Make MLflow refuse models that contain a pickle; ours are code and safetensors."""
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

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # mlflow configures it on import
        yield
