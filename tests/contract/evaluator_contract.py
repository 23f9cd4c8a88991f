"""What every session owes (`deephyper_balsam.driver.session.SearchSession`), as tests over a `Rig`.

An implementation is added by a `Rig` that moves its workers by hand, in `RIGS` of test_evaluators.py.
"""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from typing import Any

import pytest

from deephyper_balsam.driver.session import SearchSession
from deephyper_balsam.errors import SearchExistsError, SettingsError, UnreachableError
from deephyper_balsam.trial import Origin, Result, Trial, TrialState

SETTINGS: dict[str, Any] = {"problem": {"name": "p"}, "method": "random", "options": {}, "seed": 1}


class Rig(ABC):
    """A session of two workers with the search ``s`` open, and the hand that moves them."""

    evaluator: SearchSession
    can_break = False
    """Whether `break_next` can make a call fail."""
    ends_in_order = False
    """Whether trials that began together end in the order of their numbers, whatever order is asked for."""

    @abstractmethod
    def begin(self) -> list[int]:
        """Let free workers take what waits; the numbers of all trials that run."""

    @abstractmethod
    def end(self, number: int) -> None:
        """End a trial that runs: with its x as objective, or as a failure where x is negative."""

    def break_next(self, call: str) -> None:
        """Let the next `call` ("submit", "submit-lost", "collect", "collect-lost", "cancel") raise."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""


def trials(*numbers: int, negative: tuple[int, ...] = ()) -> list[Trial]:
    return [Trial(n, {"x": -1.0 if n in negative else float(n)}, Origin("random", told=n)) for n in numbers]


def drain(rig: Rig) -> list[Result]:
    """End everything that was submitted, two at a time, and collect."""
    results: list[Result] = []
    while running := rig.begin():
        for number in running:
            rig.end(number)
        results += rig.evaluator.collect()
    return results


class EvaluatorContract:
    """Inherit with a fixture `rig`."""

    def test_it_is_a_session(self, rig: Rig) -> None:
        assert isinstance(rig.evaluator, SearchSession)

    def test_two_workers_are_a_capacity_of_two_and_room_for_as_many(self, rig: Rig) -> None:
        rig.evaluator.collect()
        assert rig.evaluator.capacity == 2
        assert rig.evaluator.room >= 2

    def test_submitting_nothing_does_nothing(self, rig: Rig) -> None:
        rig.evaluator.submit([])
        assert rig.evaluator.collect() == []
        assert rig.begin() == []

    def test_collect_does_not_wait_and_is_empty_while_nothing_ended(self, rig: Rig) -> None:
        assert rig.evaluator.collect() == []
        rig.evaluator.submit(trials(0, 1, 2))
        assert rig.evaluator.collect() == []
        assert sorted(rig.begin()) == [0, 1]
        assert rig.evaluator.collect() == []

    def test_each_result_comes_exactly_once(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(*range(7)))
        results = drain(rig)
        assert sorted(result.number or 0 for result in results) == list(range(7))
        assert all(result.objective == result.number for result in results)
        for _ in range(3):
            assert rig.evaluator.collect() == []

    def test_a_failure_is_a_result_with_a_reason(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(0, 1, negative=(1,)))
        results = {result.number: result for result in drain(rig)}
        assert (results[0].state, results[1].state) == (TrialState.DONE, TrialState.FAILED)
        assert results[1].failure

    def test_a_result_says_when_it_ran(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(0))
        [result] = drain(rig)
        assert result.started_at is not None
        assert result.ended_at is not None
        assert result.started_at <= result.ended_at

    def test_results_come_in_the_order_in_which_they_became_known(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(*range(6)))
        order, expected = [], []
        while running := rig.begin():
            last = running[0] if rig.ends_in_order else running[-1]
            rig.end(last)
            expected.append(last)
            order += [result.number for result in rig.evaluator.collect()]
        assert order == expected

    def test_more_can_be_submitted_at_any_time(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(0))
        rig.begin()
        rig.evaluator.submit(trials(1, 2))
        rig.end(0)
        assert [result.number for result in rig.evaluator.collect()] == [0]
        rig.evaluator.submit(trials(3))
        assert sorted(result.number or 0 for result in drain(rig)) == [1, 2, 3]

    def test_cancel_withdraws_what_did_not_start_and_the_rest_goes_on(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(*range(5)))
        assert sorted(rig.begin()) == [0, 1]
        assert sorted(rig.evaluator.cancel()) == [2, 3, 4]
        assert rig.evaluator.cancel() == []
        assert sorted(rig.begin()) == [0, 1]
        assert sorted(result.number or 0 for result in drain(rig)) == [0, 1]
        rig.evaluator.submit(trials(5))
        assert [result.number for result in drain(rig)] == [5]

    def test_a_result_that_came_before_cancel_is_collected_after_it(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(*range(4)))
        rig.begin()
        rig.end(0)
        assert set(rig.evaluator.cancel()) <= {2, 3}
        assert 0 in [result.number for result in rig.evaluator.collect()]

    def test_every_trial_is_counted_and_has_a_line_from_its_submission_to_its_end(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(0, 1, 2, negative=(1,)))
        assert sum(rig.evaluator.counts.values()) == 3
        assert rig.evaluator.counts[TrialState.DONE] == 0
        rig.begin()
        rig.end(0)
        rig.evaluator.collect()
        assert rig.evaluator.line(0)["job_status"] == "DONE"
        assert rig.evaluator.counts[TrialState.DONE] == 1
        drain(rig)
        assert [line["job_status"] for line in rig.evaluator.lines] == ["DONE", "FAILED", "DONE"]
        assert [line["objective"] for line in rig.evaluator.lines] == [0.0, None, 2.0]
        assert [line["p:x"] for line in rig.evaluator.lines] == [0.0, -1.0, 2.0]
        assert rig.evaluator.line(1)["m:failure"]
        for line in rig.evaluator.lines:
            assert line["m:timestamp_submit"] <= line["m:timestamp_gather"]

    def test_lines_that_changed_are_given_once(self, rig: Rig) -> None:
        rig.evaluator.take_changed_lines()
        rig.evaluator.submit(trials(0, 1, 2))
        assert {line["job_id"] for line in rig.evaluator.take_changed_lines()} == {0, 1, 2}
        rig.begin()
        rig.end(0)
        rig.evaluator.collect()
        assert 0 in {line["job_id"] for line in rig.evaluator.take_changed_lines()}
        assert rig.evaluator.take_changed_lines() == []

    def test_a_withdrawn_trial_is_no_longer_counted_as_waiting(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(*range(4)))
        rig.begin()
        withdrawn = rig.evaluator.cancel()
        assert len(withdrawn) == rig.evaluator.counts[TrialState.CANCELLED] == 2
        assert rig.evaluator.counts[TrialState.READY] == 0
        assert {rig.evaluator.line(number)["job_status"] for number in withdrawn} == {"CANCELLED"}

    def test_what_is_under_way_takes_room(self, rig: Rig) -> None:
        before = rig.evaluator.room
        rig.evaluator.submit(trials(0, 1))
        assert rig.evaluator.room <= before - 2 + 1
        rig.evaluator.submit(trials(*range(2, 20)))
        assert rig.evaluator.room == 0

    def test_nothing_is_asked_of_a_search_that_nobody_asked_anything(self, rig: Rig) -> None:
        assert rig.evaluator.requests() == []
        assert rig.evaluator.upkeep() == []
        assert rig.evaluator.hopeless is None
        rig.evaluator.ensure_allocation(10, 10.0)

    def test_its_clock_goes_forward_and_a_wait_ends_at_once_when_someone_wants_the_end(self, rig: Rig) -> None:
        before = rig.evaluator.now()
        stop = threading.Event()
        stop.set()
        rig.evaluator.wait(30.0, stop)
        assert rig.evaluator.now() >= before

    def test_a_search_goes_on_in_the_same_session_with_its_trials_and_results(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(*range(3)))
        drain(rig)
        rig.evaluator.submit(trials(3, 4, 5))
        assert 5 in rig.evaluator.cancel()
        drain(rig)
        rig.evaluator.close()
        history = rig.evaluator.open("s", dict(SETTINGS), max_evals=200)
        assert [trial.number for trial in history.trials] == list(range(6))
        assert {0, 1, 2} <= {result.number for result in history.results}
        assert 5 in history.withdrawn
        assert (history.settings["seed"], history.max_evals, history.timeout_s) == (1, 200, None)

    def test_a_search_with_other_settings_is_refused(self, rig: Rig) -> None:
        rig.evaluator.close()
        with pytest.raises(SearchExistsError, match="another method"):
            rig.evaluator.open("s", {**SETTINGS, "method": "ambs"}, max_evals=100)

    def test_a_new_search_needs_an_end(self, rig: Rig) -> None:
        rig.evaluator.close()
        with pytest.raises(SettingsError, match="needs an end"):
            rig.evaluator.open("other", dict(SETTINGS))

    def test_without_a_seed_one_is_drawn_and_kept(self, rig: Rig) -> None:
        rig.evaluator.close()
        first = rig.evaluator.open("t", {**SETTINGS, "seed": None}, max_evals=10).settings["seed"]
        rig.evaluator.close()
        assert rig.evaluator.open("t", {**SETTINGS, "seed": None}, max_evals=10).settings["seed"] == first

    def test_cancel_without_trials_is_harmless(self, rig: Rig) -> None:
        assert rig.evaluator.cancel() == []

    @pytest.mark.parametrize("seed", range(3))
    def test_whatever_the_order_of_calls_every_trial_ends_once(self, rig: Rig, seed: int) -> None:
        rng = random.Random(seed)
        submitted, seen, cancelled = 0, [], []
        for _ in range(60):
            step = rng.random()
            if step < 0.4:
                count = rng.randrange(4)
                rig.evaluator.submit(trials(*range(submitted, submitted + count)))
                submitted += count
            elif step < 0.6:
                seen += [result.number for result in rig.evaluator.collect()]
            elif step < 0.65:
                cancelled += rig.evaluator.cancel()
            elif running := rig.begin():
                rig.end(rng.choice(running[:1] if rig.ends_in_order else running))
        seen += [result.number for result in rig.evaluator.collect()]
        seen += [result.number for result in drain(rig)]
        assert sorted([*seen, *cancelled]) == list(range(submitted))

    @pytest.mark.parametrize("call", ["submit", "submit-lost"])
    def test_after_an_error_submit_may_be_made_again_and_nothing_runs_twice(self, rig: Rig, call: str) -> None:
        if not rig.can_break:
            pytest.skip("nothing that can fail")
        rig.evaluator.submit(trials(0, 1))
        rig.break_next(call)
        more = trials(2, 3, 4)
        with pytest.raises(UnreachableError):
            rig.evaluator.submit(more)
        rig.evaluator.submit(more)
        assert sorted(result.number or 0 for result in drain(rig)) == list(range(5))

    @pytest.mark.parametrize("call", ["collect", "collect-lost"])
    def test_after_an_error_collect_loses_nothing_and_gives_nothing_twice(self, rig: Rig, call: str) -> None:
        if not rig.can_break:
            pytest.skip("nothing that can fail")
        rig.evaluator.submit(trials(0, 1, 2))
        for number in rig.begin():
            rig.end(number)
        rig.break_next(call)
        with pytest.raises(UnreachableError):
            rig.evaluator.collect()
        assert sorted(result.number or 0 for result in rig.evaluator.collect()) == [0, 1]
        assert [result.number for result in drain(rig)] == [2]

    def test_after_an_error_cancel_may_be_made_again(self, rig: Rig) -> None:
        if not rig.can_break:
            pytest.skip("nothing that can fail")
        rig.evaluator.submit(trials(0, 1, 2, 3))
        rig.begin()
        rig.break_next("cancel")
        with pytest.raises(UnreachableError):
            rig.evaluator.cancel()
        assert sorted(rig.evaluator.cancel()) == [2, 3]
        assert sorted(result.number or 0 for result in drain(rig)) == [0, 1]

    def test_close_may_be_called_twice(self, rig: Rig) -> None:
        rig.evaluator.submit(trials(0))
        rig.evaluator.close()
        rig.evaluator.close()
