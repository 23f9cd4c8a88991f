"""The contract of ask and tell, for every method."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ConfigSpace as cs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizer_contract import ALL, WAITS, AskTell, as_data, make, mixed_problem, result_of
from random_problems import FINITE, problems

from deephyper_balsam.errors import ProblemError, SettingsError, TellError
from deephyper_balsam.optimizers import make_optimizer, optimizer_options
from deephyper_balsam.optimizers.base import Optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Result, Trial

ROOT = Path(__file__).parents[2]
every_method = pytest.mark.parametrize("method", ALL)
relaxed = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)


# -- any space, any order --------------------------------------------------------------------------------------------


@every_method
@relaxed
@given(problems(), seeds)
def test_configurations_are_legal_and_never_repeated_in_any_order_of_tells(
    method: str, problem: HpProblem, seed: int
) -> None:
    loop = AskTell(make(method, problem, seed)).run(10, np.random.default_rng(seed))
    loop.check()
    loop.optimizer.close()


@every_method
@relaxed
@given(problems(kinds=FINITE, max_size=3))
def test_a_finite_space_is_used_up_exactly(method: str, problem: HpProblem) -> None:
    loop = AskTell(make(method, problem))
    while not loop.optimizer.exhausted and len(loop.trials) < 200:
        loop.ask(7)
        loop.tell(list(loop.pending))
    if len(loop.trials) < 200:
        assert len(loop.trials) == problem.size
        assert loop.ask(3) == []
        assert loop.optimizer.exhausted
    loop.check()


@every_method
@relaxed
@given(problems(), seeds, st.integers(0, 8))
def test_a_restored_search_goes_on_as_the_uninterrupted_one(
    method: str, problem: HpProblem, seed: int, steps: int
) -> None:
    loop = AskTell(make(method, problem, seed)).run(steps, np.random.default_rng(seed))
    again = AskTell(make(method, problem, seed))
    again.optimizer.restore(loop.trials, loop.results)
    again.trials, again.pending, again.results = list(loop.trials), dict(loop.pending), list(loop.results)
    assert again.optimizer.num_asked == loop.optimizer.num_asked
    assert again.optimizer.num_told == loop.optimizer.num_told
    for one in (loop, again):
        one.run(5, np.random.default_rng(seed + 1))
    assert as_data(again.trials) == as_data(loop.trials)


@every_method
@relaxed
@given(problems(), seeds)
def test_ask_gives_as_many_as_were_asked_for_while_there_are(method: str, problem: HpProblem, seed: int) -> None:
    optimizer = make(method, problem, seed)
    n = 6  # the genetic algorithm's whole first generation
    trials = optimizer.ask(n)
    assert optimizer.exhausted == (len(trials) < n)
    if problem.size < math.inf:  # else forbidden clauses may still leave few of the infinitely many
        assert len(trials) == min(n, problem.size)


# -- determinism -----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import numpy as np
sys.path.insert(0, "tests/contract")
from optimizer_contract import AskTell, as_data, make, mixed_problem
loop = AskTell(make(sys.argv[1], mixed_problem(), 11)).run(12, np.random.default_rng(5))
print(json.dumps(as_data(loop.trials)))
"""


@every_method
def test_the_same_seed_in_another_process_gives_the_same_suggestions(method: str) -> None:
    loop = AskTell(make(method, mixed_problem(), 11)).run(12, np.random.default_rng(5))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, method], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(as_data(loop.trials)))


@every_method
def test_two_seeds_give_different_suggestions(method: str) -> None:
    one, other = (make(method, mixed_problem(), seed).ask(6) for seed in (1, 2))
    assert [t.config for t in one] != [t.config for t in other]


@every_method
def test_a_seed_that_was_drawn_can_be_used_again(method: str) -> None:
    first = make(method, mixed_problem(), None)
    again = make(method, mixed_problem(), first.seed)
    assert as_data(first.ask(6)) == as_data(again.ask(6))


@every_method
def test_nothing_global_is_seeded_or_drawn_from(method: str) -> None:
    import random

    AskTell(make(method, mixed_problem(), 1)).run(8, np.random.default_rng(1))  # libraries draw when they are imported
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    AskTell(make(method, mixed_problem(), 1)).run(8, np.random.default_rng(1))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


# -- tell ------------------------------------------------------------------------------------------------------------


@every_method
def test_the_same_result_twice_is_one_result(method: str) -> None:
    optimizer = make(method, mixed_problem())
    one, other = optimizer.ask(2)
    optimizer.tell([Result(one.number, 0.5), Result(other.number, None, failure="lost")])
    optimizer.tell([Result(one.number, 0.5), Result(other.number, None, failure="lost, said otherwise")])
    assert optimizer.num_told == 2


@every_method
def test_another_value_for_the_same_number_is_an_error(method: str) -> None:
    optimizer = make(method, mixed_problem())
    one, other = optimizer.ask(2)
    optimizer.tell([Result(one.number, 0.5)])
    with pytest.raises(TellError, match=r"was told the objective 0\.5 and cannot be told the objective 0\.75"):
        optimizer.tell([Result(one.number, 0.75)])
    with pytest.raises(TellError, match="cannot be told a failure"):
        optimizer.tell([Result(one.number, None, failure="no")])
    with pytest.raises(TellError):
        optimizer.tell([Result(other.number, 1.0), Result(other.number, 2.0)])
    assert optimizer.num_told == 1


@every_method
@pytest.mark.parametrize("number", [-1, 2, 10**9])
def test_a_number_never_asked_is_an_error(method: str, number: int) -> None:
    optimizer = make(method, mixed_problem())
    optimizer.ask(2)
    with pytest.raises(TellError, match=f"Trial {number} was never asked"):
        optimizer.tell([Result(number, 0.5)])


@every_method
def test_a_tell_with_one_bad_result_learns_nothing(method: str) -> None:
    untouched, optimizer = make(method, mixed_problem()), make(method, mixed_problem())
    trials = optimizer.ask(3)
    untouched.ask(3)
    good = [result_of(trial) for trial in trials]
    for bad in (Result(99, 1.0), Result(None, 1.0, config={"layers": 99})):
        with pytest.raises((TellError, ProblemError)):
            optimizer.tell([*good, bad])
    assert optimizer.num_told == 0
    for one in (optimizer, untouched):
        one.tell(good)
    assert as_data(optimizer.ask(3)) == as_data(untouched.ask(3))


@every_method
def test_telling_nothing_changes_nothing(method: str) -> None:
    optimizer = make(method, mixed_problem())
    optimizer.tell([])
    assert (optimizer.num_asked, optimizer.num_told) == (0, 0)


@every_method
def test_a_warm_start_is_learnt_and_never_asked(method: str) -> None:
    problem = HpProblem()
    problem.add_hyperparameter((0, 5), "x")
    optimizer = make(method, problem)
    optimizer.tell([Result(None, 1.0, config={"x": 3}), Result(None, None, failure="no", config={"x": 4})])
    assert optimizer.num_told == 2
    assert sorted(trial.config["x"] for trial in optimizer.ask(6)) == [0, 1, 2, 5]
    assert optimizer.exhausted or method in WAITS


@every_method
def test_starting_points_come_first_in_their_order(method: str) -> None:
    problem = mixed_problem()
    points: list[dict[str, Any]] = [
        {"layers": 2, "kind": "none", "batch": 16, "dropout": 0.5, "bias": True},
        {"layers": 1, "kind": "sgd", "rate": 1e-3, "batch": 64, "dropout": 0.25, "bias": False},
    ]
    for point in points:
        problem.add_starting_point(point)
    optimizer = make(method, problem)
    trials = optimizer.ask(1) + optimizer.ask(3)
    assert [trial.config for trial in trials[:2]] == list(problem.starting_points)
    assert [trial.origin.kind == "start" for trial in trials] == [True, True, False, False]


@every_method
@pytest.mark.parametrize(
    "value",
    [lambda i: None, lambda i: 1.0, lambda i: 10.0 ** (300 * math.cos(i)), lambda i: -1.7e308 if i % 2 else 1.7e308],
    ids=["all failed", "all equal", "300 orders of magnitude", "extremes"],
)
def test_no_set_of_results_breaks_anything(method: str, value: Any) -> None:
    optimizer = make(method, mixed_problem())
    for _ in range(5):
        trials = optimizer.ask(6)
        assert len(trials) == 6
        values = [value(trial.number) for trial in trials]
        optimizer.tell(
            Result(t.number, v) if v is not None else Result(t.number, None, failure="x")
            for t, v in zip(trials, values, strict=True)
        )
    assert optimizer.num_told == 30


# -- withdraw, restore, limits ---------------------------------------------------------------------------------------


@every_method
def test_a_withdrawn_configuration_may_come_again_but_its_number_never(method: str) -> None:
    problem = HpProblem()
    problem.add_hyperparameter((0, 3), "x")
    optimizer = make(method, problem)
    trials = optimizer.ask(4)
    gone = trials[1]
    optimizer.withdraw([gone.number])
    optimizer.tell([Result(t.number, 1.0) for t in trials if t is not gone])
    again = optimizer.ask(1)
    assert [(t.number, t.config) for t in again] == [(4, gone.config)]
    with pytest.raises(TellError, match="withdrawn"):
        optimizer.tell([Result(gone.number, 1.0)])
    with pytest.raises(TellError, match="has a result"):
        optimizer.withdraw([0])


@every_method
def test_restore_keeps_withdrawn_numbers_and_warm_starts(method: str) -> None:
    loop = make(method, mixed_problem(), 3)
    warm = Result(None, 0.5, config=loop.problem.default_configuration)
    loop.tell([warm])
    trials = loop.ask(6)
    loop.withdraw([2])
    told = [result_of(trial) for trial in trials if trial.number != 2]
    loop.tell(told)
    again = make(method, mixed_problem(), 3)
    again.restore(trials, [warm, *told], withdrawn=[2])
    assert as_data(again.ask(5)) == as_data(loop.ask(5))


@every_method
def test_the_final_result_of_a_run_that_was_stopped_takes_the_place_of_the_first(method: str) -> None:
    optimizer = make(method, mixed_problem())
    numbers = [trial.number for trial in optimizer.ask(4)]
    stopped = Result(numbers[0], 0.1, curve=[(1.0, 0.1)], stopped=True)
    final = Result(numbers[0], 0.6, curve=[(1.0, 0.1), (9.0, 0.6)])
    optimizer.tell([stopped, Result(numbers[1], 0.5)])
    optimizer.tell(stopped)
    assert optimizer.num_told == 2
    for wrong in ([Result(numbers[0], 0.2, stopped=True)], [final, Result(numbers[0], 0.2, stopped=True)]):
        with pytest.raises(TellError, match=r"was told the objective 0\.[16]"):
            optimizer.tell(wrong)
    optimizer.tell(final)
    optimizer.tell(final)
    assert optimizer.num_told == 2
    assert sorted(-value for value in optimizer.to_skopt().func_vals) == [0.5, 0.6]
    for other in (stopped, Result(numbers[0], 0.7)):
        with pytest.raises(TellError, match=r"was told the objective 0\.6"):
            optimizer.tell(other)


@every_method
@pytest.mark.parametrize("seed", range(2))
def test_a_restored_search_with_stopped_runs_goes_on_as_the_uninterrupted_one(method: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    loop = make(method, mixed_problem(), seed)
    trials: list[Trial] = []
    results: list[Result] = []
    stopped: list[Result] = []

    def told(trial: Trial, stop: bool) -> Result:
        whole = result_of(trial)
        if whole.objective is None:
            return whole
        curve = [(float(epoch), whole.objective - 1.0 / epoch) for epoch in ((1,) if stop else (1, 3, 9))]
        return replace(whole, objective=curve[-1][1], curve=curve, stopped=stop)

    for step in range(8):
        asked = loop.ask(4)
        trials += asked
        new = [told(trial, bool(rng.random() < 0.6)) for trial in asked]
        stopped += [result for result in new if result.stopped]
        if step == 5:  # the best two go on
            best = sorted(stopped, key=lambda result: -(result.objective or 0.0))[:2]
            new += [told(trials[result.number or 0], False) for result in best]
        loop.tell(new)
        results += new
    again = make(method, mixed_problem(), seed)
    again.restore(trials, results)
    assert as_data(again.ask(5)) == as_data(loop.ask(5))


@every_method
def test_restore_refuses_what_does_not_fit(method: str) -> None:
    trials = make(method, mixed_problem()).ask(2)
    with pytest.raises(TellError, match="comes twice"):
        make(method, mixed_problem()).restore([trials[0], trials[0]], [])
    with pytest.raises(TellError, match="never asked"):
        make(method, mixed_problem()).restore(trials, [Result(7, 1.0)])
    used = make(method, mixed_problem())
    used.ask(1)
    with pytest.raises(TellError, match="fresh"):
        used.restore(trials, [])


@every_method
@pytest.mark.parametrize("n", [-1, 1.5, True, "3"])
def test_a_count_that_is_no_count_is_an_error(method: str, n: Any) -> None:
    with pytest.raises(SettingsError, match="n >= 0"):
        make(method, mixed_problem()).ask(n)


@every_method
def test_asking_for_none_gives_none(method: str) -> None:
    optimizer = make(method, mixed_problem())
    assert optimizer.ask(0) == []
    assert not optimizer.exhausted


@every_method
def test_to_skopt_holds_the_evaluated_configurations_minimising(method: str) -> None:
    loop = AskTell(make(method, mixed_problem())).run(6, np.random.default_rng(0))
    loop.tell(list(loop.pending))
    done = [result.objective for result in loop.results if result.objective is not None]
    result = loop.optimizer.to_skopt()
    assert result.func_vals.tolist() == [-value for value in done]
    assert len(result.x_iters) == len(done)
    assert result.fun == -max(done)


@every_method
def test_it_is_an_optimizer(method: str) -> None:
    optimizer = make(method, mixed_problem())
    assert isinstance(optimizer, Optimizer)
    assert optimizer.method == method
    optimizer.close()
    optimizer.close()


# -- make_optimizer --------------------------------------------------------------------------------------------------


@every_method
def test_an_unknown_option_is_an_error_that_lists_the_known(method: str) -> None:
    with pytest.raises(SettingsError, match="has no option 'colour'") as error:
        make_optimizer(method, mixed_problem(), colour="red")
    assert all(name in str(error.value) for name in optimizer_options(method))


@every_method
@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 1.5}, {"seed": True}, {"num_workers": 0}, {"num_workers": 2.0}])
def test_a_bad_seed_or_number_of_workers_is_an_error(method: str, bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(bad))):
        make_optimizer(method, mixed_problem(), **bad)


def test_an_unknown_method_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(SettingsError, match="ambs, random, ga"):
        make_optimizer("annealing", mixed_problem())


@every_method
def test_an_empty_problem_is_refused(method: str) -> None:
    with pytest.raises(ProblemError, match="no hyperparameters"):
        make_optimizer(method, HpProblem("empty"))


@every_method
def test_a_problem_that_grows_later_does_not_disturb_a_search(method: str) -> None:
    problem = mixed_problem()
    optimizer, other = make(method, problem), make(method, mixed_problem())
    extra = problem.add_hyperparameter(["a", "b"], "aa")
    problem.add_condition(cs.EqualsCondition(extra, problem["bias"], True))
    assert as_data(optimizer.ask(6)) == as_data(other.ask(6))
