"""Values of hyperparameters checked against their columns; domains, conditions and clauses in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ConfigSpace as cs

from deephyper_balsam.errors import ProblemError
from deephyper_balsam.problem.shorthands import AnyHyperparameter, is_number, is_same
from deephyper_balsam.problem.space import INTEGER, REAL, Column, plain

_BOUND_ROUNDING = 1e-13  # ConfigSpace rounds bounds to 13 decimal places

_SIGNS = (
    (cs.EqualsCondition, "=="),
    (cs.NotEqualsCondition, "!="),
    (cs.InCondition, "in"),
    (cs.GreaterThanCondition, ">"),
    (cs.LessThanCondition, "<"),
)


def check_value(column: Column, value: Any) -> Any:
    value = plain(value)
    if column.choices:
        for choice in column.choices:
            if is_same(choice, value):
                return choice
    elif is_number(value) and column.kind == REAL:
        if column.lower - _BOUND_ROUNDING <= value <= column.upper + _BOUND_ROUNDING:
            return min(max(float(value), column.lower), column.upper)
    elif is_number(value) and column.lower <= value <= column.upper and value == int(value):
        return int(value)
    raise ProblemError(f"`{column.name}` must be {allowed(column)}, but got {value!r}.")


def allowed(column: Column) -> str:
    if column.choices:
        return f"one of {list(column.choices)!r}"
    kind = "an int" if column.kind == INTEGER else "a number"
    return f"{kind} in {domain(column)}"


def domain(column: Column) -> str:
    if column.choices:
        return "{" + ", ".join(repr(choice) for choice in column.choices) + "}"
    form = (lambda bound: str(int(bound))) if column.kind == INTEGER else repr
    return f"[{form(column.lower)}, {form(column.upper)}]" + (" log" if column.log else "")


def hyperparameters_of(item: Any) -> Iterator[AnyHyperparameter]:
    for part in item.dlcs if hasattr(item, "dlcs") else [item]:
        for attribute in ("child", "parent", "hyperparameter", "left", "right"):
            if hasattr(part, attribute):
                yield getattr(part, attribute)


def condition_text(condition: Any) -> str:
    """Return a condition in words; ConfigSpace writes ``child | parent == value``, which reads as `or`."""
    if isinstance(condition, cs.AndConjunction):
        return " and ".join(condition_text(part) for part in condition.components)
    if isinstance(condition, cs.OrConjunction):
        text = " or ".join(condition_text(part) for part in condition.components)
        return f"({text})"
    sign = next(sign for kind, sign in _SIGNS if isinstance(condition, kind))
    value = list(condition.values) if isinstance(condition, cs.InCondition) else condition.value
    return f"{condition.parent.name} {sign} {plain(value)!r}"


def text_of(clause: Any) -> str:
    """ConfigSpace's own text of a condition or clause, without the word that it repeats before each part."""
    return str(clause).replace("Forbidden: ", "")
