"""DeepHyper's short ways to write a hyperparameter, turned into ConfigSpace objects."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import ConfigSpace as cs
from ConfigSpace.hyperparameters import Hyperparameter

from deephyper_balsam.common.wording import storable
from deephyper_balsam.errors import ProblemError
from deephyper_balsam.problem.columns import plain

AnyHyperparameter = Hyperparameter[Any, Any]

_MAX_INTEGER = 2**53  # beyond it a float64 column cannot tell neighbours apart
_MAX_CHOICE = 2**63
_MIN_LOG = 1e-12  # ConfigSpace rounds bounds to 13 decimal places
_SHORTHANDS = (
    '(low, high), (low, high, "uniform"), (low, high, "log-uniform"), a list of choices, a single value, '
    '{"mu": m, "sigma": s, "lower": l, "upper": u} for a normal, or a ConfigSpace hyperparameter'
)


def from_shorthand(value: Any, name: str, default: Any) -> AnyHyperparameter:
    """Make the hyperparameter that `value` describes; see `HpProblem.add_hyperparameter`.

    Raises
    ------
    ProblemError
        If the shorthand or the default cannot be used.
    """
    value, default = _plain_scalars(value), _plain_scalars(default)
    try:
        if isinstance(value, tuple):
            return _range(value, name, default)
        if isinstance(value, list):
            return _choices(value, name, default)
        if isinstance(value, Mapping):
            return _normal(value, name, default)
        if isinstance(value, (str, bool, int, float)):
            if default not in (None, value):
                raise ProblemError(f"The constant `{name}` is {value!r}; leave `default_value` out (got {default!r}).")
            return cs.Constant(name, value)
    except ProblemError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ProblemError(f"`{name}` cannot be made from {value!r}: {error}") from error
    raise ProblemError(f"`{name}` must be given as {_SHORTHANDS}, but got {value!r}.")


def _range(value: tuple[Any, ...], name: str, default: Any) -> AnyHyperparameter:
    if len(value) not in (2, 3) or not all(is_number(bound) for bound in value[:2]):
        raise ProblemError(f"`{name}` must be given as {_SHORTHANDS}, but got {value!r}.")
    low, high = value[:2]
    prior = value[2] if len(value) == 3 else "uniform"
    if prior not in ("uniform", "log-uniform"):
        raise ProblemError(f'The prior of `{name}` must be "uniform" or "log-uniform", but got {prior!r}.')
    integer = isinstance(low, int) and isinstance(high, int)
    if integer and max(abs(low), abs(high)) > _MAX_INTEGER:
        raise ProblemError(
            f"The bounds of the integer `{name}` must lie within ±2**53, but got (low={low}, high={high})."
        )
    if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(float(high) - float(low))):
        raise ProblemError(f"The bounds of `{name}` must be finite, but got (low={low}, high={high}).")
    if not low < high:
        raise ProblemError(
            f"`low < high` must hold for `{name}`, but got (low={low}, high={high}); a single value is a constant: "
            f'add_hyperparameter({low!r}, "{name}").'
        )
    log = prior == "log-uniform"
    if log and low <= 0:
        raise ProblemError(f"`low > 0` must hold for the log-uniform `{name}`, but got (low={low}, high={high}).")
    if log and low < _MIN_LOG:
        raise ProblemError(f"`low >= {_MIN_LOG}` must hold for the log-uniform `{name}`, but got (low={low}).")
    if default is not None:
        if not is_number(default) or (integer and default != int(default)):
            raise ProblemError(
                f"`default_value` of `{name}` must be a{'n int' if integer else ' number'}, but got {default!r}."
            )
        if not low <= default <= high:
            raise ProblemError(
                f"`low <= default_value <= high` must hold for `{name}`, but got "
                f"(low={low}, high={high}, default_value={default})."
            )
        default = int(default) if integer else float(default)
    if integer:
        return cs.UniformIntegerHyperparameter(name, low, high, default_value=default, log=log)
    if max(abs(round(low, 13) - low), abs(round(high, 13) - high)) > 1e-3 * (high - low):
        raise ProblemError(
            f"ConfigSpace keeps 13 decimal places of bounds, too few for `{name}` (low={low}, high={high}); search "
            "another unit, such as its exponent."
        )
    return cs.UniformFloatHyperparameter(name, float(low), float(high), default_value=default, log=log)


def _choices(value: list[Any], name: str, default: Any) -> AnyHyperparameter:
    if not value:
        raise ProblemError(f"`{name}` needs at least one choice, but got an empty list.")
    for choice in value:
        _check_choice(name, choice)
    for index, choice in enumerate(value):
        if choice in value[:index]:
            raise ProblemError(
                f"The choices of `{name}` must differ, but {choice!r} equals an earlier one in {value!r}."
            )
    if default is not None and not any(is_same(default, choice) for choice in value):
        raise ProblemError(f"`default_value` of `{name}` must be one of {value!r}, but got {default!r}.")
    kwargs = {} if default is None else {"default_value": default}
    if all(is_number(choice) for choice in value):
        return cs.OrdinalHyperparameter(name, value, **kwargs)
    return cs.CategoricalHyperparameter(name, value, **kwargs)


def _normal(value: Mapping[str, Any], name: str, default: Any) -> AnyHyperparameter:
    needed = {"mu", "sigma", "lower", "upper"}
    if set(value) != needed or not all(is_number(number) for number in value.values()):
        raise ProblemError(
            f"A normal `{name}` must have the numbers {listed(sorted(needed))}, but got {dict(value)!r}."
        )
    bounds = [value["mu"], value["lower"], value["upper"]]
    if not value["lower"] <= value["mu"] <= value["upper"] or value["lower"] >= value["upper"] or value["sigma"] <= 0:
        raise ProblemError(f"`lower <= mu <= upper` and `sigma > 0` must hold for `{name}`, but got {dict(value)!r}.")
    kind = cs.NormalIntegerHyperparameter if all(isinstance(b, int) for b in bounds) else cs.NormalFloatHyperparameter
    return kind(name, **value, default_value=default)


def check_hyperparameter(hp: AnyHyperparameter) -> None:
    """Refuse what a float64 matrix and JSON cannot carry."""
    lower, upper = getattr(hp, "lower", 0), getattr(hp, "upper", 0)
    if not (math.isfinite(lower) and math.isfinite(upper)):
        raise ProblemError(f"The bounds of `{hp.name}` must be finite, but got (lower={lower}, upper={upper}).")
    if getattr(hp, "log", False) and lower < _MIN_LOG:
        raise ProblemError(f"`low >= {_MIN_LOG}` must hold for the log-uniform `{hp.name}`, but got (low={lower}).")
    if (
        isinstance(hp, cs.hyperparameters.IntegerHyperparameter)
        and max(abs(int(lower)), abs(int(upper))) > _MAX_INTEGER
    ):
        raise ProblemError(f"The bounds of the integer `{hp.name}` must lie within ±2**53, but got ({lower}, {upper}).")
    values = getattr(hp, "choices", getattr(hp, "sequence", (getattr(hp, "value", 0),)))
    for value in plain(list(values)):
        _check_choice(hp.name, value)


def _check_choice(name: str, choice: Any) -> None:
    """Refuse a choice that would not come back the same from Balsam's database, JSON or a CSV."""
    if not isinstance(choice, (str, bool, int, float, type(None))) or (
        isinstance(choice, float) and not math.isfinite(choice)
    ):
        raise ProblemError(f"A choice of `{name}` must be a str, bool, finite number or None, but got {choice!r}.")
    if isinstance(choice, int) and not -_MAX_CHOICE <= choice < _MAX_CHOICE:
        raise ProblemError(
            f"A whole number among the choices of `{name}` must lie within 64 bits, but got {choice}; write it as a "
            "float or a str."
        )
    if isinstance(choice, str):
        check_text(f"A choice of `{name}`", choice)


def check_text(what: str, text: str) -> None:
    """Refuse text that Balsam's database has no place for.

    Raises
    ------
    ProblemError
        The text is no valid Unicode (it has lone surrogates), or has the character NUL.
    """
    if storable(text) != text:
        raise ProblemError(
            f"{what} must be valid Unicode without the character NUL, but got {text!r}; Balsam cannot keep it."
        )


def is_number(value: Any) -> bool:
    """Whether it is an int or a real; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_same(one: Any, other: Any) -> bool:
    """Equal, and not a bool beside a number (True == 1 in Python)."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _plain_scalars(value: Any) -> Any:
    """Numpy scalars as Python's own; a tuple stays a tuple, because its kind is its meaning."""
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return plain(value)


def listed(names: Iterable[str]) -> str:
    """Names for a message, separated by commas."""
    return ", ".join(names) or "none"
