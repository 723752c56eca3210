"""Groups of requests of similar size: every row and entry occurs once, and padding is bounded."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidestack.ranker.layout import ROWS_FACTOR, SHORT, HistoryLayout, history_layout, rows_of

requests = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), min_size=1, max_size=20)


def laid_out(sizes: list[tuple[int, int]]) -> HistoryLayout:
    lengths, rows = np.array(sizes, np.int64).T
    return history_layout(lengths, rows)


@given(requests)
def test_each_row_gets_the_entries_of_its_request_once(sizes: list[tuple[int, int]]) -> None:
    layout = laid_out(sizes)
    entry, row = 0, 0
    expected: dict[int, list[int]] = {}
    for length, rows in sizes:
        entries = list(range(entry, entry + length))
        expected |= {number: entries for number in range(row, row + rows)}
        entry, row = entry + length, row + rows
    met: list[list[int]] = []
    for group in layout.groups:
        for entries_L, is_entry_L, rows_M in zip(*group, strict=True):
            met += [entries_L[is_entry_L].tolist()] * len(rows_M)
    met.append([])
    assert [met[place] for place in layout.place_B.tolist()] == [expected[number] for number in range(row)]
    flat = torch.cat([group.entries_GL.flatten() for group in layout.groups] or [torch.empty(0, dtype=torch.int64)])
    assert flat[layout.place_T].tolist() == list(range(entry))


def test_layout_equals_the_example_of_the_docstring() -> None:
    layout = laid_out([(2, 1), (0, 2), (3, 1), (1, 8)])
    assert [group.entries_GL.tolist() for group in layout.groups] == [[[0, 1, 0], [2, 3, 4]], [[5]]]
    assert [group.rows_GM.tolist() for group in layout.groups] == [[[0], [3]], [[*range(4, 12)]]]
    assert layout.place_T.tolist() == [0, 1, 3, 4, 5, 6]
    assert layout.place_B.tolist() == [0, 10, 10, *range(1, 10)]


@given(requests)
def test_padding_is_bounded_by_the_sizes_of_a_group(sizes: list[tuple[int, int]]) -> None:
    for group in laid_out(sizes).groups:
        lengths_G = group.is_entry_GL.sum(1)
        assert group.entries_GL.shape[1] == lengths_G.max()
        assert lengths_G.max() <= max(SHORT, 2 * int(lengths_G.min()))
        assert group.rows_GM.shape[1] <= ROWS_FACTOR * 30


def test_one_long_history_does_not_pad_the_others() -> None:
    layout = laid_out([(10_000, 3), *[(2, 1)] * 500])
    assert sum(group.entries_GL.numel() for group in layout.groups) == 10_000 + 2 * 500


def test_rows_of_and_its_gradient_equal_index_select() -> None:
    values_ND, places = torch.randn(5, 3, requires_grad=True), torch.tensor([[0, 4], [4, 4], [2, 0]])
    found, expected = rows_of(values_ND, places), values_ND[places]
    assert torch.equal(found, expected)
    direction = torch.randn_like(found)
    (one,), (two,) = (torch.autograd.grad(out, values_ND, direction) for out in (found, expected))
    torch.testing.assert_close(one, two)
