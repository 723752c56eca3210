"""Slurm: the options of `sbatch` that torchx 0.7.0 leaves out, and jobs of several nodes as one group."""

from collections.abc import Mapping
from typing import Any

from torchx.schedulers.slurm_scheduler import SlurmBatchRequest
from torchx.specs import Role, runopts

from infra.clusters.config import cluster_of, with_options

_OPTIONS = {
    "account": "account that the job is charged to",
    "qos": "quality of service",
    "reservation": "reservation to run in",
    "nodelist": "nodes that must be among the job's",
    "exclude": "nodes that must not be",
}

# torchx's commands look for their first host in the variable of a heterogeneous job's first part.
_FIRST_HOST = 'export SLURM_JOB_NODELIST_HET_GROUP_0="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'


def add_options(options: runopts) -> runopts:
    """Add the further options to torchx's."""
    for name, text in _OPTIONS.items():
        options.add(name, type_=str, default=None, help=text)
    options.add(
        "heterogeneous", type_=bool, default=None,
        help="several nodes as a heterogeneous job (the default), or, if False, as one group of nodes",
    )  # fmt: skip
    return options


def resolved(role: Role, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a job: those that were given, else the cluster's.

    Raises:
        ConfigError: the job's cluster is not a Slurm cluster.
    """
    return with_options(cluster_of(role.metadata, "slurm"), cfg)


def apply(request: SlurmBatchRequest, cfg: Mapping[str, Any]) -> SlurmBatchRequest:
    """Return a request with the further options."""
    for replica in request.replicas.values():
        replica.sbatch_opts.update({name: str(cfg[name]) for name in _OPTIONS if cfg.get(name) is not None})
        # From 22.05 on, srun does not take over how many cores sbatch asked for: ranks would share one.
        replica.srun_opts["cpus-per-task"] = replica.sbatch_opts["cpus-per-task"]
    if cfg.get("heterogeneous") is False and len(request.replicas) > 1:
        return _one_group(request)
    return request


class OneGroup(SlurmBatchRequest):  # type: ignore[misc]  # torchx is not typed
    """A job whose nodes are one group, with one task a node: `srun` starts the same command on each."""

    def materialize(self) -> str:
        """Return the script for `sbatch`."""
        script = str(super().materialize())
        return script.replace("\nsrun ", f"\n{_FIRST_HOST}\nsrun ", 1)


def _one_group(request: SlurmBatchRequest) -> OneGroup:
    """Ask for the nodes of a request, which differ in nothing, as one group."""
    name, first = next(iter(request.replicas.items()))
    role = name.rpartition("-")[0]
    first.sbatch_opts["nodes"] = str(len(request.replicas))
    for kind in ("output", "error"):
        # %t is a task's number, and so its node's.
        first.srun_opts[kind] = first.srun_opts[kind].replace(name, f"{role}-%t")
    return OneGroup(request.cmd, {name: first}, request.job_dir, request.max_retries)
