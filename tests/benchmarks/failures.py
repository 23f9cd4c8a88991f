"""How many evaluations a region costs that always fails, and whether the optimum outside is found all the same.

A quarter of Hartmann-6 fails: where one coordinate lies in a quarter of its range, far from the optimum or beside it.

    python -m tests.benchmarks.failures --seeds 10
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tests.benchmarks.loop import regret, run
from tests.benchmarks.ours import Ours
from tests.benchmarks.tasks import TASKS, Task

OPTIMUM = (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573)
FREE = 50
"""Evaluations that may be spent on learning where it fails."""


def failing(coordinate: int, beside: bool) -> Task:
    """Hartmann-6 that fails in a quarter of one coordinate: beside its optimum, or far from it."""
    best = OPTIMUM[coordinate]
    low = (best + 0.02 if best < 0.5 else best - 0.27) if beside else (0.75 if best < 0.5 else 0.0)
    whole = TASKS["hartmann6"]

    def loss(config: Mapping[str, Any]) -> float:
        if low <= config[f"x{coordinate}"] < low + 0.25:
            raise ArithmeticError("it always fails here")
        return whole.loss(config)

    return replace(whole, name=f"x{coordinate} in [{low:.2f}, {low + 0.25:.2f})", loss=loss)


def main(arguments: list[str] | None = None) -> None:
    """Print a row a region and the share over all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(arguments)
    after = args.budget - FREE
    print(f"| it fails where | failed of the last {after}: median, most | regret: median, most |\n|---|---|---|")
    for coordinate, beside in ((0, False), (3, True), (5, True)):
        task = failing(coordinate, beside)
        counts, regrets = [], []
        for seed in range(args.seeds):
            searcher = Ours("ambs", task, seed, args.workers)
            result = run(searcher, task, seed=seed, budget=args.budget, workers=args.workers)
            counts.append(sum(loss is None for loss in result["losses"][FREE:]))
            regrets.append(regret(result, task, args.budget))
        row = [task.name, f"{np.median(counts):.0f}, {max(counts)}", f"{np.median(regrets):.2g}, {max(regrets):.2g}"]
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
