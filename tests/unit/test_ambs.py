from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ConfigSpace as cs
import numpy as np
import pytest

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.optimizers import make_optimizer, model
from deephyper_balsam.optimizers.ambs import AMBS, LIAR_STRATEGIES
from deephyper_balsam.optimizers.model import Feasibility, Losses
from deephyper_balsam.optimizers.surrogates import Features
from deephyper_balsam.optimizers.surrogates.gaussian_process import GPPool
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Result, Trial

ROOT = Path(__file__).parents[2]


def plane(d: int = 2) -> HpProblem:
    problem = HpProblem("plane")
    for i in range(d):
        problem.add_hyperparameter((0.0, 1.0), f"x{i}")
    return problem


def mixed() -> HpProblem:
    problem = HpProblem("mixed")
    problem.add_hyperparameter((1e-5, 1e-1, "log-uniform"), "rate")
    problem.add_hyperparameter((1, 8), "layers")
    problem.add_hyperparameter(["sgd", "adam", "rms"], "method")
    problem.add_hyperparameter((0.0, 1.0), "momentum")
    problem.add_hyperparameter([16, 32, 64], "batch")
    problem.add_condition(cs.EqualsCondition(problem["momentum"], problem["method"], "sgd"))
    problem.add_forbidden_clause(
        cs.ForbiddenAndConjunction(
            cs.ForbiddenEqualsClause(problem["method"], "rms"), cs.ForbiddenEqualsClause(problem["batch"], 64)
        )
    )
    return problem


def quality(trial: Trial) -> float:
    c = trial.config
    if "rate" not in c:
        return -sum((v - 0.3) ** 2 for v in c.values() if isinstance(v, float))
    return -((math.log10(c["rate"]) + 3) ** 2) - 0.1 * (c["layers"] - 3) ** 2 + c.get("momentum", 0.5)


def search(optimizer: Any, budget: int, at_a_time: int = 1) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < budget:
        batch = optimizer.ask(min(at_a_time, budget - len(trials)))
        optimizer.tell([Result(t.number, quality(t)) for t in batch])
        trials += batch
    return trials


def configs(trials: list[Trial]) -> list[dict[str, Any]]:
    return [trial.config for trial in trials]


def test_it_finds_a_better_point_than_random_search_on_a_smooth_function() -> None:
    ambs, random = (
        np.median([max(quality(t) for t in search(make_optimizer(m, plane(3), seed=seed), 30)) for seed in range(3)])
        for m in ("ambs", "random")
    )
    assert ambs > random / 10


@pytest.mark.parametrize("surrogate", ["RF", "ET", "GBRT", "GP", "auto"])
@pytest.mark.parametrize("acq_func", ["LCB", "EI", "PI", "gp_hedge"])
def test_every_surrogate_with_every_criterion_suggests_legal_distinct_configurations(
    surrogate: str, acq_func: str
) -> None:
    problem = mixed()
    trials = search(AMBS(problem, seed=3, surrogate=surrogate, acq_func=acq_func, num_initial=6), 12, 3)
    for trial in trials:
        assert problem.check_configuration(trial.config) == trial.config
    assert len({json.dumps(c) for c in configs(trials)}) == 12
    assert [t.origin.kind for t in trials[:6]] == ["initial"] * 6
    assert trials[-1].origin.kind == "model"


@pytest.mark.parametrize("liar_strategy", LIAR_STRATEGIES)
@pytest.mark.parametrize("surrogate", ["RF", "GBRT", "GP"])
def test_a_batch_is_distinct_under_every_liar(liar_strategy: str, surrogate: str) -> None:
    optimizer = AMBS(plane(), seed=0, num_workers=8, surrogate=surrogate, liar_strategy=liar_strategy)
    search(optimizer, 16, 8)
    batch = optimizer.ask(20)
    assert len({tuple(c.values()) for c in configs(batch)}) == 20


@pytest.mark.parametrize("design", ["sobol", "lhs", "halton", "random"])
def test_every_initial_design_gives_legal_points_after_the_starting_points(design: str) -> None:
    problem = mixed()
    problem.add_starting_point(rate=1e-3, layers=2, method="adam", batch=32)
    trials = AMBS(problem, seed=0, initial_design=design, num_initial=9).ask(9)
    assert [t.origin.kind for t in trials] == ["start"] + ["initial"] * 8
    assert all(problem.check_configuration(t.config) for t in trials)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("surrogate", "SVM"),
        ("acq_func", "UCB"),
        ("liar_strategy", "cl_best"),
        ("initial_design", "grid"),
        ("kappa", -1.0),
        ("kappa", math.nan),
        ("kappa", "1"),
        ("xi", math.inf),
        ("num_initial", 0),
        ("num_initial", "3"),
        ("max_evals", 1.5),
        ("background", 1),
    ],
)
def test_a_wrong_option_is_refused_with_the_rule_and_what_was_got(option: str, value: Any) -> None:
    got = re.escape(repr(value))
    with pytest.raises(
        SettingsError, match=rf"`{option}` must be .*got {got}|`{option} >= 1` must hold, but got \({option}={got}\)"
    ):
        AMBS(plane(), **{option: value})


def degenerate(kind: str, n: int) -> list[float | None]:
    rng = np.random.default_rng(0)
    return {
        "all failed": [None] * n,
        "all equal": [1.0] * n,
        "zero": [0.0] * n,
        "three hundred orders of magnitude": [float(10.0**e) for e in rng.uniform(-300, 300, n)],
        "negative over all orders": [float(-(10.0**e)) for e in rng.uniform(-300, 300, n)],
        "at the limits of a float": [(-1) ** i * 1.7e308 for i in range(n)],
        "tiny": [float(v) for v in 1e-300 * rng.random(n)],
        "one success": [None] * (n - 1) + [1.0],
        "half failed": [None if i % 2 else float(i) for i in range(n)],
        "two values": [float(i % 2) for i in range(n)],
        "one outlier": [1e30] + [float(v) for v in rng.random(n - 1)],
    }[kind]


KINDS = (
    "all failed",
    "all equal",
    "zero",
    "three hundred orders of magnitude",
    "negative over all orders",
    "at the limits of a float",
    "tiny",
    "one success",
    "half failed",
    "two values",
    "one outlier",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("surrogate", ["RF", "ET", "GBRT", "GP"])
def test_degenerate_objectives_never_break_a_search(kind: str, surrogate: str) -> None:
    optimizer = AMBS(mixed(), seed=5, surrogate=surrogate, num_initial=4, num_workers=2)
    values = degenerate(kind, 14)
    for step in range(0, 14, 2):
        batch = optimizer.ask(2)
        optimizer.tell(
            [
                Result(t.number, v, None if v is not None else "x")
                for t, v in zip(batch, values[step : step + 2], strict=True)
            ]
        )
    assert optimizer.ask(1)[0].origin.kind == "model"


@pytest.mark.parametrize("surrogate", ["RF", "ET", "GBRT", "GP"])
def test_one_result_is_enough_for_a_model(surrogate: str) -> None:
    optimizer = AMBS(plane(), seed=0, num_initial=1, surrogate=surrogate)
    optimizer.tell([Result(optimizer.ask()[0].number, 1.0)])
    assert optimizer.ask()[0].origin.model == 1


def test_constant_features_are_harmless() -> None:
    problem = plane()
    problem.add_hyperparameter("only", "constant")
    problem.add_hyperparameter([3], "three")
    for surrogate in ("RF", "GP"):
        assert len(search(AMBS(problem, seed=0, surrogate=surrogate, num_initial=3), 8)) == 8


def test_a_small_chance_of_failure_is_none_and_a_large_one_is_large() -> None:
    none, least, median = [], [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        unit = rng.random((200, 3))
        losses = np.where(unit[:, 0] > 0.75, np.nan, unit[:, 1])
        feasibility = Feasibility(Features((0, 0, 0)), Losses(unit, losses), seed=seed)
        good, bad = rng.random((300, 3)), rng.random((300, 3))
        good[:, 0], bad[:, 0] = 0.6 * good[:, 0], 0.85 + 0.15 * bad[:, 0]
        none.append(np.mean(feasibility.chance_of_failure(good) == 0.0))
        least.append(feasibility.chance_of_failure(bad).min())
        median.append(np.median(feasibility.chance_of_failure(bad)))
    assert np.median(none) > 0.88
    assert np.median(least) > 0.15
    assert np.median(median) > 0.5


def test_it_keeps_away_from_a_region_that_always_fails() -> None:
    failures = []
    for seed in range(3):
        optimizer = AMBS(plane(), seed=seed, max_evals=60)
        failed = 0
        for i in range(60):
            trial = optimizer.ask()[0]
            bad = trial.config["x0"] < 0.25
            failed += bad and i >= 20
            optimizer.tell([Result(trial.number, None if bad else quality(trial), "broken" if bad else None)])
        failures.append(failed)
    assert np.median(failures) <= 4  # a quarter of the space, so ten by chance


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 8])
def test_no_branch_of_the_space_is_given_up_because_another_was_refined(num_workers: int) -> None:
    problem = HpProblem("branches")
    problem.add_hyperparameter(["easy", "hard", "worse"], "method")
    problem.add_hyperparameter((0.0, 1.0), "x")
    problem.add_hyperparameter((0.0, 1.0), "only_hard")
    problem.add_condition(cs.EqualsCondition(problem["only_hard"], problem["method"], "hard"))

    def objective(config: dict[str, Any]) -> float:
        if config["method"] == "hard":  # its optimum lies where the others are bad, and needs both values
            return 1.0 - 40 * (config["x"] - 0.9) ** 2 - 40 * (config["only_hard"] - 0.1) ** 2
        return (0.5 if config["method"] == "easy" else 0.3) - (config["x"] - 0.2) ** 2

    least_tried, best = [], []
    for seed in range(5):
        optimizer = AMBS(problem, seed=seed, num_workers=num_workers)
        tried: Counter[str] = Counter()
        found = -math.inf
        for _ in range(90):
            (trial,) = optimizer.ask()
            tried[trial.config["method"]] += 1
            found = max(found, objective(trial.config))
            optimizer.tell([Result(trial.number, objective(trial.config))])
        least_tried.append(min(tried.values()))
        best.append(found)
    # What one seed finds hangs on the last bits of a processor's arithmetic
    assert min(least_tried) >= 5
    assert np.median(least_tried) >= 10
    assert max(best) > 0.9  # without leaving the easy branch: 0.5


def test_a_thousand_asked_at_once_are_distinct_and_known_to_the_model() -> None:
    optimizer = AMBS(plane(), seed=3, num_workers=64, num_initial=8)
    for _ in range(3):
        trials = optimizer.ask(8)
        optimizer.tell([Result(t.number, quality(t)) for t in trials])
    many = optimizer.ask(1500)  # more than the pool holds
    assert len({repr(t.config) for t in many}) == 1500
    assert {"model", "random"} == {t.origin.kind for t in many}
    assert not {repr(t.config) for t in optimizer.ask(8)} & {repr(t.config) for t in many}


def test_one_model_is_told_of_so_many_running_trials_and_suggests_others_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "MOST_LIES", 16)
    told: list[int] = []
    lie = GPPool.lie

    def counted(pool: GPPool, indices: Any, value: float | None) -> None:
        told.append(len(indices))
        lie(pool, indices, value)

    monkeypatch.setattr(GPPool, "lie", counted)
    optimizer = AMBS(plane(), seed=3, num_workers=64, num_initial=8, surrogate="GP")
    optimizer.tell([Result(t.number, quality(t)) for t in optimizer.ask(8)])
    many = optimizer.ask(100)
    assert sum(told) == 16
    assert len({repr(t.config) for t in many}) == 100
    assert {t.origin.kind for t in many} == {"model"}


def test_a_small_space_is_used_up_without_repetition() -> None:
    problem = HpProblem("small")
    problem.add_hyperparameter((1, 4), "a")
    problem.add_hyperparameter(["u", "v", "w"], "b")
    optimizer = AMBS(problem, seed=0, num_initial=3)
    seen = []
    for _ in range(12):
        (trial,) = optimizer.ask()
        seen.append((trial.config["a"], trial.config["b"]))
        optimizer.tell([Result(trial.number, float(trial.config["a"]))])
    assert len(set(seen)) == 12
    assert optimizer.ask(3) == []
    assert optimizer.exhausted


def told_out_of_order(optimizer: Any) -> list[Trial]:
    trials = optimizer.ask(8)
    for k in (3, 1, 6, 0):
        optimizer.tell([Result(trials[k].number, quality(trials[k]))])
        trials += optimizer.ask(1)
    optimizer.tell(
        [Result(trials[k].number, quality(trials[k]) if k != 5 else None, "x" if k == 5 else None) for k in (2, 5)]
    )
    return list(trials) + list(optimizer.ask(6))


@pytest.mark.parametrize("surrogate", ["RF", "GP"])
@pytest.mark.parametrize("acq_func", ["LCB", "gp_hedge"])
def test_the_same_seed_and_order_of_calls_give_the_same_suggestions(surrogate: str, acq_func: str) -> None:
    options: dict[str, Any] = {
        "seed": 9,
        "num_workers": 4,
        "surrogate": surrogate,
        "acq_func": acq_func,
        "num_initial": 6,
    }
    one, other = (told_out_of_order(AMBS(mixed(), **options)) for _ in range(2))
    assert one == other
    assert configs(one) != configs(told_out_of_order(AMBS(mixed(), **{**options, "seed": 10})))


def test_another_process_gives_the_same_suggestions() -> None:
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from tests.unit.test_ambs import *\n"
        "print(json.dumps(configs(told_out_of_order(AMBS(mixed(), seed=4, num_workers=4, num_initial=6)))))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    here = configs(told_out_of_order(AMBS(mixed(), seed=4, num_workers=4, num_initial=6)))
    assert json.loads(ran.stdout) == here


@pytest.mark.parametrize("surrogate", ["RF", "ET", "GBRT", "GP"])
@pytest.mark.parametrize("acq_func", ["LCB", "gp_hedge"])
@pytest.mark.parametrize("most_lies", [model.MOST_LIES, 3])
def test_a_search_rebuilt_from_its_history_goes_on_as_the_uninterrupted_one(
    surrogate: str, acq_func: str, most_lies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "MOST_LIES", most_lies)
    options: dict[str, Any] = {
        "seed": 7,
        "num_workers": 4,
        "surrogate": surrogate,
        "acq_func": acq_func,
        "num_initial": 5,
    }
    first = AMBS(mixed(), **options)
    trials, results = first.ask(8), []
    for k in (4, 0, 2, 7, 1):
        results.append(Result(trials[k].number, quality(trials[k])))
        first.tell(results[-1:])
        trials += first.ask(1)
    rebuilt = AMBS(mixed(), **options)
    rebuilt.restore(trials, results)
    for _ in range(2):
        ours, theirs = first.ask(2), rebuilt.ask(2)
        assert ours == theirs
        for optimizer in (first, rebuilt):
            optimizer.tell([Result(ours[0].number, quality(ours[0]))])


def test_what_a_withdrawn_trial_was_is_forgotten_by_the_next_model() -> None:
    optimizer = AMBS(plane(), seed=0, num_workers=4, num_initial=4)
    search(optimizer, 6, 2)
    batch = optimizer.ask(4)
    optimizer.withdraw([t.number for t in batch])
    again = optimizer.ask(1)
    assert again[0].number == batch[-1].number + 1


def test_a_list_told_at_once_is_one_model_update(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = AMBS(plane(), seed=0, num_initial=4)
    updates = []
    update = optimizer._update
    monkeypatch.setattr(optimizer, "_update", lambda: (updates.append(optimizer.num_told), update()))
    trials = optimizer.ask(8)
    optimizer.tell([Result(t.number, quality(t)) for t in trials])
    optimizer.tell([Result(None, 0.5, config={"x0": 0.1 * k, "x1": 0.2}) for k in range(5)])
    assert updates == [8]
    assert optimizer.ask()[0].origin.model == 13
    assert updates == [8, 13]


def test_a_model_that_cannot_be_made_is_logged_by_tell_and_raised_by_ask(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = AMBS(plane(), seed=0, num_initial=2)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no fit today")

    trials = optimizer.ask(2)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._teacher, "learn", broken)
        optimizer.tell([Result(t.number, quality(t)) for t in trials])
        assert "no fit today" in caplog.text
        assert optimizer.num_told == 2
        with pytest.raises(RuntimeError, match="no fit today"):
            optimizer.ask()
    assert optimizer.ask()[0].origin.kind == "model"


def test_in_the_background_the_model_says_how_much_it_had_learnt() -> None:
    optimizer = AMBS(plane(), seed=0, num_workers=2, num_initial=4, background=True)
    trials = optimizer.ask(4)
    assert optimizer.wait(10)
    optimizer.tell([Result(t.number, quality(t)) for t in trials[:3]])
    assert optimizer.wait(60)
    (trial,) = optimizer.ask()
    assert (trial.origin.kind, trial.origin.told, trial.origin.model) == ("model", 3, 3)
    optimizer.tell([Result(trials[3].number, quality(trials[3]))])
    (trial,) = optimizer.ask()
    assert trial.origin.told == 4
    assert trial.origin.model in (3, 4)
    optimizer.close()
    optimizer.close()
    assert optimizer.num_told == 4


def test_in_the_background_a_model_that_cannot_be_made_is_logged_and_the_search_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = AMBS(plane(), seed=0, num_initial=2, background=True)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no fit today")

    monkeypatch.setattr(optimizer._teacher, "learn", broken)
    trials = optimizer.ask(2)
    optimizer.tell([Result(t.number, quality(t)) for t in trials])
    assert optimizer.wait(10)
    assert optimizer.ask()[0].origin.kind == "random"
    assert "no fit today" in caplog.text
    optimizer.close()


def test_in_the_background_nothing_is_suggested_twice() -> None:
    optimizer = AMBS(mixed(), seed=1, num_workers=4, background=True)
    running, seen = optimizer.ask(8), []
    for k in range(40):
        trial = running.pop(k % 4)
        seen.append(json.dumps(trial.config))
        optimizer.tell([Result(trial.number, quality(trial))])
        running += optimizer.ask(1)
    assert len(set(seen)) == len(seen)
    optimizer.close()


def test_the_history_is_handed_to_scikit_optimize_as_losses_with_defaults_for_what_is_inactive() -> None:
    optimizer = AMBS(mixed(), seed=0, num_initial=4)
    trials = search(optimizer, 5)
    result = optimizer.to_skopt()
    assert result.fun == min(-quality(t) for t in trials)
    assert len(result.x_iters) == 5
    assert all(point in result.space for point in result.x_iters)
    assert result.models
