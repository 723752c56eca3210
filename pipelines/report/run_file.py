"""A run file assembled from the resolved sections of a run's stages: `--config` reruns it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestack.encoder.config import ENCODER_INPUT
from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.infra.config import to_yaml
from sidestack.infra.errors import DataError
from sidestack.pipelines.report.arms import Arms
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.report.outputs import read_section, read_sections
from sidestack.ranker.baseline.config import ARM as BASELINE
from sidestack.ranker.config import OVERLAY_KEYS

Section = dict[str, Any]


def run_file(inputs: Mapping[str, Path], arms: Arms, config: CompareConfig) -> str:
    """Return the run's file as YAML.

    The stages' sections do not include the run's name and launch settings; the file has a new name.

    Args:
        inputs: the comparison's inputs, by name. arms: the rankers' outputs among them.
        config: the comparison's own section.

    Raises:
        DataError: an input lacks its configuration, or arms differ in settings that one file cannot express.
    """
    encoders = {
        name.removeprefix(ENCODER_INPUT): _section(path, "encoder", name)
        for name, path in inputs.items()
        if name.startswith(ENCODER_INPUT)
    }
    values = {
        "prepare": _section(inputs["prepare"], "prepare", "prepare"),
        "encoder": encoders.pop(DEFAULT_NAME),
        "encoders": encoders,
        "materialize": _section(inputs["dataset"], "materialize", "dataset"),
        **_trained(arms),
        "compare": config.model_dump(mode="json"),
        "run": {"name": "again", "replicates": len(next(iter(arms.values())))},
    }
    return to_yaml({name: section for name, section in values.items() if section})


def _trained(arms: Arms) -> dict[str, Section]:
    """Return the sections that trained the arms: the ranker's, and those of arms with their own stage."""
    rankers: dict[str, list[Section]] = {}
    others: dict[str, Section] = {}
    for arm, paths in arms.items():
        own = {name: section for name, section in read_sections(paths[0]).items() if name != "ranker"}
        if own:
            others |= own
        else:
            rankers[arm] = list(_sections(arm, paths))
    others.setdefault(BASELINE, {"enabled": False})
    return {"ranker": _ranker(rankers), **others}


def _section(path: Path, section: str, name: str) -> Section:
    found = read_section(path, section)
    if not found:
        raise DataError(f"the output {name} does not record how it was made")
    return found


def _sections(arm: str, paths: Sequence[Path]) -> Iterator[Section]:
    for replicate, path in enumerate(paths):
        section = _section(path, "ranker", f"of {arm}")
        seed = section.get("training", {}).get("seed", 0) - replicate
        yield _overlaid(section, {"training": {"seed": seed}})


def _ranker(found: Mapping[str, Sequence[Section]]) -> Section:
    """Return the section that resolves to every arm's: the shared settings, and an overlay for each arm."""
    shared = next(iter(found.values()))[0]
    arms = {}
    for arm, (first, *others) in found.items():
        if any(other != first for other in others):
            raise DataError(f"replicates of {arm} differ in more than their seeds")
        overlay = {
            section: {key: value for key, value in first.get(section, {}).items() if key in keys}
            for section, keys in OVERLAY_KEYS.items()
        }
        overlay = {section: _changes(values, shared.get(section, {})) for section, values in overlay.items()}
        overlay = {section: changes for section, changes in overlay.items() if changes}
        if _common(_overlaid(shared, overlay)) != _common(first):
            raise DataError(f"{arm} differs from {shared['arm']} in more than an arm may set for itself")
        arms[arm] = {**first.get("arms", {}).get(arm, {}), "overlay": overlay}
    return {**shared, "arms": arms}


def _changes(values: Section, before: Section) -> Section:
    return {key: value for key, value in values.items() if before.get(key) != value}


def _common(section: Section) -> Section:
    """Return the settings that are not specific to the arm."""
    return {key: value for key, value in section.items() if key not in ("arm", "arms")}


def _overlaid(section: Section, changes: Mapping[str, Section]) -> Section:
    return {**section, **{key: {**section.get(key, {}), **values} for key, values in changes.items()}}
