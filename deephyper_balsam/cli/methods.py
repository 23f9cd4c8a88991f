"""The options of the search methods, alike for `search run` and `simulate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from deephyper_balsam.cli.common import Finite

_COUNT = click.IntRange(min=1)
_NOT_NEGATIVE = Finite(min=0)
_SHARE = Finite(min=0, max=1)
F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = {
    "surrogate": click.option(
        "--surrogate", type=click.Choice(["RF", "ET", "GBRT", "GP", "auto"]), help="Model of AMBS. [default: auto]"
    ),
    "acq_func": click.option(
        "--acq-func", type=click.Choice(["LCB", "EI", "PI", "gp_hedge"]), help="What AMBS asks of it. [default: LCB]"
    ),
    "kappa": click.option("--kappa", type=_NOT_NEGATIVE, help="Exploration of LCB. [default: 1.0]"),
    "xi": click.option("--xi", type=_NOT_NEGATIVE, help="Exploration of EI and PI. [default: 0.01]"),
    "liar_strategy": click.option(
        "--liar-strategy",
        type=click.Choice(["believer", "cl_min", "cl_mean", "cl_max", "none"]),
        help="What AMBS takes pending trials for: the model's own prediction, a constant lie, or nothing. "
        "[default: believer]",
    ),
    "initial_design": click.option(
        "--initial-design",
        type=click.Choice(["sobol", "lhs", "halton", "random"]),
        help="First points of AMBS. [default: sobol]",
    ),
    "num_initial": click.option(
        "--num-initial", type=_COUNT, help="How many those are. [default: by the problem and the workers]"
    ),
    "population": click.option(
        "--population",
        type=click.IntRange(min=2),
        help="Members of a generation of the GA. [default: the workers, at least 20]",
    ),
    "cx_prob": click.option(
        "--cx-prob", type=_SHARE, help="Probability that the GA crosses a pair of parents. [default: 0.5]"
    ),
    "mut_prob": click.option("--mut-prob", type=_SHARE, help="Probability that the GA mutates a child. [default: 0.2]"),
    "tournament_size": click.option(
        "--tournament-size", type=_COUNT, help="How many compete to become a parent in the GA. [default: 3]"
    ),
}


def method_options(command: F) -> F:
    """Give a command the options of all methods."""
    for option in reversed(_OPTIONS.values()):
        command = option(command)
    return command


def of_method(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that are options of a method and were given."""
    return {name: settings[name] for name in _OPTIONS if settings.get(name) is not None}
