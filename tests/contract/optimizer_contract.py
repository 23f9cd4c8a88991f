"""What every optimizer owes: helpers that live a search through ask and tell, in any order."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
from random_problems import legal_for_configspace, objective

from deephyper_balsam.optimizers import METHODS, make_optimizer
from deephyper_balsam.optimizers.base import Optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Result, Trial

# Small and without a thread, so that every suggestion is a function of the history.
OPTIONS: dict[str, dict[str, Any]] = {
    "random": {},
    "ga": {"population": 6},
    "ambs": {"surrogate": "ET", "num_initial": 4, "background": False},
}
WAITS = {"ga"}
ALL = tuple(METHODS)


def make(method: str, problem: HpProblem, seed: int | None = 0, num_workers: int = 4, **options: Any) -> Optimizer:
    return make_optimizer(method, problem, seed=seed, num_workers=num_workers, **{**OPTIONS[method], **options})


def result_of(trial: Trial) -> Result:
    value = objective(trial.config)
    if value is None:
        return Result(trial.number, None, failure="outside")
    return Result(trial.number, value)


class AskTell:
    """A search under way: what was asked, what is pending, what was told in which order."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.trials: list[Trial] = []
        self.pending: dict[int, Trial] = {}
        self.results: list[Result] = []

    def ask(self, n: int) -> list[Trial]:
        trials = self.optimizer.ask(n)
        assert [t.number for t in trials] == list(range(len(self.trials), len(self.trials) + len(trials)))
        self.trials += trials
        self.pending |= {trial.number: trial for trial in trials}
        return trials

    def tell(self, numbers: list[int]) -> None:
        results = [result_of(self.pending.pop(number)) for number in numbers]
        self.results += results
        self.optimizer.tell(results)

    def step(self, rng: np.random.Generator) -> None:
        """Ask some, then tell some of the pending in a random order."""
        asked = self.ask(int(rng.integers(1, 5)))
        if asked or self.pending:
            least = 0 if asked else 1  # who waits for results must get one, or nothing would ever happen
            count = int(rng.integers(least, len(self.pending) + 1))
            self.tell(rng.permutation(list(self.pending))[:count].tolist())

    def run(self, steps: int, rng: np.random.Generator) -> AskTell:
        for _ in range(steps):
            self.step(rng)
        return self

    def check(self) -> None:
        """Every configuration legal, none repeated, and the counts right."""
        problem = self.optimizer.problem
        for trial in self.trials:
            assert legal_for_configspace(problem, trial.config), trial
        keys = {json.dumps(trial.config, sort_keys=True) for trial in self.trials}
        assert len(keys) == len(self.trials)
        assert self.optimizer.num_asked == len(self.trials)
        assert self.optimizer.num_told == len(self.results)


def as_data(trials: list[Trial]) -> list[dict[str, Any]]:
    return [asdict(trial) for trial in trials]


def mixed_problem() -> HpProblem:
    """Every kind of hyperparameter, with a condition and a forbidden clause."""
    import ConfigSpace as cs

    problem = HpProblem("mixed")
    layers = problem.add_hyperparameter((1, 8), "layers")
    kind = problem.add_hyperparameter(["sgd", "adam", "none"], "kind")
    rate = problem.add_hyperparameter((1e-5, 1e-1, "log-uniform"), "rate")
    problem.add_hyperparameter([16, 32, 64], "batch")
    problem.add_hyperparameter((0.0, 1.0), "dropout")
    problem.add_hyperparameter([True, False], "bias")
    problem.add_condition(cs.NotEqualsCondition(rate, kind, "none"))
    problem.add_forbidden_clause(
        cs.ForbiddenAndConjunction(cs.ForbiddenEqualsClause(kind, "adam"), cs.ForbiddenInClause(layers, [7, 8]))
    )
    return problem
