"""The command line of a stage: torchrun around `python -m package.module`."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchx import specs

from sidestack.infra.clusters.config import FIRST_PORT, NUM_PORTS, Resources, load_cluster, metadata_of
from sidestack.infra.remote.urls import local_path, url_of
from sidestack.infra.rendezvous import PORT_VARIABLE

IMAGE = "sidestack:0.2.0"
"""The container made by `infra/deploy/Dockerfile`; schedulers without containers ignore it."""

GPUS_VARIABLE = "SIDESTACK_GPUS"
"""The environment variable for the number of GPUs a node must have; `infra.distributed.process_group` checks it."""

SHUTDOWN_SECONDS = 60

RENDEZVOUS_SECONDS_VARIABLE = "SIDESTACK_RENDEZVOUS_S"
RENDEZVOUS_SECONDS = 300
"""The rendezvous timeout: how long a job's nodes wait for each other before torchrun fails."""

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MIMALLOC_PURGE_DELAY": "-1",
}
"""Allocator settings that keep freed memory for the next step: glibc's (effective only together) and Arrow's pool's.

By default, both return large blocks to the kernel, which must zero pages again for the next tensors and columns. With
glibc's settings, an arm that trains on a CPU has a ninth of the page faults and takes 13 % less CPU time, at the same
peak memory. With Arrow's, the reader has a hundredth of its page faults.
"""


@dataclass(frozen=True)
class Launch:
    """The launch settings of a stage's processes.

    Attributes:
        j: `{nodes}x{ranks a node}`, e.g. `2x8`.
        image: container image.
        cpu: CPU cores a node.
        gpu: GPUs a node; 0 hides all GPUs, None uses those of the node.
        memory_mb: memory a node, in MB.
        env: further environment variables.
        mounts: torchx mounts, e.g. `type=bind`, `src=/shared`, `dst=/shared`.
        max_restarts: how often torchrun restarts the ranks after a failure.
        max_retries: how often the scheduler reruns the whole job.
        metadata: further data for the scheduler: the cluster.
    """

    j: str = "1x2"
    image: str = IMAGE
    cpu: int = 2
    gpu: int | None = None
    memory_mb: int = 6144
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[str] = ()
    max_restarts: int = 0
    max_retries: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        j: str,
        image: str,
        cpu: int,
        gpu: int,
        memMB: int,
        env: dict[str, str] | None,
        mounts: list[str] | None,
        max_restarts: int,
        max_retries: int,
        cluster: str = "",
    ) -> "Launch":
        """Make launch settings from a component's arguments, which are named as in torchx's own components.

        An argument that is not set (an empty text, 0, or -1 for `gpu`) is taken from the cluster. Without a cluster,
        the default is two cores, 6,144 MB and the node's GPUs.

        Raises:
            ValueError: `j` is malformed, there are more ranks a node than GPUs, or the cluster's file is invalid.
        """
        file = load_cluster(cluster) if cluster else None
        resources = Resources() if file is None else file.resources
        gpus = gpu if gpu >= 0 else None if file is None else resources.gpu
        launch = cls(
            j or f"1x{gpus or 2}",
            image or (file and file.image_reference) or IMAGE,
            cpu or resources.cpu,
            gpus,
            memMB or resources.memory_mb,
            {**(file.env if file else {}), **(env or {})},
            tuple(mounts or (file.mounts if file else ())),
            max_restarts,
            max_retries,
            metadata_of(file) if file else {},
        )
        _, ranks = launch.shape()
        if gpus and ranks > gpus:
            raise ValueError(f"j {launch.j!r}: {ranks} ranks a node are more than its {gpus} GPUs")
        return launch

    def shape(self) -> tuple[int, int]:
        """Return `j` as (nodes, ranks a node).

        Raises:
            ValueError: `j` is not two positive numbers joined by an x.
        """
        nodes, _, ranks = self.j.partition("x")
        if not (nodes.isdecimal() and ranks.isdecimal() and int(nodes) and int(ranks)):
            raise ValueError(f"j {self.j!r}: must be {{nodes}}x{{ranks a node}}, such as 1x2")
        return int(nodes), int(ranks)


def stage_app(
    name: str,
    module: str,
    launch: Launch,
    *,
    config: str,
    out: str,
    inputs: Mapping[str, str],
    overrides: Sequence[str] = (),
    key: str = "",
    parent_run: str = "",
    profile: int = 0,
) -> specs.AppDef:
    """Make the job of one stage.

    Args:
        name: the stage's name, also of the job and its role.
        module: the module that `python -m` runs on every rank.
        launch: nodes, ranks, resources and environment.
        config: the run's YAML file.
        out: the directory to commit.
        inputs: committed directories by name.
        overrides: dotted `section.key=value`.
        key: the stage's key; empty for none.
        parent_run: MLflow run to log under; empty for none.
        profile: number of training steps to trace.

    Raises:
        ValueError: `launch.j` is malformed.
    """
    arguments = ["--config", config]
    for override in overrides:
        arguments += ["--set", override]
    for input_name, path in inputs.items():
        arguments += ["--input", f"{input_name}={path}"]
    arguments += ["--out", out]
    arguments += ["--key", key] if key else []
    arguments += ["--parent-run", parent_run] if parent_run else []
    arguments += ["--profile", str(profile)] if profile else []
    port = rendezvous_port(out)
    command = [*_torchrun(launch, _log_dir(out), port), "-m", module, *map(quoted, arguments)]
    return app(name, command, launch, port)


def _log_dir(out: str) -> str:
    """Return the shell word for the folder of the ranks' logs; for a URL, it is in each node's own mirror of it."""
    if url_of(local_path(out)) is None:
        return quoted(f"{out}.logs")
    return f'"$$(python -m sidestack.infra.remote.urls {quoted(out)})".logs'


def rendezvous_port(out: str) -> int:
    """Return the rendezvous port of an output's job: jobs that share nodes rarely have the same port."""
    return FIRST_PORT + int(hashlib.sha256(out.encode()).hexdigest()[:8], 16) % NUM_PORTS


def app(name: str, command: Sequence[str], launch: Launch, port: int | None = None) -> specs.AppDef:
    """Make a job of one role that runs a shell command on each node.

    Args:
        name: of the job and its role. command: its words, already quoted. launch: nodes and resources.
        port: the rendezvous port; None: the nodes need none.
    """
    nodes, ranks = launch.shape()
    env = {"OMP_NUM_THREADS": str(max(1, launch.cpu // ranks)), "PYTHONUNBUFFERED": "1", **KEEP_FREED_MEMORY}
    env["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank${rank}]:"  # the driver shows rank 0, on whichever node it is
    if launch.max_restarts:
        # With the shared store, a restart under gloo occasionally hangs (torch 2.13).
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    role = specs.Role(
        name=name,
        image=launch.image,
        entrypoint="bash",
        args=["-c", " ".join(command)],
        num_replicas=nodes,
        env={
            variable: _without_macros(value)
            for variable, value in {**env, **_gpu_environment(launch.gpu), **launch.env}.items()
        },
        resource=specs.resource(cpu=launch.cpu, gpu=launch.gpu or 0, memMB=launch.memory_mb),
        port_map={} if port is None else {"c10d": port},
        max_retries=launch.max_retries,
        mounts=specs.parse_mounts(list(launch.mounts)) if launch.mounts else [],
        metadata=dict(launch.metadata),
    )
    return specs.AppDef(name=name, roles=[role])


def _gpu_environment(gpu: int | None) -> dict[str, str]:
    """Return the ranks' environment for GPUs: how many there must be, or that there are none."""
    if gpu is None:
        return {}
    return {GPUS_VARIABLE: str(gpu)} if gpu else {"CUDA_VISIBLE_DEVICES": ""}


def _torchrun(launch: Launch, log_dir: str, port: int) -> list[str]:
    nodes, ranks = launch.shape()
    # `exec`: the scheduler's signals reach torchrun itself, not a shell around it.
    # Ranks of one node use its loopback address. Otherwise torchrun looks up its host's name, which takes 300 s where
    # the name does not resolve, as in a container or on a VPN.
    begin, rendezvous = ["exec"], ["--standalone", "--local-addr", "127.0.0.1"]
    if nodes > 1:
        # The schedulers set this variable on every node, except that some omit the first; hence the default.
        # Doubled $: torchx substitutes single ones itself.
        host = f"$${{{specs.macros.rank0_env}:=localhost}}"
        endpoint = f'"{host}:$${{{PORT_VARIABLE}:-{port}}}"'
        patience = f"$${{{RENDEZVOUS_SECONDS_VARIABLE}:-{RENDEZVOUS_SECONDS}}}"
        begin = ["python", "-m", "sidestack.infra.rendezvous", endpoint, specs.macros.replica_id, "&&", "exec"]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", specs.macros.app_id, "--rdzv-endpoint", endpoint]
        rendezvous += ["--rdzv-conf", f'"join_timeout={patience},read_timeout={patience}"']
    return [
        *begin,
        *("python", "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes), "--nproc-per-node", str(ranks), *rendezvous),
        *("--max-restarts", str(launch.max_restarts)),
        *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
        # torchrun's default four, and the signal by which schedulers announce preemption (`infra.preemption`).
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        # The console shows the first rank's lines of each node; every rank's lines are kept in files.
        *("--tee", "3", "--local-ranks-filter", "0", "--log-dir", log_dir),
    ]


def quoted(word: str) -> str:
    """Quote for the shell, and escape text that torchx would substitute as a macro.

    torchx's Slurm scheduler substitutes `${app_id}` once more after `_without_macros`, so the quotes are closed and
    opened between `$` and `{`.
    """
    return _without_macros(shlex.quote(word).replace("${", "$''{"))


def _without_macros(text: str) -> str:
    """Escape a text, so that torchx's macro substitution restores it."""
    return text.replace("$", "$$")
