"""The delay of Balsam's pipeline as a driver measures it."""

from __future__ import annotations

import pytest

from deephyper_balsam.driver.latency import UNKNOWN_DELAY_S, PipelineLatency


def play(delay: PipelineLatency, numbers: range, *, to_node_s: float, to_driver_s: float, skew_s: float = 0.0) -> None:
    for number in numbers:
        start = 1000.0 + to_node_s + skew_s
        delay.ended(number, 1000.0, start, start + 5.0, start + 5.0 - skew_s + to_driver_s)


def test_until_enough_was_seen_the_delay_is_that_of_a_stock_site() -> None:
    delay = PipelineLatency()
    delay.submitted([0, 1, 2], free=3)
    play(delay, range(3), to_node_s=1.0, to_driver_s=1.0)
    assert delay.seconds == UNKNOWN_DELAY_S


def test_it_is_the_way_to_the_driver_and_the_way_to_a_free_node() -> None:
    delay = PipelineLatency()
    delay.submitted(list(range(10)), free=10)
    play(delay, range(10), to_node_s=2.5, to_driver_s=0.5)
    assert delay.seconds == pytest.approx(3.0)


def test_trials_that_waited_for_their_turn_tell_nothing_of_the_way_to_a_node() -> None:
    delay = PipelineLatency()
    delay.submitted(list(range(10)), free=5)
    play(delay, range(5), to_node_s=2.0, to_driver_s=0.5)
    play(delay, range(5, 10), to_node_s=300.0, to_driver_s=0.5)
    assert delay.seconds == pytest.approx(2.5)


def test_when_places_became_free_the_way_is_measured_again() -> None:
    delay = PipelineLatency()
    delay.submitted(list(range(10)), free=10)
    play(delay, range(10), to_node_s=1.0, to_driver_s=0.5)
    delay.submitted(list(range(10, 20)), free=10)
    play(delay, range(10, 20), to_node_s=9.0, to_driver_s=0.5)
    assert delay.seconds == pytest.approx(9.5)


@pytest.mark.parametrize("skew_s", [-40.0, 40.0])
def test_clocks_that_differ_between_nodes_and_driver_cancel_out(skew_s: float) -> None:
    delay = PipelineLatency()
    delay.submitted(list(range(10)), free=10)
    play(delay, range(10), to_node_s=2.0, to_driver_s=1.0, skew_s=skew_s)
    assert delay.seconds == pytest.approx(3.0)


def test_half_empty_submissions_with_a_full_site_count_for_nothing() -> None:
    delay = PipelineLatency()
    delay.submitted(list(range(10)), free=-3)
    play(delay, range(10), to_node_s=2.0, to_driver_s=1.0)
    assert delay.seconds == UNKNOWN_DELAY_S
