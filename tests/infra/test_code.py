"""The digest of code depends on the names and contents of the files of packages and modules only."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestack.infra.code import (
    CLUSTERS,
    DEPLOY,
    ROOT,
    code_digest,
    code_environment,
    foreign_code,
    python_files,
    require_code,
)
from sidestack.infra.errors import ConfigError
from sidestack.pipelines.prepare.dataset import CODE as PREPARE_CODE


@pytest.fixture
def clean_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/__init__.py", "a/b/one.py", "a/notes.txt", "c.py", "d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    return tmp_path


def test_python_files_are_those_of_whole_packages_and_single_modules(root: Path) -> None:
    found = {path.relative_to(root).as_posix() for path in python_files(("a", "c.py"), root)}
    assert found == {"a/__init__.py", "a/b/one.py", "c.py"}


def test_code_digest_depends_on_names_and_contents_only(root: Path) -> None:
    before = code_digest(("a", "c.py"), root)
    assert code_digest(("c.py", "a"), root) == before
    (root / "d.py").write_text("other")
    (root / "a" / "notes.txt").write_text("other")
    assert code_digest(("a", "c.py"), root) == before
    (root / "a" / "b" / "one.py").write_text("other")
    changed = code_digest(("a", "c.py"), root)
    (root / "a" / "b" / "one.py").rename(root / "a" / "b" / "two.py")
    assert len({before, changed, code_digest(("a", "c.py"), root)}) == 3


def test_schedules_are_not_code(root: Path) -> None:
    for name in ("infra/one.py", f"{DEPLOY}/schedule/dag.py"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    assert list(python_files(("infra",), root)) == [root / "infra/one.py"]


def test_code_of_prepare_exists() -> None:
    assert all((ROOT / name).exists() for name in PREPARE_CODE)
    assert len(list(python_files(PREPARE_CODE))) > 15


def test_foreign_code_is_digested_by_package(root: Path, monkeypatch: pytest.MonkeyPatch, clean_modules: None) -> None:
    monkeypatch.syspath_prepend(str(root))
    (root / "theirs").mkdir()
    (root / "theirs/__init__.py").touch()
    (root / "theirs/kind.py").write_text("class Kind: ...\n")
    (root / "alone.py").write_text("class Kind: ...\n")
    kinds = [importlib.import_module(name).Kind for name in ("theirs.kind", "alone")]
    found = foreign_code([*kinds, ConfigError])
    assert found == {"alone": code_digest(["alone.py"], root), "theirs": code_digest(["theirs"], root)}
    (root / "theirs/kind.py").write_text("class Kind: more = 1\n")
    assert foreign_code(kinds)["theirs"] != found["theirs"]


def test_job_refuses_code_other_than_its_key_names(root: Path) -> None:
    environment = code_environment(("a", "c.py"), root)
    assert require_code(environment, root) == code_digest(("a", "c.py"), root)
    (root / "d.py").write_text("not the job's")
    require_code(environment, root)
    (root / "c.py").write_text("other")
    with pytest.raises(
        ConfigError, match=r"code \w{12}: a, c\.py in .* is not the code that the job's key names, \w{12}"
    ):
        require_code(environment, root)


def test_any_code_is_accepted_without_a_job(root: Path) -> None:
    (root / "infra").mkdir()
    (root / "infra/x.py").write_text("x")
    assert require_code({}, root) == code_digest(("infra",), root)


def test_cluster_modules_are_not_code(root: Path) -> None:
    (root / CLUSTERS).mkdir(parents=True)
    (root / CLUSTERS / "pods.py").touch()
    assert list(python_files(("infra",), root)) == []
