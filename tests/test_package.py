"""The wheel: one name, all that runs, and nothing that needs the checkout it was made from."""

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
    """Run a command outside of the checkout, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        command, cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a copy of the checkout, as setuptools writes beside what it builds."""
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
    """Install the wheel into a new environment, which finds the packages that it needs in the one of the tests."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    made = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    # Only a path: the .pth files of that folder, such as that of an editable install, are not read.
    (site / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-deps", "--no-index", "--quiet"]
    run([sys.executable, "-m", "pip", "--python", str(made), "install", *options, str(wheel)], folder)
    return made


def test_the_wheel_has_one_name_and_all_that_runs_below_it(wheel: Path) -> None:
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
    """Return the requirements of files, without comments."""
    lines = [line for name in files for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines()]
    return {line.partition("#")[0].strip() for line in lines} - {"", "-c constraints.txt"}


def test_the_extras_are_the_builds_that_requirements_pin(wheel: Path) -> None:
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


def test_only_one_name_is_importable(python: Path, tmp_path: Path) -> None:
    program = f"""
import importlib.util, sidestack
print({INSTALLED} == [name for name in {INSTALLED} if importlib.util.find_spec(name) is None])
print(sidestack.__file__)
"""
    alone, file = run([str(python), "-c", program], tmp_path).splitlines()
    assert alone == "True"
    assert Path(file).is_relative_to(python.parents[1])


def test_what_is_installed_makes_the_keys_of_the_checkout(python: Path, tmp_path: Path) -> None:
    program = f"from sidestack.infra.code import code_digest; print(code_digest({STAGES}))"
    assert run([str(python), "-c", program], tmp_path).strip() == code_digest(STAGES)


def test_the_driver_of_the_wheel_tells_its_options(python: Path, tmp_path: Path) -> None:
    assert "--config" in run([str(python), "-m", "sidestack.pipelines.run", "--help"], tmp_path)


def test_a_component_of_the_wheel_runs_a_stage_where_no_checkout_is(python: Path, tmp_path: Path) -> None:
    """By torchx, which finds our schedulers by the wheel's entry points."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"prepare": {"source": LOG}, "run": {"name": "tiny"}}))
    (component,) = python.parents[1].glob("lib/python*/site-packages/sidestack/components/pipeline.py")
    command = ["run", "--workspace", "", "-s", "local_cwd", "-cfg", f"log_dir={tmp_path}/logs", f"{component}:prepare"]
    run([str(python), "-m", "torchx.cli.main", *command, "--config", "run.yaml", "--out", "out"], tmp_path)
    assert (tmp_path / "out/manifest.json").is_file()
