"""The genetic algorithm against random search: Ackley-5D, 2000 evaluations.

python -m tests.benchmarks.genetic --seeds 10
"""

from __future__ import annotations

import argparse

import numpy as np

from tests.benchmarks.loop import regret, run
from tests.benchmarks.ours import Ours
from tests.benchmarks.tasks import TASKS


def main(arguments: list[str] | None = None) -> None:
    """Print the median best loss of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=50)
    args = parser.parse_args(arguments)
    task, medians = TASKS["ackley5"], {}
    for method in ("ga", "random"):
        best = []
        for seed in range(args.seeds):
            searcher = Ours(method, task, seed, args.workers)
            best.append(
                regret(run(searcher, task, seed=seed, budget=args.budget, workers=args.workers), task, args.budget)
            )
        medians[method] = float(np.median(best))
        print(f"{method}: median {medians[method]:.3g}, from {min(best):.3g} to {max(best):.3g}", flush=True)
    print(f"random / ga: {medians['random'] / medians['ga']:.3g}")


if __name__ == "__main__":
    main()
