"""The one place where a stage's command line is made: torchrun around `python -m package.module`."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchx import specs

from sidestack.infra.clusters.config import FIRST_PORT, NUM_PORTS, Resources, load_cluster, metadata_of
from sidestack.infra.remote.urls import place, url_of

IMAGE = "sidestack:0.2.0"
"""The container made by `infra/deploy/Dockerfile`; schedulers without containers ignore it."""

GPUS_VARIABLE = "SIDESTACK_GPUS"
"""How many GPUs a node must have; `infra.distributed.started` checks it."""

SHUTDOWN_SECONDS = 60

RENDEZVOUS_PORT_VARIABLE = "SIDESTACK_RENDEZVOUS_PORT"
"""The port that a job's nodes meet at, where the scheduler knows a better one than a digest of the output's path."""
RENDEZVOUS_SECONDS_VARIABLE = "SIDESTACK_RENDEZVOUS_S"
RENDEZVOUS_SECONDS = 300
"""How long a job's nodes wait for each other before torchrun fails."""

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MIMALLOC_PURGE_DELAY": "-1",
}
"""What a step frees, the next one gets again: settings of glibc, which take effect together only, and of Arrow's pool.

As they come, both hand memory of some size back to the kernel, which zeroes pages anew for the next tensors and
columns. With glibc's an arm that trains on a CPU has a ninth of the page faults and takes 13 % less CPU time, at the
same peak memory; with Arrow's the reader has a hundredth of its own.
"""


@dataclass(frozen=True)
class Launch:
    """How a stage's processes are started, whatever the stage.

    Attributes:
        j: `{nodes}x{ranks a node}`, e.g. `2x8`.
        image: container image.
        cpu: CPU cores a node.
        gpu: GPUs a node; 0 hides those that there are, None leaves it open.
        memory_mb: memory a node, in MB.
        env: further environment variables.
        mounts: torchx mounts, e.g. `type=bind`, `src=/shared`, `dst=/shared`.
        max_restarts: how often torchrun starts the ranks anew after a failure.
        max_retries: how often the scheduler runs the whole job anew.
        metadata: what the scheduler reads beside: the cluster.
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
        """Take a component's arguments under the names that torchx's own components have.

        What is not given (an empty text, 0, and -1 of `gpu`) is the cluster's. Without a cluster it is two cores and
        6,144 MB, and the GPUs are those that are there.

        Raises:
            ValueError: `j` is malformed, there are more ranks a node than GPUs, or the cluster's file has a fault.
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
        name: the stage's name, which is the job's and its role's.
        module: what `python -m` runs on every rank.
        launch: nodes, ranks, resources and environment.
        config: the run's YAML file.
        out: the directory to commit.
        inputs: committed directories by name.
        overrides: dotted `section.key=value`.
        key: the stage's key; empty for none.
        parent_run: MLflow run to log under; empty for none.
        profile: how many steps of a training are traced.

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
    """Return the shell's word for the folder of the ranks' logs: of a URL, one in each node's own mirror of it."""
    if url_of(place(out)) is None:
        return quoted(f"{out}.logs")
    return f'"$$(python -m sidestack.infra.remote.urls {quoted(out)})".logs'


def rendezvous_port(out: str) -> int:
    """Return the port that the nodes of an output's job meet at: jobs that share nodes seldom have the same."""
    return FIRST_PORT + int(hashlib.sha256(out.encode()).hexdigest()[:8], 16) % NUM_PORTS


def app(name: str, command: Sequence[str], launch: Launch, port: int | None = None) -> specs.AppDef:
    """Make a job of one role that runs a shell command on each node.

    Args:
        name: of the job and its role. command: its words, already quoted. launch: nodes and resources.
        port: that the nodes meet at; None: they do not.
    """
    nodes, ranks = launch.shape()
    env = {"OMP_NUM_THREADS": str(max(1, launch.cpu // ranks)), "PYTHONUNBUFFERED": "1", **KEEP_FREED_MEMORY}
    env["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank${rank}]:"  # the driver shows rank 0, on whichever node it is
    if launch.max_restarts:
        # With the shared store, a restart under gloo now and then waits for ever (torch 2.13).
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
    """Return how the ranks are told of their GPUs: how many there must be, or that they take none."""
    if gpu is None:
        return {}
    return {GPUS_VARIABLE: str(gpu)} if gpu else {"CUDA_VISIBLE_DEVICES": ""}


def _torchrun(launch: Launch, log_dir: str, port: int) -> list[str]:
    nodes, ranks = launch.shape()
    # `exec`: the scheduler's signals reach torchrun itself, not a shell around it.
    # Ranks of one node meet at its loopback address: torchrun would look its host's name up, for 300 s where nobody
    # knows the name, as in a container or on a VPN.
    begin, rendezvous = ["exec"], ["--standalone", "--local-addr", "127.0.0.1"]
    if nodes > 1:
        # The schedulers set this variable on every node but, on some, the first; hence the default.
        # Doubled $: torchx fills in single ones itself.
        host = f"$${{{specs.macros.rank0_env}:=localhost}}"
        place = f'"{host}:$${{{RENDEZVOUS_PORT_VARIABLE}:-{port}}}"'
        patience = f"$${{{RENDEZVOUS_SECONDS_VARIABLE}:-{RENDEZVOUS_SECONDS}}}"
        begin = ["python", "-m", "sidestack.infra.rendezvous", place, specs.macros.replica_id, "&&", "exec"]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", specs.macros.app_id, "--rdzv-endpoint", place]
        rendezvous += ["--rdzv-conf", f'"join_timeout={patience},read_timeout={patience}"']
    return [
        *begin,
        *("python", "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes), "--nproc-per-node", str(ranks), *rendezvous),
        *("--max-restarts", str(launch.max_restarts)),
        *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
        # Its own four, and the one by which schedulers warn of an end (`infra.preemption`).
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        # The console has the first rank's lines of each node; every rank's are kept in files.
        *("--tee", "3", "--local-ranks-filter", "0", "--log-dir", log_dir),
    ]


def quoted(word: str) -> str:
    """Quote for the shell, and keep torchx from filling in what looks like one of its macros.

    torchx's Slurm scheduler looks for `${app_id}` once more in what `_without_macros` has kept, so the quotes are
    closed and opened between `$` and `{`.
    """
    return _without_macros(shlex.quote(word).replace("${", "$''{"))


def _without_macros(text: str) -> str:
    """Return a text that torchx, which fills in its macros, turns into the one that is given."""
    return text.replace("$", "$$")
