"""The example in the docstring of `DigitLookup`."""

import pytest
import torch

from sidestack.encoder.sid.lookup import DigitLookup


def test_example_of_five_digits_looked_up_two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestack.encoder.sid.lookup.LOOKUP_ROWS", 9)
    values_DR = 10.0 * torch.arange(5.0)[:, None] + torch.arange(3.0)  # value r of digit i is 10 i + r
    lookup = DigitLookup(values_DR, "mixed_radix")
    assert (lookup.width, lookup.numbers, lookup.rows, lookup.unknown_row) == (2, 3, 9, 27)
    rows_1C = torch.empty(1, 3, dtype=torch.int64)
    lookup._write_rows(rows_1C, torch.tensor([167]))
    assert rows_1C.tolist() == [[2, 0 + 9, 5 + 18]]
    assert lookup.table_Tk[rows_1C[0]].tolist() == [[0.0, 2.0], [10.0, 20.0], [31.0, 42.0]]
    assert lookup(torch.tensor([167])).tolist() == [[2.0, 10.0, 20.0, 31.0, 42.0]]
    assert lookup.table_Tk[lookup.unknown_row].tolist() == [0.0, 0.0]
