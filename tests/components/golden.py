"""The dry runs whose output is kept in `golden/`; `make golden` (`python -m tests.components.golden`) rewrites them."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

from torchx.runner import Runner
from torchx.specs import CfgVal

from sidestack.infra.schedulers import FACTORIES

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"

COMMON = ["--config", "/shared/run.yaml", "--key", "0123abcd", "--parent_run", "f00d", "--image", "sidestack:test"]
TWO_NODES = [
    "--j",
    "2x8",
    "--cpu",
    "32",
    "--gpu",
    "8",
    "--memMB",
    "262144",
    "--mounts",
    "type=bind,src=/shared,dst=/shared",
]
DATA = ["--dataset", "/shared/materialize"]

STAGES: Mapping[str, tuple[str, list[str]]] = {
    "pipeline": ("pipeline.py:run", ["--config", "/shared/run.yaml", "--image", "sidestack:test", "run.name=night"]),
    "retrain": ("pipeline.py:retrain", ["--config", "/shared/night.yaml", "--image", "sidestack:test"]),
    "prepare": ("pipeline.py:prepare", [*COMMON, "--out", "/shared/prepare"]),
    "encoder": ("encoder.py:train", [*COMMON, *TWO_NODES, "--dataset", "/shared/prepare", "--out", "/shared/encoder"]),
    "materialize": (
        "encoder.py:materialize",
        [
            *COMMON,
            *TWO_NODES,
            "--dataset",
            "/shared/prepare",
            "--encoders",
            "sid=/shared/encoder,text_sid=/shared/text",
            "--out",
            "/shared/materialize",
        ],
    ),
    "export": (
        "encoder.py:export",
        [*COMMON, "--encoder", "/shared/encoder", "--sids", "/shared/materialize", "--out", "/shared/export"],
    ),
    "ranker": (
        "ranker.py:train",
        [
            *COMMON,
            *TWO_NODES,
            "--max_restarts",
            "2",
            "--arm",
            "side",
            *DATA,
            "--out",
            "/shared/side",
            "ranker.training.seed=7",
        ],
    ),
    "score": (
        "ranker.py:score",
        [*COMMON, *TWO_NODES, "--model", "/shared/side", *DATA, "--out", "/shared/scored"],
    ),
    "ranker_export": (
        "ranker.py:export",
        [*COMMON, "--model", "/shared/side", *DATA, "--encoders", "sid=/shared/encoder", "--out", "/shared/exported"],
    ),
    "baseline": ("ranker.py:baseline", [*COMMON, *DATA, "--out", "/shared/baseline", "baseline.seed=7"]),
    "compare": (
        "pipeline.py:compare",
        [
            *COMMON,
            "--arms",
            "none.0=/shared/none,side.0=/shared/side",
            "--encoders",
            "sid=/shared/encoder",
            "--prepare",
            "/shared/prepare",
            *DATA,
            "--out",
            "/shared/compare",
        ],
    ),
}

SCHEDULERS: Mapping[str, Mapping[str, CfgVal]] = {
    "slurm": {"partition": "gpu", "time": "04:00:00"},
    "kubernetes": {"queue": "default"},
    "aws_batch": {"queue": "default", "user": "tester"},
}


CLUSTERS: Mapping[str, list[str]] = {"slurm": ["--j", "2x8"], "kubernetes": ["--j", "2x8"], "aws_batch": ["--j", "2x8"]}
"""The shipped clusters' files, each with the remaining arguments of a minimal job."""

BY_CLUSTER = ["--config", "/shared/run.yaml", "--dataset", "/shared/prepare", "--out", "/shared/encoder"]


def dry_run(stage: str, scheduler: str) -> str:
    """Return the job that `torchx run --dryrun` would submit, with a fixed id in place of the random one."""
    component, arguments = STAGES[stage]
    return _job(component, arguments, scheduler, SCHEDULERS[scheduler])


def cluster_dry_run(cluster: str) -> str:
    """Return the encoder's job with a shipped cluster's file."""
    arguments = [*BY_CLUSTER, "--cluster", cluster, *CLUSTERS[cluster]]
    return _job("encoder.py:train", arguments, cluster, {"user": "tester"} if cluster == "aws_batch" else {})


def _job(component: str, arguments: list[str], scheduler: str, options: Mapping[str, CfgVal]) -> str:
    # Random ids differ in length, which changes the line breaks of the YAML.
    fixed = mock.patch("torchx.schedulers.ids.random_id", return_value="fixed0123456")
    with fixed, warnings.catch_warnings(), Runner("sidestack", dict(FACTORIES)) as runner:
        warnings.simplefilter("ignore", UserWarning)  # no AWS instance type is given
        path = f"{ROOT}/components/{component}"
        info = runner.dryrun_component(path, arguments, scheduler, options, workspace=None)
    return str(info).rstrip() + "\n"


def file_of(stage: str, scheduler: str) -> Path:
    """Return the golden file of a dry run."""
    return GOLDEN / f"{stage}.{scheduler}.txt"


def cluster_file_of(cluster: str) -> Path:
    """Return the golden file of a cluster's dry run."""
    return GOLDEN / f"cluster.{cluster}.txt"


def golden_jobs() -> Mapping[Path, Callable[[], str]]:
    """Return the function that computes each golden file's content, by file."""
    jobs: dict[Path, Callable[[], str]]
    jobs = {file_of(stage, name): partial(dry_run, stage, name) for stage in STAGES for name in SCHEDULERS}
    return jobs | {cluster_file_of(name): partial(cluster_dry_run, name) for name in CLUSTERS}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    jobs = golden_jobs()
    for file, job in jobs.items():
        file.write_text(job())
    print(f"wrote {len(jobs)} files in {GOLDEN.relative_to(ROOT)}")
