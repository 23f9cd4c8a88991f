"""What the methods are worth on the applications: asked and told directly, without Balsam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from deephyper_balsam.node.targets import load_object
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.store.applications import bundled, resolve_problem
from deephyper_balsam.trial import Result


def run_function(application: str) -> Callable[[Any], Any]:
    loaded: Callable[[Any], Any] = load_object(f"{bundled()[application] / 'run.py'}:run")
    return loaded


def objective(returned: Any) -> float:
    return float(returned["objective"] if isinstance(returned, dict) else returned)


def best_found(application: str, method: str, evaluations: int, seed: int, at_a_time: int) -> float:
    """The best objective of a search of so many evaluations."""
    run = run_function(application)
    optimizer = make_optimizer(method, resolve_problem(application), seed=seed, num_workers=at_a_time)
    best = -np.inf
    for _ in range(evaluations // at_a_time):
        trials = optimizer.ask(at_a_time)
        values = [objective(run(trial.config)) for trial in trials]
        optimizer.tell([Result(trial.number, value) for trial, value in zip(trials, values, strict=True)])
        best = max(best, *values)
    optimizer.close()
    return float(best)


@pytest.mark.slow
def test_ambs_beats_random_search_on_ackley_in_five_dimensions() -> None:
    means = {
        method: np.mean([best_found("ackley", method, 100, seed, at_a_time=10) for seed in range(10)])
        for method in ("random", "ambs")
    }
    assert means["ambs"] > means["random"] + 5, means


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "ambs"])
def test_a_search_of_digits_finds_better_than_the_default(method: str) -> None:
    with threadpool_limits(1):  # on matrices this small, threads cost more than they do
        default = objective(run_function("digits")(resolve_problem("digits").default_configuration))
        assert np.median([best_found("digits", method, 20, seed, at_a_time=4) for seed in range(3)]) > default
