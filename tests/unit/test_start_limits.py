"""How many minutes a launcher must have left to start a run."""

from __future__ import annotations

import pytest

from deephyper_balsam.driver.start_limits import StartLimit, check_fits, longest_usual_s, minutes_needed
from deephyper_balsam.errors import InputError
from deephyper_balsam.launcher.wall_time import startable_min


@pytest.mark.parametrize(
    ("longest_s", "allocation_min", "minutes"),
    [
        (50, 60, 4),  # with Balsam's own launcher's two minutes, and one for its rounding
        (51, 60, 5),
        (1800, 60, 34),
        (3000, 60, 51),  # no room for the margin
        (90, 3, 2),
        (90, None, 5),
    ],
)
def test_a_launcher_needs_the_longest_run_and_a_margin_where_there_is_room(
    longest_s: float, allocation_min: int | None, minutes: int
) -> None:
    assert minutes_needed(longest_s, allocation_min) == minutes


def test_a_time_limit_that_no_allocation_can_hold_is_refused_with_the_time_it_needs() -> None:
    check_fits(0, 1800, 60)
    check_fits(0, 100, 3)
    check_fits(57, None, 60)
    check_fits(0, None, 1)
    with pytest.raises(InputError, match=r"may take 3600 s, and an allocation has 60 min.*--wall-time-min 64"):
        check_fits(0, 3600, 60)
    with pytest.raises(InputError, match=r"may take 59 min \(`wall_time_min`\), and an allocation has 60 min"):
        check_fits(59, 5, 60)


@pytest.mark.parametrize("allocation_min", range(1, 200))
def test_whatever_is_derived_or_learnt_a_fresh_launcher_starts(allocation_min: int) -> None:
    for longest_s in (1.0, 16.0, 50.0, 51.0, 170.0, 1790.0, 7000.0):
        limit = StartLimit(0, None)
        limit.update([longest_s], 60.0 * allocation_min)
        assert limit.minutes <= startable_min(allocation_min, 10.0)


def test_what_is_usual_is_what_all_but_one_in_twenty_take() -> None:
    assert longest_usual_s([]) is None
    assert longest_usual_s([7.0]) == 7.0
    assert longest_usual_s([5.0, 1.0, 2.0, 3.0, 4.0]) == 5.0
    assert longest_usual_s([*range(1, 100), 1e6]) == 95


def test_a_time_limit_decides_from_the_beginning() -> None:
    limit = StartLimit(0, 1800)
    assert limit.update([], 3600)
    assert limit.update([], 3600)  # until it is applied
    limit.applied()
    assert limit.minutes == 34
    assert not limit.update([1.0] * 50, 3600)
    assert limit.needed_s == 34 * 60


def test_without_one_it_is_learnt_from_the_runs() -> None:
    limit = StartLimit(0, None)
    assert not limit.update([], 180)
    assert limit.needed_s == 0
    assert limit.update([30.0], 180)
    assert limit.minutes == 1
    assert limit.update([30.0, 80.0], 180)
    assert limit.minutes == 2
    assert limit.update([20.0] * 100, 180)
    assert limit.minutes == 1


def test_runs_that_are_short_or_longer_than_the_allocations_are_not_held_back() -> None:
    for duration_s in (5.0, 3600.0):
        limit = StartLimit(0, None)
        assert not limit.update([duration_s] * 10, 600)
        assert limit.minutes == 0


def test_what_the_user_asked_for_stays() -> None:
    limit = StartLimit(9, 1800)
    assert not limit.update([80.0] * 10, 3600)
    assert limit.minutes == 9
