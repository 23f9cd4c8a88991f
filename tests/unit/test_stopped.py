"""What an optimizer learns of runs that were stopped early."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.optimizers.history import History
from deephyper_balsam.optimizers.stopped import MOST_POINTS, finals
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Result, Trial

EPOCHS = 9
Point = tuple[float, float]


def curve_of(final: float, epochs: int = EPOCHS, start: float = 0.0) -> list[Point]:
    """A run that goes in a straight line from `start` to its final value."""
    return [(float(e), start + (final - start) * e / EPOCHS) for e in range(1, epochs + 1)]


def history_of(runs: list[tuple[list[Point], bool]]) -> History:
    history = History(1)
    for curve, stopped in runs:
        history.tell(None, np.zeros(1), curve[-1][1], curve, stopped)
    return history


def test_a_history_without_stopped_runs_is_learnt_as_it_was_told() -> None:
    history = History(1)
    for value in (0.1, None, 0.3):
        history.tell(None, np.zeros(1), value)
    np.testing.assert_array_equal(history.finals(), history.y)
    history.tell(None, np.zeros(1), 0.9, curve_of(0.9))
    np.testing.assert_array_equal(history.finals(), history.y)


def test_a_stopped_run_counts_as_what_runs_like_it_reached() -> None:
    whole = [(curve_of(final), False) for final in (0.5, 0.6, 0.7, 0.8, 0.9)]
    stopped = [(curve_of(final, 1), True) for final in (0.3, 0.4)] + [(curve_of(0.45, 3), True)]
    history = history_of(whole + stopped)
    np.testing.assert_allclose(history.finals(), [0.5, 0.6, 0.7, 0.8, 0.9, 0.3, 0.4, 0.45], atol=1e-9)


def test_what_was_stopped_earlier_is_extrapolated_through_what_was_stopped_later() -> None:
    whole = [(curve_of(final), False) for final in (0.8, 0.85, 0.9)]
    later = [(curve_of(final, 3), True) for final in (0.5, 0.6, 0.7)]
    history = history_of([*whole, *later, (curve_of(0.1, 1), True)])
    np.testing.assert_allclose(history.finals()[-1], 0.1, atol=1e-9)


def test_a_worse_value_at_the_same_budget_never_counts_for_more() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        whole = [([(1.0, float(rng.normal())), (9.0, float(rng.normal()))], False) for _ in range(rng.integers(1, 8))]
        values = np.sort(rng.normal(size=10))
        reached = history_of([*whole, *(([(1.0, float(value))], True) for value in values)]).finals()[len(whole) :]
        assert (np.diff(reached) >= 0).all()


def test_while_none_has_gone_on_the_last_values_count() -> None:
    history = history_of([(curve_of(final, 1), True) for final in (0.1, 0.2, 0.3)])
    np.testing.assert_array_equal(history.finals(), history.y)


def test_failures_stay_failures_and_finished_runs_keep_their_values() -> None:
    history = history_of([(curve_of(final), False) for final in (0.5, 0.7, 0.9)])
    history.tell(None, np.zeros(1), None, curve_of(0.4, 2))
    history.tell(None, np.zeros(1), 0.1, curve_of(0.9, 1), True)
    reached = history.finals()
    assert math.isnan(reached[3])
    np.testing.assert_array_equal(reached[:3], history.y[:3])


def test_long_curves_and_many_budgets_cost_little_and_change_little() -> None:
    steps = 1000

    def long(final: float, until: int) -> list[Point]:
        return [(float(step), final * step / steps) for step in range(1, until + 1)]

    history = history_of([(long(final, steps), False) for final in (0.5, 0.6, 0.8, 0.9)])
    for until in range(10, 500, 5):
        history.tell(None, np.zeros(1), long(0.4, until)[-1][1], long(0.4, until), True)
    curves = history.curves()
    assert curves is not None
    assert curves.budgets.shape == (len(history), MOST_POINTS)
    np.testing.assert_allclose(history.finals()[4:], 0.4, atol=0.01)


def test_the_first_results_teach_the_same_whatever_comes_after_them() -> None:
    history = history_of([(curve_of(f), False) for f in (0.5, 0.9)] + [(curve_of(0.3, 1), True)])
    before = history.finals()
    for final in (0.1, 0.2, 0.4):
        history.tell(None, np.zeros(1), final, curve_of(final))
    np.testing.assert_array_equal(history.finals(3), before)


def test_the_final_result_of_a_run_that_went_on_takes_the_place_of_the_first() -> None:
    history = History(1)
    for number in range(3):
        history.ask(np.zeros(1), number)
    history.tell(0, None, 0.1, curve_of(0.9, 1), True)
    history.tell(1, None, 0.5, curve_of(0.5))
    given, y = history.curves(), history.y
    history.amend(0, 0.9, curve_of(0.9))
    np.testing.assert_array_equal(history.y, [0.9, 0.5])
    assert not history.was_stopped(0)
    assert given is not None
    assert given.stopped.tolist() == [True, False]  # what a model is being made of does not change under it
    np.testing.assert_array_equal(y, [0.1, 0.5])


def line_problem() -> HpProblem:
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    problem.add_hyperparameter((0.0, 1.0), "y")
    return problem


def told(trial: Trial, stop: bool) -> Result:
    final = 1.0 - (trial.config["x"] - 0.7) ** 2 - (trial.config["y"] - 0.2) ** 2
    curve = curve_of(final, 1 if stop else EPOCHS, start=0.0)
    return Result(trial.number, curve[-1][1], curve=curve, stopped=stop)


@pytest.mark.parametrize("method", ["ambs", "ga"])
def test_a_search_whose_bad_runs_are_stopped_ends_near_the_best(method: str) -> None:
    found = []
    for seed in range(5):
        optimizer = make_optimizer(method, line_problem(), seed=seed, num_workers=4)
        kept: list[float] = []
        best = 0.0
        for _ in range(20):
            results = []
            for trial in optimizer.ask(4):
                first = told(trial, True).objective
                assert first is not None
                stop = len(kept) >= 5 and first < sorted(kept)[-max(1, len(kept) // 3)]
                kept.append(first)
                results.append(told(trial, stop))
                best = max(best, 0.0 if stop else float(results[-1].objective or 0.0))
            optimizer.tell(results)
        found.append(best)
    assert np.median(found) > 0.99


def test_finals_are_a_function_of_their_arguments() -> None:
    history = history_of([(curve_of(f), False) for f in (0.5, 0.9)] + [(curve_of(0.3, 1), True)])
    np.testing.assert_array_equal(finals(history.y, history.curves()), finals(history.y.copy(), history.curves()))
