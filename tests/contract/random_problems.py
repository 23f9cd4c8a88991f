"""Random search spaces for Hypothesis, with conditions and forbidden clauses, and ConfigSpace as the judge."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import ConfigSpace as cs
import numpy as np
from hypothesis import strategies as st

from deephyper_balsam.errors import ProblemError
from deephyper_balsam.problem.columns import INTEGER, ORDINAL, REAL
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Config

FINITE = ("integer", "ordinal", "categorical", "bool", "mixed", "constant")
KINDS = (*FINITE, "real", "log-real", "log-integer", "weighted", "normal")


@st.composite
def problems(draw: st.DrawFn, *, kinds: tuple[str, ...] = KINDS, max_size: int = 6) -> HpProblem:
    """A problem with up to `max_size` hyperparameters, some conditional, some combinations forbidden."""
    problem = HpProblem("random")
    for i in range(draw(st.integers(1, max_size))):
        problem.add_hyperparameter(*_hyperparameter(draw, draw(st.sampled_from(kinds)), f"x{i}"))
    names = problem.hyperparameter_names
    for i in range(1, len(names)):
        if draw(st.booleans()):
            with contextlib.suppress(ProblemError):  # ConfigSpace refuses some on an inactive parent
                problem.add_condition(_condition(draw, problem, names[i], names[:i]))
    _hand_over(problem)
    for _ in range(draw(st.integers(0, 3))):
        try:
            problem.add_forbidden_clause(_clause(draw, problem))
            problem.check()
        except ProblemError:  # it would have forbidden the default, which ConfigSpace refuses
            break
    else:
        return problem
    return HpProblem.from_dict(problem.to_dict()) if _is_searchable(problem) else _plain_problem()


def legal_for_configspace(problem: HpProblem, config: Config) -> bool:
    """Whether ConfigSpace itself finds these values legal, exactly the active ones present, and nothing forbidden."""
    space = problem.space
    vector = np.full(len(space), np.nan)
    for name, value in config.items():
        if not space[name].legal_value(value):
            return False
        vector[space.index_of[name]] = space[name].to_vector(value)
    if space.get_active_hyperparameters(vector) != set(config):
        return False
    return not any(clause.is_forbidden_vector(vector) for clause in space.forbidden_clauses)


def objective(config: Config) -> float | None:
    """A value that depends on every hyperparameter, or None (a failure) for some of the space."""
    total = 0.0
    for place, (name, value) in enumerate(sorted(config.items()), start=1):
        number = float(value) if isinstance(value, (int, float)) else float(len(str(value)))
        total += math.sin(place * number + len(name))
    return None if total > 1.5 else total


def _hyperparameter(draw: st.DrawFn, kind: str, name: str) -> tuple[Any, ...]:
    if kind == "integer":
        low = draw(st.integers(-3, 3))
        return (low, low + draw(st.integers(1, 5))), name
    if kind == "log-integer":
        low = draw(st.integers(1, 4))
        return (low, low + draw(st.integers(1, 200)), "log-uniform"), name
    if kind == "real":
        low = draw(st.sampled_from([-1e6, -1.0, 0.0, 0.1, 1e9]))
        return (low, low + draw(st.sampled_from([0.3, 1.0, 1e3]))), name
    if kind == "log-real":
        low = draw(st.sampled_from([1e-12, 1e-5, 0.5]))
        return (low, low * draw(st.sampled_from([2.0, 1e4])), "log-uniform"), name
    if kind == "ordinal":
        return (draw(st.lists(st.sampled_from([1, 2.5, 8, 16, 64]), min_size=1, max_size=4, unique=True)), name)
    if kind == "bool":
        return [True, False], name
    if kind == "mixed":
        return ["a", 3, 2.5, None, True], name
    if kind == "constant":
        return draw(st.sampled_from([7, "on", 0.5])), name
    if kind == "weighted":
        return (cs.CategoricalHyperparameter(name, ["a", "b", "c"], weights=[0.1, 0.2, 0.7]),)
    if kind == "normal":
        return ({"mu": 0.0, "sigma": 1.0, "lower": -2.0, "upper": 3.0}, name)
    return (draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=2, max_size=4, unique=True)), name)


def _value(draw: st.DrawFn, problem: HpProblem, name: str) -> Any:
    column = next(column for column in problem.encoder.columns if column.name == name)
    if column.choices:
        return draw(st.sampled_from(column.choices))
    units = np.array([draw(st.sampled_from([0.0, 0.25, 0.5, 0.9]))])
    value = float(column.to_values(units)[0])
    return value if column.kind == "real" else int(value)


def _condition(draw: st.DrawFn, problem: HpProblem, child: str, parents: tuple[str, ...]) -> Any:
    def one() -> Any:
        parent = draw(st.sampled_from(parents))
        value = _value(draw, problem, parent)
        kinds = [cs.EqualsCondition, cs.NotEqualsCondition, cs.InCondition]
        if problem[parent].ORDERABLE:
            kinds += [cs.GreaterThanCondition, cs.LessThanCondition]
        kind = draw(st.sampled_from(kinds))
        return kind(problem[child], problem[parent], [value] if kind is cs.InCondition else value)

    join = draw(st.sampled_from([None, None, cs.AndConjunction, cs.OrConjunction]))
    return one() if join is None else join(one(), one())


def _clause(draw: st.DrawFn, problem: HpProblem) -> Any:
    names = problem.hyperparameter_names
    numeric = [column.name for column in problem.encoder.columns if column.kind in (REAL, INTEGER, ORDINAL)]

    def one() -> Any:
        name = draw(st.sampled_from(names))
        value = _value(draw, problem, name)
        kinds = [cs.ForbiddenEqualsClause, cs.ForbiddenInClause]
        if name in numeric:
            kinds += [cs.ForbiddenGreaterThanClause, cs.ForbiddenLessThanClause]
        kind = draw(st.sampled_from(kinds))
        return kind(problem[name], [value] if kind is cs.ForbiddenInClause else value)

    form = draw(st.sampled_from(["one", "and", "relation"]))
    if form == "relation" and len(numeric) >= 2:
        left, right = draw(st.permutations(numeric))[:2]
        relations = [cs.ForbiddenGreaterThanRelation, cs.ForbiddenLessThanRelation, cs.ForbiddenEqualsRelation]
        return draw(st.sampled_from(relations))(problem[left], problem[right])
    return one() if form == "one" else cs.ForbiddenAndConjunction(one(), one())


def _hand_over(problem: HpProblem) -> None:
    """Let ConfigSpace see all that was added; what it refuses, each time with an error, is taken out."""
    for _ in problem.hyperparameter_names:
        with contextlib.suppress(ProblemError):
            assert problem.space is not None
            return


def _is_searchable(problem: HpProblem) -> bool:
    try:
        problem.check()
    except ProblemError:
        return False
    return True


def _plain_problem() -> HpProblem:
    problem = HpProblem("plain")
    problem.add_hyperparameter((0, 5), "x0")
    return problem
