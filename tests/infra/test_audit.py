"""The audit of installed licences and of known vulnerabilities, also when the vulnerability database is unreachable."""

import json
import stat
from collections.abc import Sequence
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from sidestack.infra import audit
from sidestack.infra.audit import POLICY, UnreachableError, look_up, print_licences
from sidestack.infra.errors import ConfigError
from sidestack.infra.licences import Exemption, Policy, check_licences, is_allowed, licence_of, read_policy, unused

RULES = Policy(
    allowed=("MIT", "BSD-3-Clause", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"),
    called={"MIT License": "MIT", "BSD License": "BSD-3-Clause"},
    exceptions={
        "odd": Exemption(licence="MPL-2.0", why="used as it comes"),
        "nvidia-*": Exemption(licence="N", why="CUDA's own"),
    },
    advisories={"GHSA-0": "the function is not called by us"},
)


def distribution(folder: Path, name: str, *lines: str) -> PathDistribution:
    place = folder / f"{name}-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines, ""]))
    return PathDistribution(place)


def test_installed_licences_are_allowed_or_explained(capsys: pytest.CaptureFixture[str]) -> None:
    policy = read_policy(POLICY)
    found = list(check_licences(audit.installed(), policy))
    assert {"torch", "mlflow", "pytest"} <= {one.name for one in found}
    assert [f"{one.name}: {one.licence}" for one in found if not one.is_allowed] == []
    assert unused(found, policy) == [], "exceptions that are no longer needed"
    assert print_licences(found, policy)
    printed = capsys.readouterr().out
    assert "0 not allowed" in printed
    words = printed.replace(",", " ").split()
    assert all(one.name in words for one in found if len(one.name) < 20)


@pytest.mark.parametrize(
    ("lines", "licence", "allowed"),
    [
        (["License-Expression: MIT"], "MIT", True),
        (["License-Expression: GPL-3.0-only", "License: MIT"], "GPL-3.0-only", False),
        (["License: MIT"], "MIT", True),
        (["License: GPL", "Classifier: License :: OSI Approved :: MIT License"], "MIT", True),
        (["Classifier: License :: OSI Approved :: BSD License"], "BSD-3-Clause", True),
        (["Classifier: License :: OSI Approved"], "License :: OSI Approved", False),
        (["License: All rights reserved"], "All rights reserved", False),
        (["License: Copyright me", "        Permission is granted"], "", False),
        ([], "", False),
    ],
)
def test_licence_is_read_from_the_metadata(lines: Sequence[str], licence: str, allowed: bool, tmp_path: Path) -> None:
    made = distribution(tmp_path, "made", *lines)
    found = licence_of(made, RULES)
    assert found == licence.rpartition(" :: ")[2]
    assert is_allowed(found, RULES) is allowed
    (one,) = check_licences([made], RULES)
    assert one.is_allowed is allowed


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT AND BSD-3-Clause", True),
        ("MIT AND GPL-2.0-only", False),
        ("MIT OR GPL-2.0-only", True),
        ("GPL-2.0-only OR LGPL-2.1-only", False),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("GPL-2.0-only WITH LLVM-exception", False),
        ("GPL-2.0-only AND (MIT OR Apache-2.0)", False),
        ("", False),
    ],
)
def test_or_needs_one_allowed_licence_and_and_needs_all(expression: str, allowed: bool) -> None:
    assert is_allowed(expression, RULES) is allowed


def test_exception_applies_by_name_and_unused_one_is_reported(tmp_path: Path) -> None:
    made = [
        distribution(tmp_path, "nvidia_cuda_x", "License: Proprietary"),
        distribution(tmp_path, "mit", "License: MIT"),
    ]
    found = list(check_licences(made, RULES))
    assert [(one.name, one.is_allowed, one.why) for one in found] == [
        ("mit", True, ""),
        ("nvidia_cuda_x", True, "CUDA's own"),
    ]
    assert unused(found, RULES) == ["odd"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("allowed: [MIT]", "called: "),
        ("allowed: [\n", "cannot be read"),
        ("allowed: []\ncalled: {}\nadvisories: {}\nexceptions: {x: {licence: GPL, why: ''}}", "exceptions.x.why"),
        ("allowed: []\ncalled: {}\nadvisories: {GHSA-1: ok}\nexceptions: {}", "advisories.GHSA-1"),
    ],
)
def test_policy_without_reasons_or_keys_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "licences.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_policy(tmp_path / "licences.yaml")


def fake_pip_audit(folder: Path, output: str, status: int = 0) -> Path:
    """Write a program that prints an output as pip-audit does."""
    file = folder / "pip-audit"
    (folder / "output").write_text(output)
    file.write_text(f"#!/bin/sh\ncat {folder}/output\necho 'ConnectionError: no route' >&2\nexit {status}\n")
    file.chmod(stat.S_IRWXU)
    return file


FOUND = {
    "dependencies": [
        {"name": "a", "version": "1", "vulns": []},
        {
            "name": "b",
            "version": "2",
            "vulns": [{"id": "GHSA-0", "fix_versions": []}, {"id": "GHSA-1", "fix_versions": ["3"]}],
        },
        {"name": "ours", "skip_reason": "Dependency not found on PyPI"},
    ]
}
NONE_ASKED = {"dependencies": [{"name": "a", "skip_reason": "Dependency not found on PyPI"}]}


def test_vulnerabilities_are_listed_except_exempt_ones(tmp_path: Path) -> None:
    lines, num_looked_up, skipped = look_up(fake_pip_audit(tmp_path, json.dumps(FOUND), 1), tmp_path, RULES)
    assert (lines, num_looked_up, skipped) == (["b 2: GHSA-1; fixed in 3"], 2, ["ours"])


@pytest.mark.parametrize(
    ("output", "message"),
    [("", "ConnectionError: no route"), (json.dumps(NONE_ASKED), "the index knows none of the 1 distributions")],
)
def test_database_that_does_not_answer_raises_unreachable_error(output: str, message: str, tmp_path: Path) -> None:
    """pip-audit itself reports "No known vulnerabilities found" if the index knows no distribution."""
    with pytest.raises(UnreachableError, match=message):
        look_up(fake_pip_audit(tmp_path, output), tmp_path, RULES)
    with pytest.raises(UnreachableError, match="No such file"):
        look_up(tmp_path / "absent", tmp_path, RULES)


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        (json.dumps({"dependencies": FOUND["dependencies"][:1]}), 0, "1 distributions looked up, 0 known"),
        (json.dumps(FOUND), 1, "  b 2: GHSA-1; fixed in 3"),
        ("", 2, "vulnerabilities: NOT LOOKED UP: ConnectionError: no route"),
    ],
)
def test_exit_status_reports_the_result(
    output: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(["--pip-audit", str(fake_pip_audit(tmp_path, output))]) == status
    assert message in capsys.readouterr().out
