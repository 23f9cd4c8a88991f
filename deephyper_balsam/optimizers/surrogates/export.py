"""A history as scikit-optimize's own result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deephyper_balsam.errors import InputError
from deephyper_balsam.problem.space import INTEGER, Column
from deephyper_balsam.trial import Config

if TYPE_CHECKING:
    from skopt import OptimizeResult

    from deephyper_balsam.problem.hp_problem import HpProblem


def to_optimize_result(problem: HpProblem, configs: Sequence[Config], objectives: Sequence[float]) -> OptimizeResult:
    """The history as scikit-optimize knows it, for its plots; objectives are turned into losses.

    Parameters
    ----------
    problem
        The problem, which gives the dimensions. A hyperparameter that is inactive in a configuration takes its default.
    configs, objectives
        What was evaluated with success, in the order told; objectives are maximised.

    Returns
    -------
    skopt.OptimizeResult
        With ``x``, ``fun``, ``x_iters``, ``func_vals`` and ``space``, and a fitted model in ``models``.

    Raises
    ------
    InputError
        If there is no successful evaluation.
    """
    from skopt.learning import RandomForestRegressor
    from skopt.space import Space
    from skopt.utils import create_result

    if not len(objectives):
        raise InputError("A result for scikit-optimize needs at least one successful evaluation, but got none.")
    columns = problem.encoder.columns
    space = Space([_dimension(column) for column in columns])
    defaults = {column.name: value for column, value in zip(columns, _default_values(columns), strict=True)}
    points = [[config.get(column.name, defaults[column.name]) for column in columns] for config in configs]
    losses = [-float(objective) for objective in objectives]
    result = create_result(points, losses, space)
    model = RandomForestRegressor(n_estimators=50, min_samples_leaf=min(3, len(losses)), random_state=0)
    model.fit(space.transform(points), np.array(losses))
    result.models = [model]
    return result


def _default_values(columns: Sequence[Column]) -> list[Any]:
    values = [float(column.to_values(np.array([column.default]))[0]) for column in columns]
    return [
        column.choices[int(value)] if column.choices else int(value) if column.kind == INTEGER else value
        for column, value in zip(columns, values, strict=True)
    ]


def _dimension(column: Column) -> Any:
    from skopt.space import Categorical, Integer, Real

    prior = "log-uniform" if column.log else "uniform"
    if column.choices:
        return Categorical(list(column.choices), name=column.name)
    if column.kind == INTEGER:
        return Integer(int(column.lower), int(column.upper), prior=prior, name=column.name)
    return Real(column.lower, column.upper, prior=prior, name=column.name)
