"""The choice of batch size (enough steps per epoch) and of the number of epochs (enough steps in total)."""

import pytest

from sidestack.infra.budget import batch_size, epochs_for, whole_lanes


@pytest.mark.parametrize("rows", [0, 1, 6_399, 6_400, 12_799, 12_800, 51_199, 51_200, 10**9])
def test_batch_size_is_the_largest_that_leaves_enough_steps(rows: int) -> None:
    batch = batch_size(rows, least=64, largest=512, steps_an_epoch=100)
    assert batch in (64, 128, 256, 512)
    assert batch == 64 or rows // batch >= 100
    assert batch == 512 or rows // (2 * batch) < 100


@pytest.mark.parametrize(("steps", "epochs"), [(0, 8), (1, 8), (98, 8), (586, 7), (1500, 3), (2048, 2), (4096, 2)])
def test_epochs_reach_the_least_number_of_steps_within_bounds(steps: int, epochs: int) -> None:
    assert epochs_for(steps, min_steps=4096, least=2, most=8) == epochs


def test_whole_lanes_rounds_up_to_a_multiple_of_the_lanes() -> None:
    assert [whole_lanes(64, lanes) for lanes in (1, 6, 8, 64, 100)] == [64, 66, 64, 64, 100]
