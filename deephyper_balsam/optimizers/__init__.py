"""Ask/tell optimizers: "ambs", "random" and "ga". They know neither Balsam nor the disk."""

from __future__ import annotations

import difflib
import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.problem.hp_problem import HpProblem

if TYPE_CHECKING:
    from deephyper_balsam.optimizers.base import Optimizer

_HOME = {"ambs": ("ambs", "AMBS"), "random": ("random", "RandomSearch"), "ga": ("genetic", "GeneticAlgorithm")}

METHODS = tuple(_HOME)
"""The names that `make_optimizer` knows."""

__all__ = ["METHODS", "make_optimizer", "optimizer_options"]


def optimizer_options(method: str) -> dict[str, Any]:
    """The options of a method beside `seed` and `num_workers`, with their defaults, read from its signature.

    Raises
    ------
    SettingsError
        If there is no such method.
    """
    parameters = inspect.signature(_load(method)).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("seed", "num_workers")
    }


def make_optimizer(
    method: str, problem: HpProblem, *, seed: int | None = None, num_workers: int = 1, **options: Any
) -> Optimizer:
    """Make an optimizer by the name of its method.

    Parameters
    ----------
    method
        ``"ambs"``, ``"random"`` or ``"ga"``.
    problem
        What to search.
    seed
        A whole number of at least 0; drawn if None.
    num_workers
        How many trials are expected to run at a time.
    **options
        Those of the method; see `optimizer_options`.

    Raises
    ------
    SettingsError
        If the method or an option is unknown, or an option has a value that is not allowed.
    ProblemError
        If the problem cannot be searched.
    """
    known = optimizer_options(method)
    for name in options:
        if name not in known:
            hint = difflib.get_close_matches(name, known, n=1)
            raise SettingsError(
                f'The method "{method}" has no option {name!r}'
                + (f"; did you mean {hint[0]!r}?" if hint else ".")
                + f" Its options are: {', '.join(known) or 'none'}."
            )
    optimizer: Optimizer = _load(method)(problem, seed=seed, num_workers=num_workers, **options)
    return optimizer


def _load(method: str) -> Any:
    if method not in _HOME:
        raise SettingsError(f"There is no method {method!r}; choose one of: {', '.join(METHODS)}.")
    module, name = _HOME[method]
    return getattr(import_module(f"deephyper_balsam.optimizers.{module}"), name)
