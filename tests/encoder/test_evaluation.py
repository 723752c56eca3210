"""Metrics measured on held-out items: codebook use and losses by prefix."""

from pathlib import Path

import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.evaluation import codebook_use, evaluate
from sidestack.encoder.quantizers.usage import count_values
from sidestack.encoder.signals import signal_batch
from tests.encoder.fabricated import LOCAL, item_table


def test_histogram_counts_every_digit_separately() -> None:
    digits_BN = torch.tensor([[0, 2], [0, 1], [1, 2], [0, 2]])
    assert count_values(digits_BN, 3).tolist() == [[3, 1, 0], [0, 1, 3]]


def test_codebook_use_of_even_skewed_and_empty_digits() -> None:
    use = codebook_use(torch.tensor([[5, 5, 5, 5], [8, 8, 0, 0], [16, 0, 0, 0], [0, 0, 0, 0]]))
    assert use["entropy_bits"] == pytest.approx([2, 1, 0, 0])
    assert use["most_bits"] == 2
    assert use["dead_share"] == [0, 0.5, 0.75, 1]
    assert use["dead_levels"] == [0, 2, 3, 4]
    assert use["perplexity"] == pytest.approx([4, 2, 1, 1])
    assert use["use"] == pytest.approx([1, 1 / 3, 0, 0])


def test_codebook_use_is_relative_to_the_number_of_rows() -> None:
    """Four rows can take at most four values, however many values a digit has."""
    one_each_NL = torch.zeros(1, 256, dtype=torch.int64)
    one_each_NL[0, :4] = 1
    assert codebook_use(one_each_NL)["use"] == pytest.approx([1])


def test_losses_by_prefix_match_decoding_the_kept_digits(encoder: Path) -> None:
    """Compare with decoding by hand: the sum of the kept digits' codewords through the decoder, item by item."""
    bundle = load_bundle(encoder, LOCAL.device)
    model = bundle.model
    batch = signal_batch(item_table().slice(0, 40), bundle.signals)
    measured = evaluate(model, batch, LOCAL)
    assert [prefix["digits"] for prefix in measured["prefixes"]] == [2, 4, 6]
    with torch.no_grad():
        digits_BN, words_NRH = model.digits(batch), model.quantizer.codewords()
        for prefix in measured["prefixes"]:
            kept = range(prefix["digits"])
            words_BPH = [torch.stack([words_NRH[n, row[n]] for n in kept]) for row in digits_BN.tolist()]
            h_hat_BH = torch.stack(words_BPH).sum(1)
            losses_KB = model.row_losses(batch, model.decoder(h_hat_BH))
            for name, losses_B in zip(bundle.signals.names, losses_KB, strict=True):
                assert prefix["loss"][name] == pytest.approx(
                    float(losses_B.sum() / batch.present[name].sum()), rel=1e-5
                )
    for name, loss in measured["prefixes"][-1]["loss"].items():
        assert loss == pytest.approx(measured["signals"][name]["loss"], rel=1e-5)
    assert measured["prefixes"][0]["loss"]["text_embedding"] > measured["prefixes"][-1]["loss"]["text_embedding"]
