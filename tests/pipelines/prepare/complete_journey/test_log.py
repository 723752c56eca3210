"""The time index against plain counting, weeks against dates."""

from datetime import timedelta

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sidestack.pipelines.prepare.complete_journey.log import FIRST_MONDAY, Timeline, midnight, week_of

moments = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=40)


@given(moments, moments)
def test_timeline_counts_as_plain_counting_does(known: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    ids_P, times_P = np.array(known, np.int64).reshape(-1, 2).T
    ids_N, times_N = np.array(asked, np.int64).reshape(-1, 2).T
    timeline = Timeline(ids_P, times_P)
    for row, (wanted, at) in enumerate(asked):
        times = sorted(time for own, time in known if own == wanted)
        earlier = [time for time in times if time < at]
        assert timeline.before(ids_N, times_N)[row] == len(earlier)
        assert timeline.last_before(ids_N, times_N)[row] == (earlier[-1] if earlier else -1)
        assert timeline.first_before(ids_N, times_N)[row] == (earlier[0] if earlier else -1)
        recent = sum(at - 7 <= time < at for time in times)
        assert timeline.within(ids_N, times_N - 7, times_N)[row] == recent


def test_weeks_begin_on_monday_midnight() -> None:
    monday = midnight(FIRST_MONDAY)
    assert week_of(np.array([monday - 1, monday, monday + 7 * 86_400 - 1])).tolist() == [1, 2, 2]
    assert week_of(np.array(midnight(FIRST_MONDAY + timedelta(weeks=35)))) == 37
