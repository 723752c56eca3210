"""A learning curve has a point at its end and no point that covers only a few steps."""

import pytest

from sidestack.infra.learning_curve import POINTS, is_point, point_every


@pytest.mark.parametrize(
    ("every", "end", "points"),
    [
        (8, 15, [8, 15]),
        (8, 19, [8, 19]),  # a point at 16 would leave a last window of three steps
        (8, 20, [8, 16, 20]),
        (50, 7, [7]),
        (3, 9, [3, 6, 9]),
        (1, 3, [1, 2, 3]),
    ],
)
def test_points_are_at_every_window_and_at_the_end(every: int, end: int, points: list[int]) -> None:
    assert [step for step in range(1, end + 1) if is_point(step, every, end)] == points


@pytest.mark.parametrize("steps", [1, 39, 40, 98, 586, 244_140])
def test_number_of_points_is_bounded_for_any_number_of_steps(steps: int) -> None:
    every = point_every(steps, None)
    points = sum(is_point(step, every, steps) for step in range(1, steps + 1))
    assert min(steps, POINTS) <= points <= 2 * POINTS
    assert point_every(steps, 7) == 7
