"""What tell, ask(1), ask(64) and ask(256) cost against the history, in seconds of one core.

The space is a 10-D mixed one: 5 reals of which 2 log, 3 integers, 2 categoricals; also with conditions and a forbidden
clause, and with more than half of it forbidden.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ConfigSpace as cs
import numpy as np

from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Result

PEERS = {"deephyper_sampling": (100, 1000, 5000), "skopt": (100, 1000)}
"""Peers to compare with, and the histories for which that takes minutes, not hours."""
SPACES = ("plain", "conditions", "half forbidden")


def space(kind: str = "plain") -> HpProblem:
    """The 10-D mixed space, as it is, with conditions and a clause, or with most of it forbidden."""
    problem = HpProblem("mixed10")
    for i in range(3):
        problem.add_hyperparameter((0.0, 1.0), f"r{i}")
    for i in range(2):
        problem.add_hyperparameter((1e-6, 1.0, "log-uniform"), f"l{i}")
    for i in range(3):
        problem.add_hyperparameter((1, 100), f"i{i}")
    problem.add_hyperparameter(["a", "b", "c"], "c0")
    problem.add_hyperparameter(["u", "v", "w", "x"], "c1")
    if kind == "conditions":
        problem.add_condition(cs.EqualsCondition(problem["r2"], problem["c0"], "a"))
        problem.add_condition(cs.InCondition(problem["l1"], problem["c1"], ["u", "v"]))
        problem.add_forbidden_clause(_never(problem, ["b"], ["x"]))
    if kind == "half forbidden":
        problem.add_condition(cs.EqualsCondition(problem["r2"], problem["c0"], "a"))
        problem.add_forbidden_clause(cs.ForbiddenLessThanRelation(problem["i0"], problem["i1"]))
        problem.add_forbidden_clause(_never(problem, ["b", "c"], ["v", "w", "x"]))
    return problem


def _never(problem: HpProblem, first: list[str], second: list[str]) -> cs.ForbiddenAndConjunction:
    return cs.ForbiddenAndConjunction(
        cs.ForbiddenInClause(problem["c0"], first), cs.ForbiddenInClause(problem["c1"], second)
    )


def loss(config: Mapping[str, Any]) -> float:
    """A smooth bowl with steps and noise-free ripples."""
    total = sum((config.get(f"r{i}", 0.5) - 0.3) ** 2 for i in range(3))
    total += sum((np.log10(config.get(f"l{i}", 1e-3)) + 2) ** 2 / 10 for i in range(2))
    total += sum(((config[f"i{i}"] - 40) / 100) ** 2 for i in range(3))
    return float(
        total + {"a": 0.0, "b": 0.3, "c": 0.6}[config["c0"]] + {"u": 0.1, "v": 0.0, "w": 0.4, "x": 0.2}[config["c1"]]
    )


def told(history: int, kind: str, **options: Any) -> Any:
    """An optimizer that was told `history` random points and its own initial design."""
    problem = space(kind)
    optimizer = make_optimizer("ambs", problem, seed=1, **options)
    rows = problem.encoder.sample(history, np.random.default_rng(0))
    configs = problem.encoder.decode(problem.encoder.snap(rows))
    optimizer.tell([Result(None, -loss(config), config=config) for config in configs])
    for trial in optimizer.ask(optimizer.num_initial):
        optimizer.tell([Result(trial.number, -loss(trial.config))])
    return optimizer


def measure(
    history: int, kind: str, repeats: int, clock: Callable[[], float] = time.process_time, **options: Any
) -> dict[str, float]:
    """Seconds of each call after `history` results, by `clock`: by default the processor's time."""
    optimizer = told(history, kind, **options)
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
        spent = []
        for _ in range(3):
            start = clock()
            batch = optimizer.ask(n)
            spent.append(clock() - start)
            assert len({repr(t.config) for t in batch}) == n
            optimizer.withdraw([t.number for t in batch])
            (single,) = optimizer.ask(1)
            optimizer.tell([Result(single.number, -loss(single.config))])
        out[f"ask{n}"] = float(np.median(spent))
    out["ask_fitting_p99"] = _asked_while_it_fits(history, kind, repeats, **options)
    out["rss_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def _asked_while_it_fits(history: int, kind: str, repeats: int, **options: Any) -> float:
    """The 99th percentile of what `ask` computes (seconds of its own thread) while another thread fits the model."""
    optimizer = told(history, kind, background=True, **options)
    optimizer.wait()
    asks = []
    for _ in range(repeats):
        start = time.thread_time()
        (trial,) = optimizer.ask(1)
        asks.append(time.thread_time() - start)
        optimizer.tell([Result(trial.number, -loss(trial.config))])
    optimizer.close()
    return float(np.quantile(asks, 0.99))


def peer_cost(python: str, peer: str, history: int) -> float:
    """Median seconds of a peer's tell and ask on the plain space, in its own environment."""
    command = [python, str(Path(__file__).parent / "peer_cost.py"), peer, str(history)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split("tell+ask ")[1].split(" ms")[0]) / 1e3


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history", type=int, nargs="+", default=[100, 1000, 5000, 10000])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--surrogate", nargs="+", default=["auto"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=SPACES)
    parser.add_argument("--peer-python", help="interpreter of the peers' environment: compare with them in this run")
    parser.add_argument("--wall", action="store_true", help="time by the wall instead of the processor")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    if args.quick:
        args.history, args.repeats = [100, 1000], 10
    clock = time.perf_counter if args.wall else time.process_time
    print(
        "| surrogate | space | history | tell ms (mean) | ask ms | p99 | p99 in a fit | ask(64) | ask(256) | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    ours: dict[int, float] = {}
    for surrogate in args.surrogate:
        for kind in args.spaces:
            for history in args.history:
                r = measure(history, kind, args.repeats, clock, surrogate=surrogate, num_workers=args.workers)
                if (surrogate, kind) == (args.surrogate[0], "plain"):
                    ours[history] = r["tell_mean"] + r["ask"]
                ms = {k: f"{1e3 * v:.1f}" for k, v in r.items()}
                cells = [surrogate, kind, str(history), f"{ms['tell']} ({ms['tell_mean']})"]
                cells += [ms[k] for k in ("ask", "ask_p99", "ask_fitting_p99", "ask64", "ask256")]
                print("|", " | ".join([*cells, f"{r['rss_MB']:.0f}"]), "|", flush=True)
    if args.peer_python:
        print("\n| peer | history | its tell+ask ms | ours ms | ratio |\n|---|---|---|---|---|")
        for peer, history in ((p, h) for p, hs in PEERS.items() for h in hs if h in ours):
            theirs = peer_cost(args.peer_python, peer, history)
            cells = [f"{1e3 * theirs:.0f}", f"{1e3 * ours[history]:.0f}", f"{theirs / ours[history]:.1f}"]
            print("|", " | ".join([peer, str(history), *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
