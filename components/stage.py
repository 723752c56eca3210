"""The arguments that all components share, described once.

torchx checks a component's source, and makes command line and help from the function's signature and docstring. So a
component is written as a function of its own arguments. `component` adds the shared arguments, from the function that
makes the job, to its signature and docstring.
"""

# torchx 0.7.0 decodes only these spellings of types from the command line.
# ruff: noqa: UP006, UP035, UP045

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Dict, List, Optional

from torchx import specs

from sidestack.components.torchrun import Launch, app, quoted, stage_app

Job = Callable[..., specs.AppDef]

Changes = Mapping[str, tuple[object, str] | None]
"""Changed default and help of a shared argument, by its name; None: the component does not have the argument."""

NO_TRAINING: Changes = {"profile": None}
"""Changes to `stage_job` for a stage that does not train."""

ONE_RANK: Changes = {
    **NO_TRAINING,
    "j": ("1x1", "{nodes}x{ranks a node}; one rank does the work"),
    "gpu": (0, "GPUs a node; the work needs none"),
}
"""Changes to `stage_job` for a stage in which one rank does the work."""


def stage_job(
    name: str,
    module: str,
    inputs: Mapping[str, str],
    /,
    *overrides: str,
    config: str,
    out: str,
    key: str = "",
    parent_run: str = "",
    j: str = "",
    cluster: str = "",
    image: str = "",
    cpu: int = 0,
    gpu: int = -1,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    profile: int = 0,
) -> specs.AppDef:
    """Make the job of one stage, from its name, its module and its inputs by name; empty inputs are left out.

    On more than one node, config, inputs and out are paths on a filesystem that all nodes share.

    Args:
        overrides: dotted settings over the file's, such as ranker.training.seed=7
        config: the run's YAML file, or the stage's resolved one
        out: the directory to commit; it must be free
        key: the digest that names this work, saved in the manifest
        parent_run: the MLflow run to log a child run under
        j: {nodes}x{ranks a node}; by default one node, with a rank for each GPU
        cluster: name or path of the cluster's file, which has the defaults of the arguments below
        image: the container image, where the scheduler uses one
        cpu: CPU cores a node; 0 is the cluster's, or 2
        gpu: GPUs a node; -1 is the cluster's, 0 hides all GPUs. With one for each rank the stage uses nccl
        memMB: memory a node, in MB; 0 is the cluster's, or 6144
        env: environment variables, as A=1,B=2
        mounts: mounts, as type=bind,src=/shared,dst=/shared
        max_restarts: how often torchrun restarts the ranks after a failure
        max_retries: how often the scheduler reruns the whole job
        profile: how many steps torch's profiler traces, into <out>.profile
    """
    launch = Launch.of(j, image, cpu, gpu, memMB, env, mounts, max_restarts, max_retries, cluster)
    given = {input_name: path for input_name, path in inputs.items() if path}
    return stage_app(
        name, module, launch,
        config=config, out=out, inputs=given, overrides=overrides, key=key, parent_run=parent_run,
        profile=profile,
    )  # fmt: skip


def driver_job(
    name: str,
    module: str,
    /,
    *overrides: str,
    config: str,
    cluster: str = "",
    image: str = "",
    cpu: int = 2,
    memMB: int = 6144,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Make the job of a driver, which is one process, from its name and its module.

    The driver runs in this job, and launches stages on the scheduler that the config's section `run` names. That
    scheduler's commands must be installed there.

    Args:
        overrides: dotted settings over the file's, such as run.name=night
        config: the run's YAML file
        cluster: name or path of the cluster's file, which has image, environment and storage
        image: the container image, where the scheduler uses one
        cpu: CPU cores
        memMB: memory, in MB
        env: environment variables, as A=1,B=2
        mounts: mounts, as type=bind,src=/shared,dst=/shared
    """
    launch = Launch.of("1x1", image, cpu, 0, memMB, env, mounts, 0, 0, cluster)
    words = ["exec", "python", "-m", module, "--config", config]
    for override in overrides:
        words += ["--set", override]
    # Stages that run in this job use the GPUs of its node.
    return app(name, [quoted(word) for word in words], replace(launch, gpu=None))


def component(maker: Job, changes: Changes | None = None) -> Callable[[Job], Job]:
    """Return a decorator that adds to a component the arguments of the function that makes its job.

    The component takes its own arguments and `**shared`, which it passes to the maker.

    Args:
        maker: its arguments from `overrides` on are shared. changes: changes to the shared arguments.
    """

    def completed(function: Job) -> Job:
        signature = _signature(function, maker, changes or {})
        help_of = {**_help(maker), **{name: one[1] for name, one in (changes or {}).items() if one}, **_help(function)}

        @functools.wraps(function)
        def job(*overrides: str, **given: Any) -> specs.AppDef:
            bound = signature.bind(*overrides, **given)
            bound.apply_defaults()
            return function(*bound.args, **bound.kwargs)

        listed = "\n".join(f"    {name}: {help_of[name]}" for name in signature.parameters)
        paragraphs = [_words(function), _words(maker).partition("\n\n")[2], f"Args:\n{listed}"]
        job.__doc__ = "\n\n".join(paragraphs)
        job.__signature__ = signature  # type: ignore[attr-defined]
        return job

    return completed


def _signature(function: Job, maker: Job, changes: Changes) -> inspect.Signature:
    """Return the arguments of both: settings, required arguments, and the rest, with the component's own first."""
    own, shared = (inspect.signature(each).parameters.values() for each in (function, maker))
    settings = next(each for each in shared if each.kind is each.VAR_POSITIONAL)
    named = [each for each in own if each.kind is each.KEYWORD_ONLY]
    for each in shared:
        change = changes.get(each.name, (each.default, ""))
        if each.kind is each.KEYWORD_ONLY and change is not None:
            named.append(each.replace(default=change[0]))
    named.sort(key=lambda each: each.default is not each.empty)
    return inspect.Signature([settings, *named], return_annotation=specs.AppDef)


def _words(function: Job) -> str:
    """Return a function's docstring without its `Args:` section."""
    return (inspect.getdoc(function) or "").partition("Args:")[0].strip()


def _help(function: Job) -> dict[str, str]:
    """Return the arguments' help by name, from a docstring with one line per argument."""
    return dict(re.findall(r"^    (\w+): (.+)$", inspect.getdoc(function) or "", re.M))
