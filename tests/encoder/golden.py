"""Regenerate `golden_losses.json`: `python -m tests.encoder.golden`. Review the difference before committing it."""

import json
import tempfile
from pathlib import Path

from tests.encoder.fabricated import LOCAL, train_encoder, write_dataset
from tests.encoder.test_train import GOLDEN, TEN_STEPS, losses

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder) / "dataset")
        train_encoder(LOCAL, dataset, Path(folder) / "out", TEN_STEPS)
        GOLDEN.write_text(json.dumps(losses(Path(folder) / "out"), indent=1) + "\n")
