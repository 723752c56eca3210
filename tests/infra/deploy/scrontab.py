"""Parse scrontab(1): comments, #SCRON options, NAME=value lines, and entries of five fields and a command."""

import re
import shlex
from dataclasses import dataclass, field

FIELDS = {"minute": (0, 59), "hour": (0, 23), "day of month": (1, 31), "month": (1, 12), "day of week": (0, 7)}
# The long options of sbatch(1) that our schedule may use; any other option is refused.
OPTIONS = {
    *(
        "--account",
        "--chdir",
        "--constraint",
        "--cpus-per-task",
        "--error",
        "--job-name",
        "--mem",
        "--nodes",
        "--ntasks",
    ),
    *("--open-mode", "--output", "--partition", "--qos", "--signal", "--time"),
}


@dataclass(frozen=True)
class Entry:
    """One entry: its five time fields, its command, and the options of the #SCRON lines above it."""

    times: tuple[str, ...]
    command: str
    options: dict[str, str] = field(default_factory=dict)


def parse_scrontab(text: str) -> list[Entry]:
    """Return the entries of a scrontab.

    Raises:
        ValueError: a line is not valid by scrontab(1), or options have no entry below them.
    """
    entries: list[Entry] = []
    options: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#SCRON"):
            options |= _options(line.removeprefix("#SCRON"), number)
        elif line.strip() and not line.lstrip().startswith("#") and not re.match(r"\w+=", line):
            *times, command = [*line.split(maxsplit=5), ""][:6]
            _check_times(times, number)
            entries.append(Entry(tuple(times), command, options))
            options = {}
    if options:
        raise ValueError(f"options without an entry: {options}")
    return entries


def _options(text: str, number: int) -> dict[str, str]:
    found = dict(part.partition("=")[::2] for part in shlex.split(text))
    if wrong := [name for name, value in found.items() if name not in OPTIONS or not value]:
        raise ValueError(f"line {number}: not options of sbatch with a value: {wrong}")
    return found


def _check_times(times: list[str], number: int) -> None:
    if len(times) != len(FIELDS):
        raise ValueError(f"line {number}: an entry has five fields and a command")
    for (name, (least, most)), value in zip(FIELDS.items(), times, strict=True):
        for part in value.split(","):
            match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/[1-9]\d*)?", part)
            bounds = [int(bound) for bound in match.groups() if bound] if match else [most + 1]
            if bounds != sorted(set(bounds)) or not all(least <= bound <= most for bound in bounds):
                raise ValueError(f"line {number}: {value!r} is no {name} ({least} to {most})")
