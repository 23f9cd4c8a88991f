"""Other optimizers behind the benchmark's loop, each with the settings that its authors recommend or ship.

Runs in an environment of its own (see README.md beside it), with this folder on the path:
``python peers.py PEER TASK SEED BUDGET WORKERS`` prints one line of JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from loop import Searcher, run
from tasks import TASKS, Task


def active(task: Task, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the hyperparameters that its choices leave inactive, as plain values."""
    kept: dict[str, Any] = {}
    for p in task.parameters:
        if p.parent is None or kept.get(p.parent) in p.values:
            value = config[p.name]
            kept[p.name] = int(value) if p.kind == "int" else float(value) if p.kind == "real" else str(value)
    return kept


class Skopt:
    """scikit-optimize's Optimizer; it knows no conditions, so inactive hyperparameters are searched and ignored."""

    def __init__(self, task: Task, seed: int, workers: int) -> None:
        from skopt import Optimizer
        from skopt.space import Categorical, Integer, Real

        space: list[Any] = []
        for p in task.parameters:
            prior = "log-uniform" if p.log else "uniform"
            if p.kind == "cat":
                space.append(Categorical(list(p.choices), name=p.name))
            else:
                space.append((Integer if p.kind == "int" else Real)(p.low, p.high, prior=prior, name=p.name))
        self._task = task
        self._optimizer = Optimizer(space, "RF", acq_func="gp_hedge", random_state=seed, n_initial_points=10)

    def ask(self, n: int) -> Sequence[tuple[Any, Mapping[str, Any]]]:
        points = [self._optimizer.ask()] if n == 1 else self._optimizer.ask(n, strategy="cl_max")
        names = [p.name for p in self._task.parameters]
        return [(x, active(self._task, dict(zip(names, x, strict=True)))) for x in points]

    def tell(self, pairs: Sequence[tuple[Any, Mapping[str, Any], float | None]]) -> None:
        known = [y for y in self._optimizer.yi if np.isfinite(y)]
        worst = max(known) if known else 1.0
        self._optimizer.tell([x for x, _, _ in pairs], [worst if y is None else y for _, _, y in pairs])


class Optuna:
    """Optuna with its TPE (multivariate, grouped, constant liar when parallel) or its Gaussian process sampler."""

    def __init__(self, task: Task, seed: int, workers: int, sampler: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        if sampler == "gp":
            made: Any = optuna.samplers.GPSampler(seed=seed)
        elif sampler == "tpe_multivariate":
            made = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=workers > 1)
        else:
            made = optuna.samplers.TPESampler(seed=seed, constant_liar=workers > 1)
        self._study = optuna.create_study(sampler=made)
        self._task = task

    def ask(self, n: int) -> Sequence[tuple[Any, Mapping[str, Any]]]:
        out = []
        for _ in range(n):
            trial = self._study.ask()
            config: dict[str, Any] = {}
            for p in self._task.parameters:
                if p.parent is not None and config.get(p.parent) not in p.values:
                    continue
                if p.kind == "cat":
                    config[p.name] = trial.suggest_categorical(p.name, list(p.choices))
                elif p.kind == "int":
                    config[p.name] = trial.suggest_int(p.name, int(p.low), int(p.high), log=p.log)
                else:
                    config[p.name] = trial.suggest_float(p.name, p.low, p.high, log=p.log)
            out.append((trial, config))
        return out

    def tell(self, pairs: Sequence[tuple[Any, Mapping[str, Any], float | None]]) -> None:
        for trial, _, loss in pairs:
            if loss is None:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(trial, loss)


def _config_space(task: Task, seed: int) -> Any:
    import ConfigSpace as cs

    space = cs.ConfigurationSpace(seed=seed)
    for p in task.parameters:
        if p.kind == "cat":
            space.add(cs.Categorical(p.name, list(p.choices)))
        elif p.kind == "int":
            space.add(cs.Integer(p.name, (int(p.low), int(p.high)), log=p.log))
        else:
            space.add(cs.Float(p.name, (p.low, p.high), log=p.log))
    for p in task.parameters:
        if p.parent:
            space.add(cs.InCondition(space[p.name], space[p.parent], list(p.values)))
    return space


class Smac:
    """SMAC3's facade for hyperparameter optimization (random forest, local search) or its black-box facade (GP)."""

    def __init__(self, task: Task, seed: int, workers: int, facade: str) -> None:
        import smac

        scenario = smac.Scenario(
            _config_space(task, seed),
            n_trials=100_000,
            deterministic=True,
            seed=seed,
            output_directory=tempfile.mkdtemp(),
        )
        made = smac.HyperparameterOptimizationFacade if facade == "hpo" else smac.BlackBoxFacade
        design = made.get_initial_design(scenario, n_configs=max(2 * len(task.parameters), workers))
        self._facade = made(
            scenario, lambda config, seed: 0.0, initial_design=design, logging_level=False, overwrite=True
        )
        self._task = task

    def ask(self, n: int) -> Sequence[tuple[Any, Mapping[str, Any]]]:
        infos = [self._facade.ask() for _ in range(n)]
        return [(info, active(self._task, dict(info.config))) for info in infos]

    def tell(self, pairs: Sequence[tuple[Any, Mapping[str, Any], float | None]]) -> None:
        from smac.runhistory import StatusType, TrialValue

        for info, _, loss in pairs:
            value = TrialValue(loss) if loss is not None else TrialValue(np.inf, status=StatusType.CRASHED)
            self._facade.tell(info, value, save=False)


class DeepHyper:
    """DeepHyper's CBO as it comes, or with random candidates (``acq_optimizer="sampling"``)."""

    def __init__(self, task: Task, seed: int, workers: int, acq_optimizer: str) -> None:
        from deephyper.hpo import CBO, HpProblem

        problem = HpProblem(_config_space(task, seed))
        design = max(10, 2 * len(task.parameters), workers)
        self._search = CBO(
            problem,
            random_state=seed,
            log_dir=tempfile.mkdtemp(),
            acq_optimizer=acq_optimizer,
            n_initial_points=design,
            checkpoint_history_to_csv=False,
        )
        self._task = task

    def ask(self, n: int) -> Sequence[tuple[Any, Mapping[str, Any]]]:
        return [(config, active(self._task, config)) for config in self._search.ask(n)]

    def tell(self, pairs: Sequence[tuple[Any, Mapping[str, Any], float | None]]) -> None:
        self._search.tell([(config, "F_failed" if loss is None else -loss) for config, _, loss in pairs])


PEERS: dict[str, Any] = {
    "skopt": Skopt,
    "optuna_tpe": lambda *a: Optuna(*a, "tpe"),
    "optuna_tpe_multi": lambda *a: Optuna(*a, "tpe_multivariate"),
    "optuna_gp": lambda *a: Optuna(*a, "gp"),
    "smac": lambda *a: Smac(*a, "hpo"),
    "smac_gp": lambda *a: Smac(*a, "blackbox"),
    "deephyper": lambda *a: DeepHyper(*a, "mixedga"),
    "deephyper_sampling": lambda *a: DeepHyper(*a, "sampling"),
}
"""Name -> maker of a searcher from (task, seed, workers)."""


def main() -> None:
    """Run one search and print its result."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    peer, task, seed, budget, workers = sys.argv[1:6]
    searcher: Searcher = PEERS[peer](TASKS[task], int(seed), int(workers))
    print(json.dumps(run(searcher, TASKS[task], seed=int(seed), budget=int(budget), workers=int(workers))))


if __name__ == "__main__":
    main()
