from pathlib import Path

import pytest

from infra.config import VERSION, Config, digest, load_file, load_section, parse, parse_written, to_yaml
from infra.errors import ConfigError


class Inner(Config):
    rate: float = 0.1


class Outer(Config):
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_overrides_are_parsed_as_yaml_and_reach_nested_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "encoder: {inner: {rate: 0.5}}")
    config = load_section(Outer, file, "encoder", ["encoder.inner.rate=1e-2", "encoder.names=[a, b]"])
    assert config == Outer(inner=Inner(rate=0.01), names=("a", "b"))


def test_absent_section_means_defaults(tmp_path: Path) -> None:
    assert load_section(Outer, write(tmp_path / "run.yaml", "prepare: {}"), "encoder") == Outer()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"rte": 1}}, r"here\.inner\.rte: unknown key; did you mean 'rate'\? \(value: 1\)"),
        ({"zebra": 1}, r"here\.zebra: unknown key \(value: 1\)"),
        ({"inner": {"rate": "fast"}}, r"here\.inner\.rate: .*number.*'fast'"),
        ({"names": 3}, r"here\.names: .*tuple.*3"),
    ],
)
def test_a_fault_names_key_value_and_rule(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Outer, values, "here")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("encodr: {}", [], "unknown section 'encodr'"),
        ("1: {}\nfoo: {}", [], "unknown section 1"),
        ("encoder: {inner: {rate: .inf}}", [], r"encoder\.inner\.rate: inf is no finite number"),
        ("encoder: {}", ["encoder.shares=[0.5, -.inf]"], r"encoder\.shares\.1: -inf is no finite number"),
        ("encoder: {}", ["encoder.rate=.nan"], r"encoder\.rate: nan is no finite number"),
        ("[1, 2]", [], "must be a mapping"),
        ("a: [", [], "not valid YAML"),
        ("encoder: {}", ["encoder.rate"], "must look like"),
        ("encoder: {rate: 1}", ["encoder.rate.x=1"], "'rate' is a value"),
        ("encoder: {}\nranker: {}\nencoder: {}", [], "key 'encoder' stands twice, on lines 1 and 3"),
        ("encoder: {inner: {rate: 1, rate: 2}}", [], "key 'rate' stands twice, on lines 1 and 1"),
        ("encoder: {}", ["encoder.inner={rate: 1, rate: 2}"], "key 'rate' stands twice"),
    ],
)
def test_a_bad_file_or_override_is_refused(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_file(write(tmp_path / "run.yaml", text), overrides)


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    text = "encoder: {inner: &inner {rate: 0.5}}\nranker: {inner: {<<: *inner, rate: 0.7}}"
    assert load_section(Outer, write(tmp_path / "run.yaml", text), "ranker").inner.rate == 0.7


def test_a_file_is_read_as_utf8_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes("encoder: {names: [größe]}".encode())
    assert load_section(Outer, file, "encoder").names == ("größe",)
    file.write_bytes("encoder: {names: [größe]}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml: is not UTF-8 \(byte 20"):
        load_file(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: cannot be read"):
        load_file(tmp_path / "absent.yaml")


def test_digest_ignores_key_order_but_not_values() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(Outer()) != digest(Outer(inner=Inner(rate=0.2)))


def test_resolved_yaml_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = Outer(inner=Inner(rate=0.3), names=("x",))
    file = write(tmp_path / "run.yaml", to_yaml({"encoder": config.model_dump(mode="json")}))
    assert load_section(Outer, file, "encoder") == config


class Placed(Config):
    rate: float = 0.1
    cache: Path = Path(".cache")

    def identity(self) -> dict[str, object]:
        return self.model_dump(mode="json", exclude={"cache"})


def test_digest_leaves_out_where_things_are_kept() -> None:
    assert digest(Placed(cache=Path("/elsewhere"))) == digest(Placed())
    assert digest(Placed(rate=0.2)) != digest(Placed())


def test_what_an_older_version_wrote_gets_the_defaults_of_newer_fields() -> None:
    assert parse_written(Outer, {"names": ["x"]}, "a.json", "0.0.1") == Outer(names=("x",))


@pytest.mark.parametrize("values", [{"names": ["x"], "later": 1}, {"inner": {"rate": "fast"}}, [1]])
def test_what_cannot_be_read_names_both_versions(values: object) -> None:
    with pytest.raises(ConfigError, match=rf"was written by sidestack 9\.9, this is sidestack {VERSION}"):
        parse_written(Outer, values, "a.json", "9.9")
    with pytest.raises(ConfigError, match="was written by an unknown version of sidestack"):
        parse_written(Outer, values, "a.json", None)
