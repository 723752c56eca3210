"""The check of a raw log: the guessed configuration, the counts, the warnings, and the reported faults."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.infra.config import load_file, parse
from sidestack.pipelines.check import profile
from sidestack.pipelines.check.__main__ import main
from sidestack.pipelines.config import PipelineConfig
from tests.pipelines.prepare.log.raw import catalogue, log_config, raw_events, write, write_log


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["check", *arguments])
    main()


def write_config(folder: Path, **values: Any) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"prepare": log_config(folder, **values), "run": {"name": "own"}}))
    return file


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return what was printed, by the first words of each line."""
    found = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line]
    return {name.strip(): value.strip() for name, value in found}


def test_check_counts_a_log_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = write_log(tmp_path, days=6)
    run(monkeypatch, "--config", str(write_config(tmp_path)))
    printed = lines_of(capsys)
    assert printed["events"] == "240 from 2024-03-01 to 2024-03-06, 6 dates"
    assert printed["users, items"] == "6 and 9"
    # Orders have a follow-up of two days, so the last two dates are left out.
    assert printed["train, test"] == "2024-03-01 to 2024-03-03, 2024-03-04 to 2024-03-04"
    clicks = [row for row in events if row["action"] == "click"]
    of_test = [row for row in clicks if row["ts"].day == 4]
    share = f"{len(clicks):,} positives ({len(clicks) / 240:.2%}), {len(of_test)} to test"
    assert printed["task click"] == f"{share}; 100% of users have both labels"
    unlisted = sum(row["sku"] > "i06" for row in events)
    assert printed["catalogue"].startswith(f"{1 - unlisted / 240:.1%} of events are of items in it")
    places = [(row["uid"], row["ts"]) for row in events]
    assert printed["ties"].startswith(f"{sum(places.count(one) > 1 for one in places) / 240:.1%} of events")
    assert not (tmp_path / "runs").exists()


def test_check_warns_about_what_a_verdict_will_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path, days=2)
    tasks = {"seen": {}, "click": {"where": "action = 'click'"}}
    run(monkeypatch, "--config", str(write_config(tmp_path, tasks=tasks)))
    printed = capsys.readouterr().out
    assert "task seen: all labels are 1; set prepare.source.negatives" in printed
    assert "positives in the test dates: expect no verdict on small gains" in printed
    assert "of items that the catalogue lacks: they have no content" in printed
    assert "run.replicates=2: intervals reach 2.3 standard deviations of a gain, of three trainings 1.4" in printed
    run(monkeypatch, "--config", str(tmp_path / "run.yaml"), "--set", "run.replicates=1")
    assert "run.replicates=1: one training is no result" in capsys.readouterr().out
    (tmp_path / "one").mkdir()
    write_log(tmp_path / "one", days=1)
    run(monkeypatch, "--config", str(write_config(tmp_path / "one")))
    assert "1 dates are too few to train on some and test on others" in capsys.readouterr().out


def test_all_faults_are_reported_with_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path, days=2)
    write(tmp_path / "items.parquet", [{"sku": "i00", "vec": ["a"], "kind": "k"}])
    config = log_config(tmp_path)
    config["source"]["events"] |= {"dense": ["eid", "weight"], "categoricals": ["price"]}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"prepare": config, "run": {"name": "own"}}))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--config", str(file))
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and "the raw log has 5 faults:" in err
    assert err.count("column 'weight' is missing") == err.count("column 'eid' (VARCHAR) must be a finite number") == 2
    assert "column 'vec' (VARCHAR[]) must be a list of finite numbers" in err


def test_source_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("prepare: {source: {kind: synthetic}}\nrun: {name: test}\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--config", str(tmp_path / "run.yaml"))
    assert "a raw log (kind: log) is checked, not synthetic" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["actions", "flags", "ratings", "positives"])
def test_guessed_configuration_of_a_folder_passes_the_check(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    added: dict[str, Any] = {
        "actions": lambda row, number: {"action": row["action"]},
        "flags": lambda row, number: {"clicked": row["action"] == "click", "purchase": number % 5 == 0},
        "ratings": lambda row, number: {"rating": float(number % 5 + 1)},
        "positives": lambda row, number: {},
    }
    events = [
        {"user_id": row["uid"], "product_id": row["sku"], "event_time": row["ts"], "device": row["device"],
         "price": number * 1.5} | added[form](row, number)
        for number, row in enumerate(raw_events(6, items=24))
    ]  # fmt: skip
    folder = tmp_path / "raw"
    write(folder / "events" / "part-0.parquet", events)
    (folder / "_SUCCESS").write_text("")
    write(folder / "products.parquet", [
        {"product_id": row["sku"], "title": f"a {row['kind']} called {row['sku']}", "vector": row["vec"]}
        | {"brand": row["kind"]}
        for row in catalogue(24)
    ])  # fmt: skip
    write(folder / "customers.parquet", [{"user_id": f"u{n}", "segment": f"s{n % 2}"} for n in range(6)])
    out = tmp_path / "run.yaml"
    run(monkeypatch, "--init", str(folder), "--out", str(out))
    source = load_file(out, ())["prepare"]["source"]
    assert [source["events"][name] for name in ("user", "item", "time")] == ["user_id", "product_id", "event_time"]
    assert source["events"]["categoricals"] == ["device"] and source["events"]["quantiles"] == {"price": 16}
    assert source["items"]["text"] == ["title"] and source["items"]["embeddings"] == ["vector"]
    assert source["items"]["categoricals"] == ["brand"] and source["users"]["categoricals"] == ["segment"]
    assert (
        source["tasks"]
        == {
            "actions": {"click": {"where": "\"action\" = 'click'"}},
            "flags": {name: {"where": f'CAST("{name}" AS INTEGER) = 1'} for name in ("clicked", "purchase")},
            "ratings": {"like": {"where": '"rating" >= 4'}},
            "positives": {"click": {"where": "true"}},
        }[form]
    )
    assert source.get("negatives") == (4 if form == "positives" else None)
    parse(PipelineConfig, load_file(out, ()), "run.yaml")
    capsys.readouterr()
    run(monkeypatch, "--config", str(out))
    assert lines_of(capsys)["events"].startswith("240 from 2024-03-01 to 2024-03-06")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--init", str(folder), "--out", str(out))
    assert "is there already" in capsys.readouterr().err


def test_folder_without_events_is_refused_with_the_columns_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw/a.parquet", [{"user_id": "u", "seen": 1}])
    with pytest.raises(SystemExit):
        run(monkeypatch, "--init", str(tmp_path / "raw"), "--out", str(tmp_path / "run.yaml"))
    err = capsys.readouterr().err
    assert "no table has a user, an item and a time by the names of its columns (a.parquet: user_id, seen)" in err


def test_large_log_is_sampled_from_some_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path, days=8)
    monkeypatch.setattr(profile, "MOST_ROWS", 100)
    run(monkeypatch, "--config", str(write_config(tmp_path)))
    printed = lines_of(capsys)
    assert printed["events"] == "320 from 2024-03-01 to 2024-03-08, 8 dates"
    assert printed["sample"] == "all but events and dates is of 2 of 8 files"
