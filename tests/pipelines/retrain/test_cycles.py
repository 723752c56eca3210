"""Nights of retraining end to end: training, gates, promotion, registration and rollback."""

import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidestack.encoder.sid_map import sid_maps
from sidestack.infra.errors import ConfigError, StageError
from sidestack.infra.mlflow_store import URI_VARIABLE, connect
from sidestack.infra.snapshot import CONTENT, read_dataset
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.retrain.dry_run import dry_run
from sidestack.pipelines.retrain.ledger import Ledger, Version
from sidestack.pipelines.retrain.registry import Registry
from sidestack.pipelines.retrain.rollback import roll_back
from sidestack.pipelines.retrain.text_tables import status_table
from tests.pipelines.retrain.nights import config_in, night, retraining, run_nights

pytestmark = pytest.mark.slow
MODEL = "sidestack-nights"


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each run use the store in its own folder."""
    monkeypatch.delenv(URI_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a run after three nights with policy append."""
    folder = tmp_path_factory.mktemp("nights")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(URI_VARIABLE, raising=False)
        run_nights(config_in(folder), range(3))
    yield folder


@pytest.fixture
def copied(passed: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder to continue from; a run's folder can be moved."""
    return Path(shutil.copytree(passed, tmp_path / "copy"))


def ledger_of(config: PipelineConfig) -> Ledger:
    return Ledger(run_dir(config.run))


def alias(name: str) -> str:
    """Return the version that an alias points to."""
    return str(connect().get_registered_model(MODEL).aliases[name])


def sids_of(run: Path, version: Version) -> np.ndarray[Any, Any]:
    dataset = read_dataset(run / version.dataset)
    listed = dataset.snapshot.sids["sid"]
    maps = sid_maps(dataset.store, dataset.partitions(listed.table("sid", CONTENT["item"])), 1)
    return np.concatenate(list(maps.pieces()))


def test_nights_start_from_the_champion_and_learn_each_label_once(passed: Path) -> None:
    config = config_in(passed)
    ledger = ledger_of(config)
    plans = [cycle.plan for cycle in ledger.cycles]
    assert [plan.champion for plan in plans] == [None, 1, 2]
    assert ledger.champions == [1, 2, 3]
    for task, lag in (("click", 0), ("conversion", 2)):
        learned = [plan.learned[task] for plan in plans]
        newest = [night(n).toordinal() - 1 - lag for n in range(3)]
        assert [last.toordinal() for _, last in learned] == [day - 1 for day in newest]
        assert [plan.measured[task][0].toordinal() for plan in plans] == newest
        assert learned[1][0] == learned[1][1] == date.fromordinal(learned[0][1].toordinal() + 1)


def test_cycle_records_the_seconds_of_all_its_stages(passed: Path) -> None:
    for cycle in ledger_of(config_in(passed)).cycles:
        assert cycle.outcome is not None
        assert cycle.outcome.seconds.keys() == {"prepare", *cycle.outcome.stages}
        assert min(cycle.outcome.seconds.values()) > 0


def test_published_sids_do_not_change(passed: Path) -> None:
    config = config_in(passed)
    versions = ledger_of(config).versions
    first, *later = (sids_of(run_dir(config.run), one) for one in versions.values())
    for sids in later:
        assert np.array_equal(sids[: len(first)], first)


def test_store_has_a_run_per_cycle_and_a_version_per_candidate(passed: Path) -> None:
    with retraining(config_in(passed)) as one:
        one.publish()
        client = connect()
        (experiment,) = [e for e in client.search_experiments() if e.name == "nights"]
        runs = client.search_runs([experiment.experiment_id], "attributes.run_name LIKE 'cycle%'")
        assert sorted(run.data.tags["sidestack.cycle"] for run in runs) == ["1", "2", "3"]
        assert all(run.info.status == "FINISHED" for run in runs)
        assert all("candidate_click_ne" in run.data.metrics for run in runs)
        (history,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'all cycles'")
        drawn = client.get_metric_history(history.info.run_id, "candidate_click_ne")
        assert [point.step for point in drawn] == [1, 2, 3]
        assert (alias("champion"), alias("challenger")) == ("3", "3")
        assert client.get_model_version(MODEL, "2").tags["sidestack.cycle"] == "2"


def test_call_without_new_dates_is_a_no_op(passed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with retraining(config_in(passed)) as one:
        assert one.step(night(2)) is None
    assert "nothing to do: 0 new dates" in capsys.readouterr().err
    assert len(ledger_of(config_in(passed)).cycles) == 3


def test_a_clock_that_jumps_back_learns_nothing(passed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with retraining(config_in(passed)) as one:
        assert one.step(night(1)) is None
    assert "before 2024-01-08 of cycle 3: nothing is learned" in capsys.readouterr().err


def test_status_and_dry_run_write_nothing(passed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_in(passed)
    before = sorted(path for path in passed.rglob("*"))
    lines = status_table(ledger_of(config)).splitlines()
    assert len(lines) == 4 and "champion" in lines[-1] and "promoted" in lines[1]
    with retraining(config) as one:
        dry_run(one)
    assert "would prepare first" in capsys.readouterr().out
    assert sorted(path for path in passed.rglob("*")) == before


@pytest.mark.whole
def test_rollback_moves_ledger_and_alias_and_the_next_night_starts_from_there(copied: Path) -> None:
    config = config_in(copied)
    with retraining(config) as one:
        roll_back(one)
        assert ledger_of(config).champions == [1, 2]
        assert alias("champion") == "2"
    (cycle,) = run_nights(config, range(3, 4))
    ledger = ledger_of(config)
    assert cycle.plan.champion == 2
    assert cycle.plan.learned["click"][0] == ledger.cycles[2].plan.learned["click"][0]
    assert "rollback" in status_table(ledger)
    with retraining(config) as one, pytest.raises(ConfigError, match="there is no version 9; versions are 1, 2, 3"):
        roll_back(one, 9)


@pytest.mark.whole
def test_missing_champion_is_reported_with_the_rollback_command(copied: Path) -> None:
    config = config_in(copied)
    champion = ledger_of(config).champion
    assert champion is not None
    shutil.rmtree(run_dir(config.run) / champion.ranker)
    with pytest.raises(StageError, match=r"champion 3 is not whole.*retrain rollback --version 2"):
        run_nights(config, range(3, 4))
    assert ledger_of(config).under_way is None, "no cycle begins that could not finish"
    with retraining(config) as one:
        roll_back(one)
    (cycle,) = run_nights(config, range(3, 4))
    assert cycle.plan.champion == 2


@pytest.mark.whole
def test_rollback_abandons_a_cycle_whose_champion_was_damaged(copied: Path) -> None:
    config = config_in(copied)
    with retraining(config) as one:
        plan = one.decide(one._run_prepare(night(3)), night(3))
        assert plan is not None
        one.ledger.open(plan)
    champion = ledger_of(config).champion
    assert champion is not None
    (run_dir(config.run) / champion.ranker / "summary.json").write_text("{}")
    with pytest.raises(StageError, match=r"champion 3 is not whole.*summary.json"):
        run_nights(config, range(3, 4))
    with retraining(config) as one:
        roll_back(one)
    (cycle,) = run_nights(config, range(3, 4))
    assert cycle.plan.champion == 2 and cycle.plan.newest == plan.newest


@pytest.mark.whole
def test_manually_moved_alias_closes_a_gate_and_is_kept(copied: Path) -> None:
    config = config_in(copied)
    with retraining(config) as one:
        one.publish()
        connect().set_registered_model_alias(MODEL, "champion", "1")
    (cycle,) = run_nights(config, range(3, 4))
    assert cycle.outcome is not None and not cycle.outcome.promoted
    (gate,) = [gate for gate in cycle.outcome.gates if gate.verdict == "closed"]
    assert gate.name == "registry" and "somebody moved it" in gate.why
    with retraining(config) as one:
        assert alias("champion") == "1"
        roll_back(one, 3)
        assert alias("champion") == "3"


@pytest.mark.whole
@pytest.mark.parametrize("what", ["versions", "champion"])
def test_store_is_updated_once_when_the_call_is_killed_before_recording_the_update(
    copied: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the call after it registered a version or moved the alias, and before it recorded that."""
    config = config_in(copied)
    save = Registry._save

    def killed(registry: Registry, **changes: Any) -> None:
        if what in changes:
            raise KeyboardInterrupt
        save(registry, **changes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registry, "_save", killed)
        run_nights(config, range(3, 4))
    assert ledger_of(config).champions == [1, 2, 3, 4]
    with retraining(config) as one:
        assert one.registry.foreign_change(one.ledger) == ""
        one.publish()
        versions = connect().search_model_versions(f"name = '{MODEL}'")
        assert sorted(version.tags["sidestack.cycle"] for version in versions) == ["1", "2", "3", "4"]
        assert (alias("champion"), alias("challenger")) == ("4", "4")
        assert one.registry.published.champion == 4


@pytest.mark.whole
def test_unreachable_store_is_updated_later(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(copied)
    monkeypatch.setenv(URI_VARIABLE, "http://localhost:1")
    (cycle,) = run_nights(config, range(3, 4))
    assert cycle.outcome is not None and cycle.outcome.promoted
    assert "the store is updated later" in capsys.readouterr().err
    monkeypatch.delenv(URI_VARIABLE)
    with retraining(config) as one:
        one.publish()
        assert alias("champion") == "4"
        assert set(one.registry.published.runs) == {1, 2, 3, 4}


@pytest.mark.parametrize("published", ["keep", "move"])
def test_refreshed_encoder_changes_published_sids_only_when_allowed(copied: Path, published: str) -> None:
    config = config_in(copied, retrain={"encoder": {"policy": "refresh", "published": published}})
    before = ledger_of(config).champion
    (cycle,) = run_nights(config, range(3, 4))
    assert cycle.outcome is not None and cycle.outcome.candidate is not None and before is not None
    run = run_dir(config.run)
    assert cycle.outcome.candidate.encoders != before.encoders
    was, now = sids_of(run, before), sids_of(run, cycle.outcome.candidate)
    changed = float((was != now[: len(was)]).any(axis=1).mean())
    assert (changed == 0) == (published == "keep")
    measured = [share for name, share in cycle.outcome.figures.items() if name.startswith("sid_changed_share.sid.")]
    assert max(measured) == pytest.approx(changed, abs=0.02), "items without SIDs are not counted"


def test_rebuilt_encoder_and_its_ranker_are_one_version(copied: Path) -> None:
    settings: dict[str, Any] = {"encoder": {"training": {"seed": 7}}, "retrain": {"encoder": {"policy": "rebuild"}}}
    config = config_in(copied, **settings)
    before = ledger_of(config).champion
    (cycle,) = run_nights(config, range(3, 4))
    assert cycle.outcome is not None and cycle.outcome.candidate is not None and before is not None
    assert cycle.plan.learned["click"][0] == date(2024, 1, 1), "new SIDs learn the retained window"
    assert "materialize-control" in cycle.outcome.stages, "the champion is measured with its own SIDs"
    made = read_dataset(run_dir(config.run) / cycle.outcome.candidate.dataset).snapshot.sids["sid"]
    assert made.generation != read_dataset(run_dir(config.run) / before.dataset).snapshot.sids["sid"].generation


def test_champion_is_measured_and_nothing_is_trained_when_the_policy_is_never(copied: Path) -> None:
    config = config_in(copied, retrain={"encoder": {"policy": "never"}})
    (cycle,) = run_nights(config, range(3, 4))
    assert cycle.outcome is not None and cycle.outcome.candidate is None
    assert "champion_click_ne" in cycle.outcome.figures
    assert not any(label.startswith("ranker") for label in cycle.outcome.stages)


@pytest.mark.whole
def test_a_reference_from_scratch_is_measured_on_request(copied: Path) -> None:
    config = config_in(copied, retrain={"reference": True})
    (cycle,) = run_nights(config, range(3, 4))
    assert cycle.outcome is not None
    assert {"reference_click_ne", "champion_click_ne", "candidate_click_ne"} <= cycle.outcome.figures.keys()
