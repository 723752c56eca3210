"""A Slurm cluster of two nodes on this machine."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.components.golden import ROOT
from tests.pipelines.slurm.nodes import call

SCRIPTS = ROOT / "infra/deploy/slurm"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start the cluster, and stop it at the end unless it was already running."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs root, and Debian's packages slurm-wlm and munge")
    if "UP" in subprocess.run(["scontrol", "ping"], capture_output=True, text=True).stdout:
        if "sidestack" not in call("scontrol", "show", "config"):
            pytest.skip("this machine belongs to another Slurm")
        yield
        return
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run([SCRIPTS / "up.sh", folder], capture_output=True, text=True, timeout=120)
    assert up.returncode == 0, up.stdout + up.stderr
    yield
    subprocess.run([SCRIPTS / "down.sh", folder], capture_output=True, timeout=180)
