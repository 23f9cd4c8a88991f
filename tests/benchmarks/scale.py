"""How busy one driver keeps up to 4096 simulated workers, its own computing charged to the clock.

Ackley in [-32.768, 32.768]^d, run times N(60 s, 20 s), 30 virtual minutes, one driver on one core: the setting in which
decentralised Bayesian optimisation was published with one manager a worker (Egele et al. 2023, arXiv:2207.00479).

    python -m tests.benchmarks.scale --workers 128 512 1024 4096 --dimensions 5
"""

from __future__ import annotations

import argparse
import resource
import time

from deephyper_balsam import HpProblem
from deephyper_balsam.driver.simulated_session import normal_durations
from deephyper_balsam.driver.simulation import simulate
from deephyper_balsam.node.targets import load_object
from deephyper_balsam.store.applications import resolve_run

# (dimension, workers) -> utilization and best value (minimised) as published
PUBLISHED = {
    (5, 128): (0.928, 4.18),
    (5, 512): (0.909, 3.50),
    (5, 1024): (0.893, 3.08),
    (5, 4096): (0.773, 2.81),
    (10, 4096): (0.659, None),
    (30, 4096): (0.486, None),
    (50, 4096): (0.296, None),
    (100, 4096): (0.147, None),
}


def problem(dimension: int) -> HpProblem:
    """Ackley's box."""
    made = HpProblem(f"ackley-{dimension}")
    for index in range(dimension):
        made.add_hyperparameter((-32.768, 32.768), f"x{index}")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run each setting once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[128, 512, 1024, 4096])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[5])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--method", default="ambs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="128 workers, 10 minutes")
    args = parser.parse_args(arguments)
    if args.quick:
        args.workers, args.minutes = [128], 10.0
    print(f"{'dim':>4} {'workers':>7} {'utilization':>11} {'published':>9} {'evaluations':>11} {'best':>9} "
          f"{'published':>9} {'manager s':>9} {'longest s':>9} {'real s':>7} {'peak MB':>7}")  # fmt: skip
    run = load_object(resolve_run("ackley")["target"])
    for dimension in args.dimensions:
        for workers in args.workers:
            began = time.perf_counter()
            report = simulate(
                problem(dimension),
                run,
                method=args.method,
                workers=workers,
                minutes=args.minutes,
                duration=normal_durations(60, 20, args.seed),
                seed=args.seed,
            )
            busy, best = PUBLISHED.get((dimension, workers), (None, None))
            print(
                f"{dimension:>4} {workers:>7} {report.utilization:>11.4f} {busy or '':>9} {report.evaluations:>11} "
                f"{-(report.best_objective or 0.0):>9.4f} {best or '':>9} {report.manager_seconds:>9.1f} "
                f"{report.longest_loop_seconds:>9.2f} {time.perf_counter() - began:>7.0f} "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:>7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
