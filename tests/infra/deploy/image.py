"""The image's steps without a container: `python -m tests.infra.deploy.image FOLDER` runs them in a bare venv there."""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from docker.utils import exclude_paths

from sidestack.infra.code import DEPLOY, ROOT

DOCKERFILE = ROOT / DEPLOY / "Dockerfile"
# What makes a system, and no environment of Python's.
_OF_THE_SYSTEM = ("apt-get", "useradd")


def context(root: Path = ROOT) -> list[str]:
    """Return the files and links that a build gets to see, by the rules of .dockerignore."""
    lines = (root / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    found = ((root / name, name) for name in exclude_paths(str(root), rules))
    return sorted(name for path, name in found if path.is_file() or path.is_symlink())


def steps(build: str) -> list[str]:
    """Return the shell commands of the Dockerfile that make Python's environment, for `cpu` or `cuda`."""
    text = DOCKERFILE.read_text().replace("\\\n", " ").replace("${ACCEL}", build)
    commands = (command for step in re.findall(r"^RUN (.*)$", text, re.MULTILINE) for command in step.split("&&"))
    found = [" ".join(command.split()) for command in commands]
    return [command for command in found if not any(word in command for word in (*_OF_THE_SYSTEM, "rm -rf"))]


def run_bare(folder: Path, build: str = "cpu") -> None:
    """Copy the build's context into a folder, and run the steps there, in a new environment of this Python's version.

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
