"""Our optimizers behind the benchmark's loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ConfigSpace as cs

from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Result
from tests.benchmarks.tasks import Task


def problem_of(task: Task) -> HpProblem:
    """The task's space."""
    problem = HpProblem(task.name)
    for p in task.parameters:
        if p.kind == "cat":
            problem.add_hyperparameter(list(p.choices), p.name)
        else:
            low, high = (int(p.low), int(p.high)) if p.kind == "int" else (float(p.low), float(p.high))
            problem.add_hyperparameter((low, high, "log-uniform" if p.log else "uniform"), p.name)
    for p in task.parameters:
        if p.parent:
            problem.add_condition(cs.InCondition(problem[p.name], problem[p.parent], list(p.values)))
    return problem


class Ours:
    """An optimizer of this package as a `loop.Searcher`; options as `make_optimizer` takes them."""

    def __init__(self, method: str, task: Task, seed: int, workers: int, **options: Any) -> None:
        self._optimizer = make_optimizer(method, problem_of(task), seed=seed, num_workers=workers, **options)

    def ask(self, n: int) -> list[tuple[int, Mapping[str, Any]]]:
        return [(trial.number, trial.config) for trial in self._optimizer.ask(n)]

    def tell(self, pairs: Sequence[tuple[int, Mapping[str, Any], float | None]]) -> None:
        self._optimizer.tell(
            [
                Result(number, None if loss is None else -loss, None if loss is not None else "failed")
                for number, _, loss in pairs
            ]
        )
