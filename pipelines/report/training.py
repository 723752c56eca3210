"""The arms' training: steps and settings of each arm, and the settings that differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from sidestack.pipelines.report.comparison import Training
from sidestack.pipelines.report.outputs import RankerSummary

_OWN = ("arm", "arms")
_CONTENT = "content"


def training_of(summary: RankerSummary, section: Mapping[str, Any]) -> Training:
    """Return how an arm was trained.

    Args:
        summary: its summary, with what rules decided.
        section: the resolved `ranker` section; empty if unknown.
    """
    return Training.model_validate({**section.get("training", {}), **summary.budget, "steps": summary.steps})


def differing_settings(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Return the settings that differ between arms, with each arm's value.

    Args:
        sections: arm -> its resolved `ranker` section, of one replicate; empty if unknown.
    """
    settings = {arm: dict(_flat(_with_content(section))) for arm, section in sections.items() if section}
    for name in dict.fromkeys(name for found in settings.values() for name in found):
        arms: dict[str, list[str]] = {}
        for arm, found in settings.items():
            arms.setdefault(str(found.get(name)), []).append(arm)
        if len(arms) > 1:
            yield f"{name}: " + "; ".join(f"{value} in {', '.join(of)}" for value, of in arms.items())


def _with_content(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section in which the arm's name is replaced by the arm's content settings."""
    shared = {key: value for key, value in section.items() if key not in _OWN}
    content = dict(section.get("arms", {}).get(section.get("arm"), {}))
    return {_CONTENT: {key: value for key, value in content.items() if key != "overlay"}, **shared}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
