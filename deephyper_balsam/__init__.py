"""Asynchronous hyperparameter search for deep neural networks on supercomputers, native to Balsam.

The public names are loaded when they are first used, so that a node which only evaluates loads neither
ConfigSpace nor pandas nor scikit-optimize.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deephyper_balsam.evaluators.balsam import BalsamEvaluator, Resources
    from deephyper_balsam.problem import HpProblem
    from deephyper_balsam.search import AMBS, GA, RandomSearch
    from deephyper_balsam.trial import Result, Trial

__version__ = "0.1.0"

_HOME = {
    "HpProblem": "problem",
    "AMBS": "search",
    "RandomSearch": "search",
    "GA": "search",
    "BalsamEvaluator": "evaluators.balsam",
    "Resources": "evaluators.balsam",
    "Result": "trial",
    "Trial": "trial",
}

__all__ = ["AMBS", "GA", "BalsamEvaluator", "HpProblem", "RandomSearch", "Resources", "Result", "Trial", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deephyper_balsam' has no attribute {name!r}")
    return getattr(import_module(f"deephyper_balsam.{_HOME[name]}"), name)
