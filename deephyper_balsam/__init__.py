"""Asynchronous hyperparameter search for deep neural networks on supercomputers, native to Balsam.

The public names are loaded when they are first used, so that a node which only evaluates loads neither
ConfigSpace nor pandas nor scikit-optimize.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deephyper_balsam.common.version import __version__

if TYPE_CHECKING:
    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.driver.local_session import InProcessEvaluator
    from deephyper_balsam.driver.search import AMBS, GA, RandomSearch
    from deephyper_balsam.node.running_job import RunningJob
    from deephyper_balsam.problem.hp_problem import HpProblem
    from deephyper_balsam.store.allocation_request import AllocationRequest
    from deephyper_balsam.trial import Resources, Result, Trial


_HOME = {
    "HpProblem": "problem.hp_problem",
    "AMBS": "driver.search",
    "RandomSearch": "driver.search",
    "GA": "driver.search",
    "BalsamEvaluator": "driver.balsam_session",
    "AllocationRequest": "store.allocation_request",
    "InProcessEvaluator": "driver.local_session",
    "RunningJob": "node.running_job",
    "Resources": "trial",
    "Result": "trial",
    "Trial": "trial",
}

__all__ = [
    "AMBS",
    "GA",
    "AllocationRequest",
    "BalsamEvaluator",
    "HpProblem",
    "InProcessEvaluator",
    "RandomSearch",
    "Resources",
    "Result",
    "RunningJob",
    "Trial",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deephyper_balsam' has no attribute {name!r}")
    return getattr(import_module(f"deephyper_balsam.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
