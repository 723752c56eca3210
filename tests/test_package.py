"""The wheel has one top-level package, contains all code that runs, and works without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from sidestack.infra.code import DEPLOY, ROOT, code_digest
from sidestack.infra.code import PACKAGES as STAGES
from tests.test_one_name import PACKAGES

pytestmark = pytest.mark.slow

INSTALLED = sorted(PACKAGES - {"benchmarks"})
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "requirements", "sidestack", *PACKAGES)
LOG = {"kind": "synthetic", "num_items": 100, "num_users": 50, "events_per_day": 200, "train_days": 2, "test_days": 1}


def run(command: list[str], folder: Path) -> str:
    """Run a command without the checkout on its path and return its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout, because setuptools writes into the folder that it builds."""
    place = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        copy = shutil.copy if (ROOT / name).is_file() else copied_folder
        copy(ROOT / name, place / name)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", "dist"]
    run([sys.executable, "-m", "pip", "wheel", ".", *options], place)
    (made,) = (place / "dist").iterdir()
    return made


def copied_folder(source: Path, copy: Path) -> None:
    shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment that takes its dependencies from the tests' environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    made = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    # A path alone: the .pth files in that folder, such as that of an editable install, are not processed.
    (site / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-deps", "--no-index", "--quiet"]
    run([sys.executable, "-m", "pip", "--python", str(made), "install", *options, str(wheel)], folder)
    return made


def test_wheel_contains_all_packages_below_sidestack(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "sidestack",
        f"{wheel.stem.removesuffix('-py3-none-any')}.dist-info",
    }
    files = (file for package in INSTALLED for file in (ROOT / package).rglob("*.*") if "__pycache__" not in file.parts)
    wanted = {file.relative_to(ROOT).as_posix() for file in files if file.suffix != ".md"}
    wanted = {f"sidestack/{name}" for name in wanted if not name.startswith(DEPLOY)}
    assert {name for name in names if name.startswith("sidestack/")} == wanted | {"sidestack/__init__.py"}
    assert {Path(name).suffix for name in wanted} == {".py", ".yaml", ".css", ".jinja"}


def pins(*files: str) -> set[str]:
    """Return the requirements that some files list, without comments."""
    lines = [line for name in files for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines()]
    return {line.partition("#")[0].strip() for line in lines} - {"", "-c constraints.txt"}


def test_extras_have_the_pins_of_the_requirements(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required: dict[str, set[str]] = {}
    for line in Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist"):
        requirement, _, marker = line.partition(";")
        required.setdefault(marker.strip(), set()).add(requirement.strip())
    assert required.pop("") == pins("base")
    assert required.pop('extra == "cpu"') == pins("torch", "cpu") - {"torchrec==1.8.0"}
    assert required.pop('extra == "cuda"') == pins("torch", "cuda")
    assert {one.partition(">")[0] for one in required.pop('extra == "spark"')} == pins("spark")
    assert required == {}


def test_only_sidestack_is_importable(python: Path, tmp_path: Path) -> None:
    program = f"""
import importlib.util, sidestack
print({INSTALLED} == [name for name in {INSTALLED} if importlib.util.find_spec(name) is None])
print(sidestack.__file__)
"""
    alone, file = run([str(python), "-c", program], tmp_path).splitlines()
    assert alone == "True"
    assert Path(file).is_relative_to(python.parents[1])


def test_installed_code_has_the_digest_of_the_checkout(python: Path, tmp_path: Path) -> None:
    program = f"from sidestack.infra.code import code_digest; print(code_digest({STAGES}))"
    assert run([str(python), "-c", program], tmp_path).strip() == code_digest(STAGES)


def test_driver_of_the_wheel_prints_its_options(python: Path, tmp_path: Path) -> None:
    assert "--config" in run([str(python), "-m", "sidestack.pipelines.run", "--help"], tmp_path)


def test_component_of_the_wheel_runs_a_stage_without_a_checkout(python: Path, tmp_path: Path) -> None:
    """TorchX finds our schedulers by the wheel's entry points."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"prepare": {"source": LOG}, "run": {"name": "tiny"}}))
    (component,) = python.parents[1].glob("lib/python*/site-packages/sidestack/components/pipeline.py")
    command = ["run", "--workspace", "", "-s", "local_cwd", "-cfg", f"log_dir={tmp_path}/logs", f"{component}:prepare"]
    run([str(python), "-m", "torchx.cli.main", *command, "--config", "run.yaml", "--out", "out"], tmp_path)
    assert (tmp_path / "out/manifest.json").is_file()
