"""The command that masks ids, with which a person's rows can be found."""

import io
import sys
from pathlib import Path

import pytest
import yaml

from sidestack.pipelines.prepare.log.masking import Masking
from sidestack.pipelines.privacy import mask
from tests.pipelines.prepare.log.raw import log_config
from tests.pipelines.privacy.persons import ENV, KEY, persons_config


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mask", "--config", str(folder / "run.yaml"), *words])
    mask.main()


def test_ids_from_arguments_or_standard_input_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENV, KEY)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"prepare": persons_config(tmp_path), "run": {"name": "own"}}))
    run(tmp_path, monkeypatch, "u1", "u2")
    masking = Masking(KEY.encode())
    expected = [masking.masked("user", one) for one in ("u1", "u2")]
    assert capsys.readouterr().out.split() == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("u1\nu2\n"))
    run(tmp_path, monkeypatch)
    assert capsys.readouterr().out.split() == expected
    run(tmp_path, monkeypatch, "--kind", "item", "u1")
    assert capsys.readouterr().out.split() == [masking.masked("item", "u1")]


def test_configuration_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"prepare": log_config(tmp_path), "run": {"name": "own"}}))
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "u1")
    assert "prepare.source.privacy.key: names no key, so no id is masked" in capsys.readouterr().err
