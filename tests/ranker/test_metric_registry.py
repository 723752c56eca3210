"""The registry of metrics: order, formatted values and gain rules of its entries."""

from dataclasses import replace

import pytest

import sidestack.ranker.metric_registry
from sidestack.infra.errors import ConfigError
from sidestack.ranker.metric_registry import AUC, CALIBRATION, HEADLINE, NE, all_metrics, compared_metrics


def test_headline_metric_has_a_gain_and_comes_first() -> None:
    assert next(iter(all_metrics().values())) is HEADLINE is NE
    assert [metric.name for metric in compared_metrics()] == ["ne", "auc", "gauc"]
    assert all(name == metric.name for name, metric in all_metrics().items())


@pytest.mark.parametrize(
    ("metric", "text", "rule"),
    [
        (NE, "0.5000", "NE gain is 1 - NE / NE(none)"),
        (AUC, "0.5000", "AUC gain is AUC / AUC(none) - 1"),
        (CALIBRATION, "0.500", ""),
    ],
    ids=["lower", "higher", "neither"],
)
def test_values_and_gain_rules_are_formatted_as_text(metric: object, text: str, rule: str) -> None:
    assert isinstance(metric, type(NE))
    assert (metric.text(0.5), metric.text(None)) == (text, "")
    if metric.better:
        assert metric.gain_rule("none") == rule


@pytest.mark.parametrize("metric", [AUC.tally, replace(AUC, name="other")], ids=["no metric", "another name"])
def test_entry_point_without_a_metric_of_its_name_is_refused(monkeypatch: pytest.MonkeyPatch, metric: object) -> None:
    monkeypatch.setattr(sidestack.ranker.metric_registry, "with_plugins", lambda group, own: {**own, "theirs": metric})
    with pytest.raises(
        ConfigError, match="entry point 'theirs' of group 'sidestack.metrics': must name a ranker.metric"
    ):
        all_metrics.__wrapped__()
