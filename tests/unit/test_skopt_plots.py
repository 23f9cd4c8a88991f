"""scikit-optimize's own plots take what `to_skopt()` gives, in mixed and conditional spaces."""

from __future__ import annotations

from collections.abc import Iterator

import ConfigSpace as cs
import matplotlib as mpl
import pytest

from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Result

mpl.use("Agg")


def mixed() -> HpProblem:
    problem = HpProblem("mixed")
    problem.add_hyperparameter((1, 8), "layers")
    problem.add_hyperparameter((1e-5, 1e-1, "log-uniform"), "rate")
    problem.add_hyperparameter(["relu", "tanh", "gelu"], "activation")
    problem.add_hyperparameter([True, False], "bias")
    problem.add_hyperparameter([16, 32, 64], "batch")
    return problem


def conditional() -> HpProblem:
    problem = mixed()
    optimizer = problem.add_hyperparameter(["sgd", "adam"], "optimizer")
    momentum = problem.add_hyperparameter((0.0, 1.0), "momentum")
    variant = problem.add_hyperparameter(["a", "b"], "variant")
    problem.add_condition(cs.EqualsCondition(momentum, optimizer, "sgd"))
    problem.add_condition(cs.EqualsCondition(variant, optimizer, "adam"))
    return problem


@pytest.fixture(autouse=True)
def figures_closed() -> Iterator[None]:
    import matplotlib.pyplot as plt

    plt.close("all")  # what another file's tests drew, too: plots go onto the newest
    yield
    plt.close("all")


@pytest.mark.parametrize("problem", [mixed(), conditional()], ids=["mixed", "conditional"])
def test_convergence_evaluations_and_objective_are_drawn(problem: HpProblem) -> None:
    from skopt.plots import plot_convergence, plot_evaluations, plot_objective

    optimizer = make_optimizer("random", problem, seed=1, num_workers=1)
    for trial in optimizer.ask(16):
        failed = trial.number % 7 == 3
        objective = None if failed else float(trial.config["layers"])
        optimizer.tell([Result(trial.number, objective, failure="diverged" if failed else None)])
    result = optimizer.to_skopt()
    width = len(problem.hyperparameter_names)
    curve = plot_convergence(result).lines[0].get_ydata()
    assert curve[-1] == result.fun == -max(-result.func_vals)
    assert len(curve) == 14  # without the failed
    for axes in (plot_evaluations(result), plot_objective(result, n_samples=5, n_points=4)):
        drawn = axes.figure
        assert len(drawn.axes) >= width * width
        assert {one.get_xlabel() for one in drawn.axes} >= set(problem.hyperparameter_names)
