"""`make audit`: the licence of every installed package, and known vulnerabilities where a database is reachable.

Exit status: 0, no finding; 1, a licence that is not allowed, or a vulnerability; 2, all licences are allowed, but
vulnerabilities could not be looked up.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from sidestack.infra.console import wide_console
from sidestack.infra.errors import ConfigError, SidestackError
from sidestack.infra.licences import Finding, Policy, check_licences, read_policy, unused

POLICY = Path(__file__).resolve().parents[1] / "requirements/licences.yaml"


class UnreachableError(SidestackError):
    """No vulnerability database could be queried."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print both reports and return the exit status."""
    parser = argparse.ArgumentParser(prog="infra.audit", description="Check licences and known vulnerabilities.")
    parser.add_argument(
        "--pip-audit", type=Path, required=True, help="the command, which may be of another environment"
    )
    command = parser.parse_args(argv).pip_audit
    try:
        policy = read_policy(POLICY)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    is_right = print_licences(list(check_licences(installed(), policy)), policy)
    try:
        vulnerabilities, num_asked, skipped = look_up(command, Path(sysconfig.get_path("purelib")), policy)
    except UnreachableError as error:
        print(f"vulnerabilities: NOT LOOKED UP: {error}")
        return 2 if is_right else 1
    not_asked = f"; not in the database: {', '.join(skipped)}" if skipped else ""
    print(f"vulnerabilities: {num_asked} distributions looked up, {len(vulnerabilities)} known{not_asked}")
    print("".join(f"  {line}\n" for line in vulnerabilities), end="")
    return 0 if is_right and not vulnerabilities else 1


def installed() -> Iterable[Distribution]:
    """Return this environment's distributions, without those that setuptools vendors and may put on the path."""
    return distributions(path=sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))


def print_licences(found: Sequence[Finding], policy: Policy) -> bool:
    """Print the distributions by licence, every exception and every fault; return whether there is no fault."""
    from rich.table import Table

    allowed: dict[str, list[str]] = {}
    for one in found:
        if one.is_allowed and not one.why:
            allowed.setdefault(one.licence, []).append(one.name)
    table = Table("licence", "distributions", "why", box=None, header_style="bold", pad_edge=False)
    for licence, names in sorted(allowed.items(), key=lambda item: (-len(item[1]), item[0])):
        table.add_row(licence, f"{len(names)}: {', '.join(names)}", "allowed")
    for one in found:
        if one.why or not one.is_allowed:
            table.add_row(one.licence, f"{one.name} {one.version}", one.why or "NOT ALLOWED")
    wide_console().print(table)
    wrong = [one.name for one in found if not one.is_allowed]
    print(f"licences: {len(found)} distributions, {len(wrong)} not allowed{': ' if wrong else ''}{', '.join(wrong)}")
    for name in unused(found, policy):
        print(f"licences: the exception of {name} is needed by nothing that is installed")
    return not wrong


def look_up(command: Path, packages: Path, policy: Policy) -> tuple[list[str], int, list[str]]:
    """Look up the vulnerabilities of the distributions in a folder.

    Args:
        command: path of pip-audit. packages: the folder. policy: lists the advisories that do not concern us.

    Returns:
        one line for each vulnerability, the number of distributions that the database has, and those that it lacks.

    Raises:
        UnreachableError: there is no such command, or no database answers. pip-audit itself reports "no known
            vulnerabilities" if the database has none of the distributions.
    """
    arguments = ["--path", str(packages), "--format", "json", "--progress-spinner", "off"]
    try:
        ended = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=600)
        asked: list[dict[str, Any]] = json.loads(ended.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnreachableError(str(error)) from error
    except (ValueError, KeyError) as error:
        raise UnreachableError((ended.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]) from error
    known = [one for one in asked if "skip_reason" not in one]
    if not known:
        raise UnreachableError(f"the index knows none of the {len(asked)} distributions; it may be a mirror")
    lines = [
        f"{one['name']} {one['version']}: {fault['id']}; fixed in {', '.join(fault['fix_versions']) or 'none yet'}"
        for one in known
        for fault in one["vulns"]
        if fault["id"] not in policy.advisories
    ]
    return lines, len(known), sorted(one["name"] for one in asked if "skip_reason" in one)


if __name__ == "__main__":
    sys.exit(main())
