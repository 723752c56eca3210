"""Run the image's build steps without a container, in a new venv: `python -m tests.infra.deploy.image FOLDER`."""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from docker.utils import exclude_paths

from sidestack.infra.code import DEPLOY, ROOT

DOCKERFILE = ROOT / DEPLOY / "Dockerfile"
# Steps with these commands set up the system and are left out.
_SYSTEM_COMMANDS = ("apt-get", "useradd")


def context(root: Path = ROOT) -> list[str]:
    """Return the files and links of the build context, which .dockerignore selects."""
    lines = (root / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    found = ((root / name, name) for name in exclude_paths(str(root), rules))
    return sorted(name for path, name in found if path.is_file() or path.is_symlink())


def steps(build: str) -> list[str]:
    """Return the Dockerfile's shell commands that set up the Python environment, for `cpu` or `cuda`."""
    text = DOCKERFILE.read_text().replace("\\\n", " ").replace("${ACCEL}", build)
    commands = (command for step in re.findall(r"^RUN (.*)$", text, re.MULTILINE) for command in step.split("&&"))
    found = [" ".join(command.split()) for command in commands]
    return [command for command in found if not any(word in command for word in (*_SYSTEM_COMMANDS, "rm -rf"))]


def run_bare(folder: Path, build: str = "cpu") -> None:
    """Copy the build context into a folder and run the steps there in a new venv of this Python version.

    Raises:
        subprocess.CalledProcessError: a step failed.
    """
    place = folder / "sidestack"
    for name in context():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name, follow_symlinks=False)
    venv.create(folder / "venv", with_pip=True)
    for step in steps(build):
        print(f"+ {step}", flush=True)
        environment = f'export PATH="{folder}/venv/bin:$PATH"; unset PYTHONPATH; '
        subprocess.run(["bash", "-ec", environment + step], cwd=place, check=True)


if __name__ == "__main__":
    run_bare(Path(sys.argv[1]).absolute())
