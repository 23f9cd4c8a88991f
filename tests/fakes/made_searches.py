"""Searches that never ran, as the lines of their tables: for figures, reports and comparisons."""

from __future__ import annotations

import math
from typing import Any

import ConfigSpace as cs
import numpy as np

from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results.analysis.trials import Trials


def network_problem() -> HpProblem:
    """Every kind of hyperparameter: log, linear, whole, real, choices, an order, a constant, a conditional one."""
    problem = HpProblem("network")
    problem.add_hyperparameter((1e-5, 1e-1, "log-uniform"), "learning_rate", default_value=1e-3)
    problem.add_hyperparameter((1, 8), "num_layers")
    problem.add_hyperparameter((16, 512, "log-uniform"), "units")
    problem.add_hyperparameter(["relu", "tanh", "gelu", "logistic"], "activation")
    optimizer = problem.add_hyperparameter(["sgd", "adam"], "optimizer")
    momentum = problem.add_hyperparameter((0.5, 0.99), "momentum")
    problem.add_condition(cs.EqualsCondition(momentum, optimizer, "sgd"))
    problem.add_hyperparameter([16, 32, 64], "batch_size")
    problem.add_hyperparameter([True, False], "augment")
    problem.add_hyperparameter(cs.Constant("version", 3))
    return problem


def made_search(
    count: int,
    *,
    workers: int = 4,
    seed: int = 0,
    name: str = "made",
    failing: bool = True,
    gain: float = 0.0,
    **settings: Any,
) -> Trials:
    """A search of `network_problem` with `count` trials that ended and two still open.

    The learning rate matters most, then the activation; great learning rates fail. `gain` is added to all objectives.
    """
    problem = network_problem()
    rng = np.random.default_rng(seed)
    configs = problem.encoder.decode(problem.encoder.sample(count + 2, rng))
    free = np.zeros(workers)
    lines: list[dict[str, Any]] = []
    tracebacks: dict[int, str] = {}
    for number, config in enumerate(configs):
        line: dict[str, Any] = {f"p:{key}": value for key, value in config.items()}
        line |= {"objective": None, "job_id": number, "job_status": "READY", "m:timestamp_submit": float(number)}
        lines.append(line)
        if number >= count:
            continue
        worker = int(free.argmin())
        start = float(free[worker]) + 1.0
        free[worker] = end = start + 30.0 * float(rng.lognormal(0, 0.3))
        line |= {
            "m:timestamp_start": round(start, 3),
            "m:timestamp_end": round(end, 3),
            "m:balsam_job_id": 100 + number,
        }
        line |= {"m:timestamp_gather": round(end + 0.1, 3), "m:site": "lab", "m:failure": None, "m:epochs": number % 7}
        if failing and config["learning_rate"] > 1e-2:
            line |= {"job_status": "FAILED", "m:failure": "ValueError: <loss> is nan & gone"}
            tracebacks[number] = (
                'Traceback (most recent call last):\n  File "train.py"\nValueError: <loss> is nan & gone'
            )
            continue
        rate = math.log10(config["learning_rate"])
        value = 0.9 + gain - 0.03 * (rate + 3) ** 2 - 0.1 * (config["activation"] == "logistic") + rng.normal(0, 0.003)
        line |= {"job_status": "DONE", "objective": float(value)}
    return Trials(name, {**_settings(problem, seed), **settings}, lines, 1_700_000_000.0, tracebacks)


def _settings(problem: HpProblem, seed: int) -> dict[str, Any]:
    return {
        "problem": problem.to_dict(),
        "method": "ambs",
        "options": {"surrogate": "RF"},
        "seed": seed,
        "site": "lab",
        "run": {"kind": "function", "name": "f", "target": "f.py:run"},
        "num_workers": 4,
        "asked_for": {},
    }


ODD_NAMES = ["constructor", "toString", "__proto__", "valueOf", "hasOwnProperty", "a.b", "datum"]
ODD_CHOICES = ["constructor", "__proto__", "\x1b[31mred", "a\x01b", "toString", "\ufffe", "tab\there", "\u202eback"]


def odd_search() -> Trials:
    """A search whose names and choices mean something to JavaScript, to a terminal or to XML."""
    problem = HpProblem("odd")
    for name in ODD_NAMES:
        problem.add_hyperparameter((0.0, 1.0), name)
    problem.add_hyperparameter(ODD_CHOICES, "choice")
    lines = [
        {
            "job_id": n,
            "objective": float(n % 7) / 7,
            "job_status": "DONE",
            "m:timestamp_start": n * 1.0,
            "m:timestamp_end": n + 1.0,
            **{f"p:{name}": (n * 0.37 + k / 7) % 1 for k, name in enumerate(ODD_NAMES)},
            "p:choice": ODD_CHOICES[n % len(ODD_CHOICES)],
        }
        for n in range(40)
    ]
    return Trials("constructor", {"problem": problem.to_dict(), "method": "random"}, lines)
