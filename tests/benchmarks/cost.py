"""What tell, ask(1), ask(64) and ask(256) cost against the history, in seconds of one core.

The space is a 10-D mixed one: 5 reals of which 2 log, 3 integers, 2 categoricals; also with a condition and a
forbidden clause.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import ConfigSpace as cs
import numpy as np

from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem import HpProblem
from deephyper_balsam.trial import Result


def space(constrained: bool = False) -> HpProblem:
    """The 10-D mixed space."""
    problem = HpProblem("mixed10")
    for i in range(3):
        problem.add_hyperparameter((0.0, 1.0), f"r{i}")
    for i in range(2):
        problem.add_hyperparameter((1e-6, 1.0, "log-uniform"), f"l{i}")
    for i in range(3):
        problem.add_hyperparameter((1, 100), f"i{i}")
    problem.add_hyperparameter(["a", "b", "c"], "c0")
    problem.add_hyperparameter(["u", "v", "w", "x"], "c1")
    if constrained:
        problem.add_condition(cs.EqualsCondition(problem["r2"], problem["c0"], "a"))
        problem.add_condition(cs.InCondition(problem["l1"], problem["c1"], ["u", "v"]))
        clause = cs.ForbiddenAndConjunction(
            cs.ForbiddenEqualsClause(problem["c0"], "b"), cs.ForbiddenEqualsClause(problem["c1"], "x")
        )
        problem.add_forbidden_clause(clause)
    return problem


def loss(config: Mapping[str, Any]) -> float:
    """A smooth bowl with steps and noise-free ripples."""
    total = sum((config.get(f"r{i}", 0.5) - 0.3) ** 2 for i in range(3))
    total += sum((np.log10(config.get(f"l{i}", 1e-3)) + 2) ** 2 / 10 for i in range(2))
    total += sum(((config[f"i{i}"] - 40) / 100) ** 2 for i in range(3))
    return float(
        total + {"a": 0.0, "b": 0.3, "c": 0.6}[config["c0"]] + {"u": 0.1, "v": 0.0, "w": 0.4, "x": 0.2}[config["c1"]]
    )


def measure(
    history: int, constrained: bool, repeats: int, clock: Callable[[], float] = time.process_time, **options: Any
) -> dict[str, float]:
    """Median seconds of each call after `history` results, by `clock`: by default the processor's time."""
    problem = space(constrained)
    optimizer = make_optimizer("ambs", problem, seed=1, **options)
    rows = problem.encoder.sample(history, np.random.default_rng(0))
    configs = problem.encoder.decode(problem.encoder.snap(rows))
    optimizer.tell([Result(None, -loss(config), config=config) for config in configs])
    for trial in optimizer.ask(getattr(optimizer, "num_initial", 1)):
        optimizer.tell([Result(trial.number, -loss(trial.config))])
    tells, asks = [], []
    for _ in range(repeats):
        start = clock()
        (trial,) = optimizer.ask(1)
        asks.append(clock() - start)
        value = -loss(trial.config)
        start = clock()
        optimizer.tell([Result(trial.number, value)])
        tells.append(clock() - start)
    out = {"tell": float(np.median(tells)), "tell_mean": float(np.mean(tells))}
    out |= {"ask": float(np.median(asks)), "ask_p99": float(np.quantile(asks, 0.99))}
    for n in (64, 256):
        start = clock()
        batch = optimizer.ask(n)
        out[f"ask{n}"] = clock() - start
        assert len({repr(t.config) for t in batch}) == n
        (single,) = optimizer.ask(1)
        optimizer.tell([Result(single.number, -loss(single.config))])
    out["rss_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history", type=int, nargs="+", default=[100, 1000, 5000, 10000])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--surrogate", nargs="+", default=["auto"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="time by the wall instead of the processor")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    if args.quick:
        args.history, args.repeats = [100, 1000], 5
    clock = time.perf_counter if args.wall else time.process_time
    print("| surrogate | space | history | tell ms (mean) | ask ms | ask p99 ms | ask(64) ms | ask(256) ms | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for surrogate in args.surrogate:
        for constrained in (False, True):
            for history in args.history:
                r = measure(history, constrained, args.repeats, clock, surrogate=surrogate, num_workers=args.workers)
                ms = {k: f"{1e3 * v:.1f}" for k, v in r.items()}
                name = "conditions" if constrained else "plain"
                cells = [surrogate, name, str(history), f"{ms['tell']} ({ms['tell_mean']})"]
                cells += [ms[k] for k in ("ask", "ask_p99", "ask64", "ask256")]
                print("|", " | ".join([*cells, f"{r['rss_MB']:.0f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
