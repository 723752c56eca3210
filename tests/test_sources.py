"""No source file unpickles, runs text as code, passes text to a shell or reads text in the locale's encoding."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sidestack.infra.code import ROOT

PACKAGES = ("infra", "encoder", "ranker", "components", "pipelines", "benchmarks", "tests")

UNPICKLING_MODULES = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
FORBIDDEN = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "compiles text",
    "numpy.load": "unpickles with allow_pickle",
    "torch.load": "unpickles without weights_only",
    "torch.jit.load": "runs code from the file",
    "torch.hub.load": "runs downloaded code",
    "torch.export.load": "unpickles example inputs",
    "torch.distributed.all_gather_object": "unpickles what other ranks send",
    "torch.distributed.broadcast_object_list": "unpickles what other ranks send",
    "torch.distributed.gather_object": "unpickles what other ranks send",
    "torch.distributed.scatter_object_list": "unpickles what other ranks send",
    "pandas.read_pickle": "unpickles",
    "mlflow.pyfunc.load_model": "unpickles files that MLmodel names, unless MLflow's setting forbids it",
    "yaml.load": "creates objects that tags name",
    "yaml.load_all": "creates objects that tags name",
    "yaml.full_load": "creates objects that tags name",
    "yaml.unsafe_load": "creates objects that tags name",
    "os.system": "passes text to a shell",
    "os.popen": "passes text to a shell",
    "subprocess.getoutput": "passes text to a shell",
    "subprocess.getstatusoutput": "passes text to a shell",
    "asyncio.create_subprocess_shell": "passes text to a shell",
}
"""Forbidden calls by full name, and why they are forbidden."""

ALLOWED: Mapping[tuple[str, str], str] = {
    ("infra/config.py", "yaml.load"): "its loader is a SafeLoader that refuses more",
    ("infra/distributed.py", "torch.distributed.all_gather_object"): "ranks of one job, over its own connections",
    ("infra/distributed.py", "torch.distributed.broadcast_object_list"): "ranks of one job, over its own connections",
    ("infra/served.py", "mlflow.pyfunc.load_model"): "MLflow's setting forbids pickles: see refusing_pickles",
    ("tests/test_planted_pickles.py", "pickle"): "creates the planted pickles",
    ("tests/test_planted_pickles.py", "torch.load"): "checks that the pickles run",
    ("tests/test_planted_pickles.py", "numpy.load"): "checks that the pickles run",
    ("tests/ranker/test_plan.py", "eval"): "a sum of products that the code under test has printed",
}
"""Exceptions: file and call, and why the call is allowed there."""


def sources() -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def nodes(text: str) -> list[ast.Call | ast.Import | ast.ImportFrom]:
    """Return a module's calls and imports."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call | ast.Import | ast.ImportFrom)]


def imported_names(found: list[ast.Call | ast.Import | ast.ImportFrom]) -> dict[str, str]:
    """Return the full names of a module's imported names, such as numpy for `np` and torch.load for `load`."""
    names = {}
    for node in found:
        if isinstance(node, ast.Import):
            for one in node.names:
                names[one.asname or one.name.partition(".")[0]] = one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return names


def full_name(node: ast.expr, names: Mapping[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> object:
    """Return a keyword argument's constant, None if it is not given, or its node if it is not a constant."""
    found = next((one.value for one in call.keywords if one.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else found


def faults(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, name and reason of each forbidden import and call."""
    found = nodes(text)
    names = imported_names(found)
    for node in found:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in [module] if module else [one.name for one in node.names]:
                if name.partition(".")[0] in UNPICKLING_MODULES:
                    yield node.lineno, name, "unpickles"
        if isinstance(node, ast.Call):
            name = full_name(node.func, names)
            is_safe = (name == "numpy.load" and keyword(node, "allow_pickle") in (None, False)) or (
                name == "torch.load" and keyword(node, "weights_only") is True
            )
            if name in FORBIDDEN and not is_safe:
                yield node.lineno, name, FORBIDDEN[name]
            if keyword(node, "shell") not in (None, False):
                yield node.lineno, f"{name}(shell=)", "passes text to a shell"


def unnamed_encodings(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each call that reads or writes text without naming the encoding."""
    for node in nodes(text):
        if not isinstance(node, ast.Call) or keyword(node, "encoding") is not None:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_path = isinstance(node.func, ast.Attribute)
        if name in ("read_text", "write_text"):
            yield node.lineno, name
        if name == "open":
            mode = next((arg for arg in node.args[0 if is_path else 1 :]), None)
            value = mode.value if isinstance(mode, ast.Constant) else keyword(node, "mode")
            is_text = isinstance(value, str) and set(value) <= set("rwax+t")
            if is_text or (mode is None and not is_path):
                yield node.lineno, name


def test_no_source_unpickles_or_runs_text_or_uses_a_shell() -> None:
    found, used = [], set()
    for file in sources():
        for line, name, reason in faults((ROOT / file).read_text(encoding="utf-8")):
            if (file, name) in ALLOWED:
                used.add((file, name))
            else:
                found.append(f"{file}:{line}: {name} {reason}")
    assert not found, "\n".join(found)
    assert used == ALLOWED.keys(), "an exception in ALLOWED is no longer used"


def test_text_files_are_read_and_written_as_utf8() -> None:
    found = [
        f"{file}:{line}: {name}"
        for file in sources()
        if not file.startswith("tests/")
        for line, name in unnamed_encodings((ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("import torch\ntorch.load(file)", "torch.load"),
        ("import torch\ntorch.load(file, weights_only=False)", "torch.load"),
        ("from torch import load as read\nread(file)", "torch.load"),
        ("import numpy as np\nnp.load(file, allow_pickle=True)", "numpy.load"),
        ("import numpy as np\nnp.load(file, allow_pickle=flag)", "numpy.load"),
        ("import yaml\nyaml.load(text, yaml.Loader)", "yaml.load"),
        ("import subprocess\nsubprocess.run(command, shell=True)", "subprocess.run(shell=)"),
        ("import os\nos.system(command)", "os.system"),
        ("eval(text)", "eval"),
        ("import mlflow.pyfunc\nmlflow.pyfunc.load_model(path)", "mlflow.pyfunc.load_model"),
    ],
)
def test_forbidden_call_is_found(text: str, name: str) -> None:
    assert [one for _, one, _ in faults(text)] == [name]


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(file, weights_only=True)",
        "import numpy as np\nnp.load(file)\nnp.load(file, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(command, shell=False)",
        "model.eval()",
        "import re\nre.compile(text)",
    ],
)
def test_safe_call_is_not_reported(text: str) -> None:
    assert not list(faults(text))


def test_missing_encoding_is_found() -> None:
    text = "a.read_text()\nb.write_text(x)\nopen(c)\nd.open('w')\nopen(e, 'rb')\nf.open('rb')\nreader.open(1)"
    assert [line for line, _ in unnamed_encodings(text)] == [1, 2, 3, 4]
    assert not list(unnamed_encodings("a.read_text(encoding='utf-8')\nopen(c, encoding='utf-8')"))


def test_list_of_sources_is_not_empty() -> None:
    assert {"infra/config.py", "ranker/train.py", "tests/test_sources.py"} <= set(sources())
    assert all(Path(ROOT / file).is_file() for file in sources())
