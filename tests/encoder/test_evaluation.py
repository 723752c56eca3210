"""Codebook use: histograms, entropy in bits, dead values."""

import pytest
import torch

from encoder.evaluation import codebook_use, histogram


def test_histogram_counts_every_digit_by_itself() -> None:
    digits_BN = torch.tensor([[0, 2], [0, 1], [1, 2], [0, 2]])
    assert histogram(digits_BN, 3).tolist() == [[3, 1, 0], [0, 1, 3]]


def test_use_of_even_skewed_and_empty_digits() -> None:
    use = codebook_use(torch.tensor([[5, 5, 5, 5], [8, 8, 0, 0], [16, 0, 0, 0], [0, 0, 0, 0]]))
    assert use["entropy_bits"] == pytest.approx([2, 1, 0, 0])
    assert use["most_bits"] == 2
    assert use["dead_share"] == [0, 0.5, 0.75, 1]
