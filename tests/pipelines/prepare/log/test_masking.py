"""Masked ids: the same hash in SQL and Python, the same tables except for keys, one key per store, and no leak."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from sidestack.infra.config import digest, parse, to_yaml
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import ConfigError, DataError
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.log.masking import KINDS, Masking, masking_of
from sidestack.pipelines.prepare.log.privacy_config import Privacy
from tests.datasets import joined
from tests.pipelines.prepare.log.raw import log_config, raw_events, write, write_log
from tests.pipelines.prepare.log.test_rows import found_rows
from tests.pipelines.prepare.running import run_prepare
from tests.pipelines.privacy.persons import ENV, KEY, leaks, persons_config, secrets, write_persons

OTHER = "ffffffffffffffffffffffffffffffff"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, KEY)


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        yield opened


@pytest.mark.parametrize("key", [KEY, "k" * 64, "k" * 65, "k" * 200])
def test_sql_and_python_mask_alike(key: str, connection: duckdb.DuckDBPyConnection) -> None:
    masking = Masking(key.encode())
    masking.install(connection)
    for kind in KINDS:
        for one in ("", "u1", "Zoë 💡", "a'b", "x" * 500):
            (found,) = connection.execute("SELECT masked_id(?, ?)", [kind, one]).fetchall()[0]
            assert found == masking.masked(kind, one)
    assert connection.execute("SELECT masked_id('user', NULL)").fetchall() == [(None,)]
    assert masking.masked("user", "1") == masking.masked("user", "1") != masking.masked("item", "1")


def test_masked_ids_are_standard_hmac_sha256() -> None:
    """The expected value is from `printf user:what | openssl dgst -sha256 -hmac Jefe`."""
    assert Masking(b"Jefe").masked("user", "what") == "91dd2ce82c4730237a3993c22eda35ad"


def test_tables_of_masked_ids_differ_only_in_the_keys(tmp_path: Path) -> None:
    write_log(tmp_path, days=6)
    run_prepare(ALONE, log_config(tmp_path), tmp_path / "raw/out")
    privacy = {"key": {"env": ENV}, "mask_items": True}
    run_prepare(ALONE, log_config(tmp_path, privacy=privacy), tmp_path / "masked/out")
    masking = Masking(KEY.encode())
    expected = {
        (masking.masked("user", user), masking.masked("item", item), at): rows
        for (user, item, at), rows in found_rows(tmp_path / "raw/out").items()
    }
    found = found_rows(tmp_path / "masked/out")
    assert found.keys() == expected.keys()
    for place, rows in expected.items():
        assert by_times(found[place]) == by_times(rows), place


def by_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with only the times of their histories: entries of equal time are ordered by key."""
    timed = [{**row, "history": sorted(at for _, at in row["history"])} for row in rows]
    return sorted(timed, key=lambda row: (row["price"], row["click"]))


def test_raw_ids_and_columns_that_are_not_configured_are_not_written_or_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events = write_persons(tmp_path / "log", days=5)
    assert {text for _, text in leaks(tmp_path / "log", secrets(events))}  # the search itself works
    run_prepare(
        ALONE, {**persons_config(tmp_path / "log"), "cache_dir": str(tmp_path / "runs/cache")}, tmp_path / "runs/out"
    )
    assert leaks(tmp_path / "runs", secrets(events)) == []
    output = capfd.readouterr()
    assert not [text for text in secrets(events) if text in output.out + output.err]
    assert joined(tmp_path / "runs/out", ["order"])["order"].to_pylist().count(1) > 0  # labels' ids are masked alike
    (typed, *_) = (tmp_path / "runs/store/raw/events").rglob("*.parquet")
    assert set(pq.read_schema(typed).names) == {
        "event_time", "user_key", "item_key", "event_id", "request_key", "number:price", "value:device", "task:click",
    }  # fmt: skip


def test_errors_about_private_files_contain_no_value(tmp_path: Path) -> None:
    rows = [row | {"price": f"price of {row['uid']}", "ts": "soon"} for row in raw_events(2)]
    write(tmp_path / "events/a.parquet", rows)
    write(tmp_path / "items.parquet", [{"sku": "i", "vec": [1.0], "kind": "k"}])
    write(tmp_path / "orders.parquet", [{"uid": "u", "sku": "i", "at": "soon", "state": "p"}])
    config = log_config(tmp_path, privacy={"key": {"env": ENV}})
    config["source"]["tasks"]["click"]["where"] = "CAST(uid AS INT) > 5"
    with pytest.raises(DataError) as caught:
        run_prepare(ALONE, config, tmp_path / "runs/out")
    message = str(caught.value)
    assert "column 'price' (VARCHAR) must be a finite number; 80 rows do not" in message
    assert "condition of 'click': ConversionException" in message
    assert "such as" not in message and "price of" not in message and "soon" not in message and "'u" not in message


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"key": {"env": ENV}}, {"key": {"env": "OTHER_KEY"}}, "holds ids masked by key .*; the configuration says"),
        ({}, {"key": {"env": ENV}}, "holds ids that are not masked; the configuration says ids masked by key"),
        ({"key": {"env": ENV}}, {}, "holds ids masked by key .*; the configuration says ids that are not masked"),
        ({"key": {"env": ENV}}, {"key": {"env": ENV}, "mask_items": True}, "items' not masked; .* items' masked"),
    ],
)  # fmt: skip
def test_store_with_ids_of_another_key_is_refused(
    before: dict[str, Any], after: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", OTHER)
    write_log(tmp_path, days=4)
    run_prepare(ALONE, log_config(tmp_path, privacy=before), tmp_path / "runs/first")
    with pytest.raises(ConfigError, match=f"{message}.*begin anew under another run.name") as caught:
        run_prepare(ALONE, log_config(tmp_path, privacy=after), tmp_path / "runs/second")
    assert KEY not in str(caught.value) and OTHER not in str(caught.value)
    run_prepare(ALONE, log_config(tmp_path, privacy=before), tmp_path / "runs/third")


def test_digests_contain_the_id_of_the_key_and_never_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path, days=2)
    config = parse(PrepareConfig, log_config(tmp_path, privacy={"key": {"env": ENV}}), "test")
    assert KEY not in to_yaml(config) and ENV in to_yaml(config)
    settings, before = digest(config), config.data_identity()
    monkeypatch.setenv(ENV, OTHER)
    assert digest(config) == settings and config.data_identity() != before
    assert KEY not in repr(Masking(KEY.encode()))


def test_key_is_read_from_a_file_or_variable_and_invalid_keys_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def masking(**place: str) -> Masking | None:
        return masking_of(parse(Privacy, {"key": place}, "prepare.source.privacy"))

    (tmp_path / "key").write_text(f"{KEY}\n")
    assert masking(file=str(tmp_path / "key")) == masking(env=ENV) == Masking(KEY.encode())
    assert masking_of(Privacy()) is None
    for place, message in (
        ({"env": "NO_KEY"}, "environment variable 'NO_KEY' is not set"),
        ({"file": str(tmp_path / "none")}, "none: cannot be read: No such file"),
        ({"env": "SHORT_KEY"}, "'SHORT_KEY': the key has 10 bytes; it must have 32 or more"),
        ({"env": ENV, "file": "a"}, "name one place of the key"),
    ):
        monkeypatch.setenv("SHORT_KEY", "tooshort!!")
        with pytest.raises(ConfigError, match=message) as caught:
            masking(**place)
        assert "tooshort" not in str(caught.value)


@pytest.mark.parametrize("key", [KEY, {"value": KEY}, {"env": KEY}, {"env": [KEY]}, [KEY]])
def test_key_given_instead_of_its_location_is_not_printed(key: Any) -> None:
    with pytest.raises(ConfigError, match="privacy.key") as caught:
        parse(Privacy, {"key": key}, "prepare.source.privacy")
    assert KEY not in str(caught.value)


def test_masked_ids_are_refused_as_features(tmp_path: Path) -> None:
    config = log_config(tmp_path, privacy={"key": {"env": ENV}, "mask_items": True})
    config["source"]["events"]["categoricals"] = ["uid", "device"]
    config["source"]["items"]["text"] = ["title", "sku"]
    with pytest.raises(ConfigError, match=r"events: column 'uid' holds ids .*; items: column 'sku' holds ids"):
        parse(PrepareConfig, config, "test")
    config["source"]["privacy"] = {"mask_items": True}
    with pytest.raises(ConfigError, match="mask_items: ids are masked by a key"):
        parse(PrepareConfig, config, "test")
