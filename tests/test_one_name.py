"""Our packages are imported only below `sidestack`. A module that is imported under two names is two modules, with two
copies of each class, and a top-level `infra` or `pipelines` could be another distribution's package."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.components.golden import ROOT
from tests.docs.pages import GUIDES, blocks

PACKAGES = {"infra", "encoder", "ranker", "components", "pipelines", "benchmarks"}
HERE = Path(__file__)
SOURCES = sorted(
    file for folder in (*PACKAGES, "tests", "docs") for file in (ROOT / folder).rglob("*.py") if file != HERE
)
IMPORT = re.compile(r"(?:^|[;\n]) *(?:from|import) ([a-z]+)\.", re.MULTILINE)
PATCHES = ("setattr", "delattr", "patch")


def old_names(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each import of our packages without `sidestack`, also in strings that run or patch one."""
    for node in ast.walk(ast.parse(text)):
        names: list[object] = []
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif isinstance(node, ast.List | ast.Tuple):
            after = zip(node.elts, node.elts[1:], strict=False)
            names = [one.value for before, one in after if is_text(before, "-m") and isinstance(one, ast.Constant)]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in PATCHES and isinstance(first, ast.Constant) and "." in str(first.value):
                names = [first.value]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # a program in a string
            names = list(IMPORT.findall(node.value))
        found = [str(name) for name in names if str(name).split(".")[0] in PACKAGES]
        yield from ((getattr(node, "lineno", 0), name) for name in found)


def is_text(node: ast.expr, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text


def test_sources_import_our_packages_only_below_sidestack() -> None:
    assert len(SOURCES) > 500
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in SOURCES
        for line, name in old_names(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_pages_import_our_packages_only_below_sidestack() -> None:
    code = [(page, text) for page in GUIDES for language, text in blocks(page) if language in ("python", "py")]
    assert not [(str(page.relative_to(ROOT)), name) for page, text in code for _, name in old_names(text)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import os, infra.commit", ["infra.commit"]),
        ("def f():\n    from ranker import fit", ["ranker"]),
        ("run([python, '-m', 'encoder.train', '--out', out])", ["encoder.train"]),
        ("mock.patch('infra.commit._hash')", ["infra.commit._hash"]),
        ("run([python, '-c', 'x = 1; from infra.commit import verify'])", ["infra"]),
        ("from sidestack.infra import commit\nrun(['-m', 'sidestack.infra.doctor'])\nsettings('ranker.arm')", []),
    ],
)
def test_import_without_sidestack_is_found(text: str, names: list[str]) -> None:
    assert [name for _, name in old_names(text)] == names


def test_sidestack_contains_every_package_and_nothing_else() -> None:
    place = ROOT / "sidestack"
    assert {path.name for path in place.iterdir()} - {"__pycache__"} == PACKAGES | {"__init__.py"}
    assert {name: (place / name).readlink() for name in PACKAGES} == {name: Path("..", name) for name in PACKAGES}


def test_program_of_the_checkout_imports_no_module_by_its_old_name() -> None:
    program = f"""
import contextlib, os, runpy, sys
sys.argv = ["run", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, "w")):
    runpy.run_module("pipelines.run", run_name="__main__", alter_sys=True)
print(sorted(name for name in sys.modules if name.split(".")[0] in {PACKAGES}))
print("sidestack.pipelines.execution" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split("\n")[:2] == ["['pipelines']", "True"], ended.stderr
