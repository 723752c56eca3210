"""Gates: each opens and closes at its bound, and gives no verdict on too little data."""

from typing import Any

import pytest

from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError
from sidestack.pipelines.retrain.config import Bounds, GatesConfig
from sidestack.pipelines.retrain.gates import Judged, drift_gates, may_promote, task_gates
from sidestack.pipelines.retrain.text_tables import gate_table

GOOD = Judged(rows=10_000, positives=900, users=400, ne=0.8, calibration=1.02, gain=(0.004, 0.001, 0.007))
CONFIG = GatesConfig()


def verdicts(judged: Judged | None, has_champion: bool = True, **config: Any) -> dict[str, str]:
    gates = task_gates(GatesConfig(**config), {} if judged is None else {"click": judged}, ["click"], has_champion)
    assert may_promote(gates) == all(gate.verdict == "open" for gate in gates)
    return {gate.name: gate.verdict for gate in gates}


def test_a_candidate_that_is_not_worse_passes() -> None:
    expected = {"rows click": "open", "NE click": "open", "calibration click": "open", "gain click": "open"}
    assert verdicts(GOOD) == expected
    del expected["gain click"]
    assert verdicts(GOOD, has_champion=False) == expected


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"ne": 1.01}, "NE click"),
        ({"calibration": 1.3}, "calibration click"),
        ({"calibration": 0.7}, "calibration click"),
        ({"gain": (0.001, -0.006, 0.008)}, "gain click"),
    ],
)
def test_each_gate_closes(change: dict[str, Any], gate: str) -> None:
    found = verdicts(GOOD._replace(**change))
    assert [name for name, verdict in found.items() if verdict == "closed"] == [gate]


def test_lower_end_of_the_gain_decides_at_the_margin() -> None:
    assert verdicts(GOOD._replace(gain=(0.001, -0.005, 0.008)))["gain click"] == "open"
    assert verdicts(GOOD._replace(gain=(0.001, -0.00501, 0.008)))["gain click"] == "closed"


@pytest.mark.parametrize("change", [{"positives": 99}, {"users": 29}])
def test_too_few_positives_or_users_give_no_verdict(change: dict[str, Any]) -> None:
    found = verdicts(GOOD._replace(**change))
    assert found == {"rows click": "no verdict"}


def test_undefined_or_missing_metrics_give_no_verdict() -> None:
    assert verdicts(None) == {"rows click": "no verdict"}
    assert verdicts(GOOD._replace(gain=None))["gain click"] == "no verdict"
    assert verdicts(GOOD._replace(ne=None))["NE click"] == "no verdict"


def test_deciding_tasks_are_configurable() -> None:
    assert "rows conversion" in verdicts(GOOD, tasks=("click", "conversion"))


@pytest.mark.parametrize(("gain", "verdict"), [((-0.02, -0.03, -0.006), "closed"), ((-0.02, -0.04, -0.004), "open")])
def test_harm_gate_closes_when_a_task_that_does_not_decide_is_shown_to_be_worse(
    gain: tuple[float, float, float], verdict: str
) -> None:
    judged = {"click": GOOD, "conversion": GOOD._replace(gain=gain)}
    (harm,) = [gate for gate in task_gates(CONFIG, judged, ["click"], True) if gate.name == "harm conversion"]
    assert harm.verdict == verdict and harm.figure == gain[2]
    few = {**judged, "conversion": judged["conversion"]._replace(positives=3)}
    assert not any(gate.name == "harm conversion" for gate in task_gates(CONFIG, few, ["click"], True))


def test_drift_gates_compare_figures_with_their_bounds() -> None:
    config = GatesConfig(drift={"new_item_share": Bounds(max=0.5), "volume_change": Bounds(min=-0.5)})
    found = drift_gates(config, {"new_item_share": 0.6})
    assert {gate.name: gate.verdict for gate in found} == {"new_item_share": "closed", "volume_change": "no verdict"}
    assert not may_promote(found)
    assert drift_gates(config, {}) == []


@pytest.mark.parametrize("values", [{}, {"min": 2, "max": 1}])
def test_empty_or_reversed_bounds_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        parse(Bounds, values, "test")


def test_nan_is_outside_the_bounds() -> None:
    assert not Bounds(max=1.0).holds(float("nan"))


def test_the_table_names_gate_verdict_figure_and_rule() -> None:
    text = gate_table(task_gates(CONFIG, {"click": GOOD}, ["click"], True))
    assert "gain click" in text and "lower end at least -0.50%" in text and "+0.40% (+0.10% to +0.70%)" in text
    assert all(line == line.rstrip() for line in text.splitlines())
