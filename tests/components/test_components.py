"""The components' jobs equal golden files, pass torchx's linter, and are built correctly from arguments."""

import ast
import inspect
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.specs import AppDef, macros
from torchx.specs.file_linter import get_fn_docstring, validate

from sidestack.components import encoder, pipeline, ranker
from sidestack.components.stage import stage_job
from sidestack.components.torchrun import Launch, stage_app
from tests.components.golden import GOLDEN, ROOT, golden_jobs

COMPONENTS = [
    *(pipeline.run, pipeline.retrain, pipeline.prepare, pipeline.compare),
    *(encoder.train, encoder.materialize, encoder.export),
    *(ranker.train, ranker.baseline, ranker.score, ranker.export),
]
STAGE_MODULES = {
    pipeline.prepare: "sidestack.pipelines.prepare",
    encoder.train: "sidestack.encoder.train",
    encoder.materialize: "sidestack.encoder.materialize",
    encoder.export: "sidestack.encoder.export",
    ranker.train: "sidestack.ranker.train",
    ranker.baseline: "sidestack.ranker.baseline",
    ranker.score: "sidestack.ranker.score",
    ranker.export: "sidestack.ranker.export",
    pipeline.compare: "sidestack.pipelines.compare",
}


@pytest.mark.parametrize("file", golden_jobs(), ids=lambda file: file.stem)
def test_dry_run_equals_the_golden_file(file: Path) -> None:
    assert golden_jobs()[file]() == file.read_text(), "if the change is intended, run make golden"


def test_every_golden_file_has_a_dry_run() -> None:
    assert set(GOLDEN.iterdir()) == set(golden_jobs())


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_torchx_accepts_the_component_and_every_argument_has_help(component: object) -> None:
    own = inspect.unwrap(component)  # type: ignore[arg-type]
    assert validate(inspect.getfile(own), own.__name__) == []
    summary, arguments = get_fn_docstring(component)
    assert "TIP" not in summary
    assert all(text.strip() for text in arguments.values())
    documented = inspect.getdoc(component) or ""
    for name in inspect.signature(component).parameters:  # type: ignore[arg-type]
        assert f"    {name}: " in documented, f"{name} has no help"


def test_shared_arguments_have_the_same_help_except_for_single_rank_stages() -> None:
    shared: dict[str, set[str]] = {}
    for component in STAGE_MODULES:
        for name, text in get_fn_docstring(component)[1].items():  # type: ignore[arg-type]
            shared.setdefault(name, set()).add(text)
    common = [name for name in inspect.signature(stage_job).parameters if name not in ("name", "module", "inputs")]
    assert {name for name in common if len(shared[name]) > 1} == {"j", "gpu", "env"}
    assert all(len(shared[name]) == 2 for name in ("j", "gpu", "env"))


def test_only_training_components_have_the_profile_argument() -> None:
    takers = [one for one in STAGE_MODULES if "profile" in inspect.signature(one).parameters]  # type: ignore[arg-type]
    assert takers == [encoder.train, ranker.train]
    (role,) = ranker.train(config="c", dataset="d", out="o", profile=7).roles
    assert role.args[1].endswith(" --profile 7")
    with pytest.raises(TypeError, match="profile"):
        ranker.score(config="c", model="m", dataset="d", out="o", profile=7)


def test_command_line_help_has_shared_and_own_arguments() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", "run", "components/ranker.py:train", "--help"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    words = " ".join(ended.stdout.split())
    assert ended.returncode == 0 and "Train and evaluate the ranker of one arm." in words
    for option in ("--dataset", "--arm", "--out", "--memMB", "--profile"):
        assert f" {option} " in words


def test_command_line_dry_run_prints_the_job(tmp_path: Path) -> None:
    arguments = ["-s", "slurm", "components/encoder.py:train", "--config", "c.yaml", "--dataset", "d", "--out", "o"]
    ended = subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", "run", "--dryrun", "--workspace", "", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "-m sidestack.encoder.train --config c.yaml --input dataset=d --out o" in ended.stdout


@pytest.mark.parametrize("component", STAGE_MODULES, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_each_stage_component_runs_a_module_that_exists(component: object) -> None:
    assert STAGE_MODULES[component] in inspect.getsource(component)  # type: ignore[index,arg-type]
    path = ROOT / STAGE_MODULES[component].replace(".", "/")  # type: ignore[index]
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_components_import_no_heavy_packages() -> None:
    light = ("clusters.config", "remote.urls", "rendezvous")  # of the standard library alone
    allowed = {"torchx", "sidestack.components", *(f"sidestack.infra.{name}" for name in light)}
    for file in (ROOT / "components").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                is_allowed = any(name == one or name.startswith(f"{one}.") for one in allowed)
                assert is_allowed or name.split(".")[0] in sys.stdlib_module_names, f"{file.name} imports {name}"
    loaded = "import sys, sidestack.components.pipeline; print({'torch', 'pyarrow', 'mlflow'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


def command_of(launch: Launch, **changes: object) -> str:
    arguments = {"config": "c.yaml", "out": "out", "inputs": {}} | changes
    (role,) = stage_app("encoder", "sidestack.encoder.train", launch, **arguments).roles  # type: ignore[arg-type]
    return str(role.args[1])


@pytest.mark.parametrize(("given", "overrides"), [({}, []), ({"arm": "side"}, ["ranker.arm=side"])])
def test_arm_argument_becomes_an_override(given: dict[str, str], overrides: list[str]) -> None:
    (role,) = ranker.train(config="c.yaml", dataset="d", out="o", **given).roles  # type: ignore[arg-type]
    words = shlex.split(role.args[1])
    assert [words[place + 1] for place, word in enumerate(words) if word == "--set"] == overrides


def inputs_of(app: AppDef) -> list[str]:
    words = shlex.split(app.roles[0].args[1])
    return [words[place + 1] for place, word in enumerate(words) if word == "--input"]


def test_optional_outputs_become_inputs_when_given() -> None:
    assert inputs_of(encoder.train(config="c", dataset="d", out="o")) == ["dataset=d"]
    assert inputs_of(encoder.train(config="c", dataset="d", out="o", start="s")) == ["dataset=d", "start=s"]
    sids = {"sid": "e"}
    without = encoder.materialize(config="c", dataset="d", encoders=sids, out="o")
    assert inputs_of(without) == ["dataset=d", "encoder.sid=e"]
    given = encoder.materialize(config="c", dataset="d", encoders=sids, out="o", published="p")
    assert inputs_of(given) == ["dataset=d", "encoder.sid=e", "published=p"]


def test_one_node_is_standalone_and_several_nodes_use_a_rendezvous() -> None:
    assert "--standalone" in command_of(Launch(j="1x4"))
    several = command_of(Launch(j="3x4"))
    assert "--standalone" not in several
    assert "--nnodes 3 --nproc-per-node 4 --rdzv-backend c10d" in several


def shell_words(command: str, **environment: str) -> list[str]:
    """Return the arguments of a job's torchrun as a node's shell expands them, without running the rendezvous check."""
    values = macros.Values(img_root="", app_id="id-7", replica_id="0", rank0_env="RANK0")
    script = f"python() {{ :; }}; {values.substitute(command)}".replace("exec python", "printf '%s\\n'")
    ended = subprocess.run(["bash", "-c", script], env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True)
    return ended.stdout.decode().splitlines()


def test_rendezvous_port_depends_on_the_output_and_timeout_can_be_set() -> None:
    def endpoint(out: str, **environment: str) -> str:
        words = shell_words(command_of(Launch(j="2x1"), out=out), **environment)
        return words[words.index("--rdzv-endpoint") + 1]

    ports = {int(endpoint(f"/runs/{number}").removeprefix("localhost:")) for number in range(20)}
    assert len(ports) > 18 and all(20_000 <= port < 30_000 for port in ports)
    assert endpoint("/runs/1") == endpoint("/runs/1"), "all nodes must derive the same port"
    assert endpoint("/runs/1", SIDESTACK_RENDEZVOUS_PORT="20012") == "localhost:20012"
    words = shell_words(command_of(Launch(j="2x1")), SIDESTACK_RENDEZVOUS_S="7")
    assert words[words.index("--rdzv-conf") + 1] == "join_timeout=7,read_timeout=7"
    assert words[words.index("--rdzv-id") + 1] == "id-7"


def test_one_node_does_not_resolve_its_own_name() -> None:
    words = shell_words(command_of(Launch(j="1x2")))
    assert words[words.index("--local-addr") + 1] == "127.0.0.1"


@pytest.mark.parametrize("j", ["", "2", "0x2", "2x0", "1x-2", "axb", "1x2x3"])
def test_invalid_shape_is_refused(j: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        command_of(Launch(j=j))


def test_words_with_spaces_quotes_and_dollars_reach_the_stage_unchanged() -> None:
    override = """encoder.note='a b' "$HOME" ${app_id} $$"""
    app = stage_app(
        "encoder", "sidestack.encoder.train", Launch(), config="a b.yaml", out="o", inputs={}, overrides=[override]
    )
    values = macros.Values(img_root="", app_id="id", replica_id="0", rank0_env="RANK0")
    words = shlex.split(values.apply(app.roles[0]).args[1])
    assert words[words.index("--set") + 1] == override
    assert words[words.index("--config") + 1] == "a b.yaml"


def test_restarts_switch_off_the_shared_store() -> None:
    def env(restarts: int) -> dict[str, str]:
        launch = Launch(max_restarts=restarts)
        return dict(stage_app("e", "m", launch, config="c", out="o", inputs={}).roles[0].env)

    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in env(0)
    assert env(2)["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_cores_are_divided_among_the_ranks() -> None:
    for cpu, j, threads in ((32, "1x8", "4"), (2, "1x8", "1"), (3, "2x2", "1")):
        (role,) = stage_app("e", "m", Launch(j=j, cpu=cpu), config="c", out="o", inputs={}).roles
        assert role.env["OMP_NUM_THREADS"] == threads


def test_job_with_a_url_as_output_writes_logs_on_its_node() -> None:
    config, out, inputs = "s3://b/run.yaml", "s3://b/runs/x y", {"dataset": "s3://b/tables"}
    app = stage_app("encoder", "sidestack.encoder.train", Launch(), config=config, out=out, inputs=inputs)
    (command,) = app.roles[0].args[1:]
    assert """--log-dir "$$(python -m sidestack.infra.remote.urls 's3://b/runs/x y')".logs""" in command
    assert "--config s3://b/run.yaml --input dataset=s3://b/tables --out 's3://b/runs/x y'" in command
