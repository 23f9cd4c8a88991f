"""Regret of our optimizers and of peers on the same tasks, seeds and budgets, as ratios and mean ranks.

Every search that was run is kept as one line of ``--store``, and is not run again; the table is made from the store.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from tests.benchmarks.loop import regret, run
from tests.benchmarks.ours import Ours
from tests.benchmarks.tasks import TASKS

HERE = Path(__file__).parent
OURS: dict[str, dict[str, Any]] = {
    "ambs": {"method": "ambs"},
    "ambs_rf": {"method": "ambs", "surrogate": "RF"},
    "ambs_et": {"method": "ambs", "surrogate": "ET"},
    "ambs_ei": {"method": "ambs", "acq_func": "EI"},
    "random": {"method": "random"},
    "ga": {"method": "ga"},
}
TUNED_ON = ("ackley5", "levy5", "rosenbrock4", "hartmann6", "wine_mlp", "diabetes_gbm", "diabetes_svm")
"""Tasks on which defaults were chosen, with seeds from 100 on; reports use seeds from 0 on and mark these tasks."""

Key = tuple[str, str, int, int, int]


def searched(name: str, task: str, seed: int, budget: int, workers: int, peer_python: str | None) -> dict[str, Any]:
    """Run one search, ours in this process or a peer in its own environment."""
    if name in OURS:
        options = dict(OURS[name])
        searcher = Ours(options.pop("method"), TASKS[task], seed, workers, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(searcher, TASKS[task], seed=seed, budget=budget, workers=workers)
    if peer_python is None:
        raise SystemExit(
            f"{name!r} is not one of {', '.join(OURS)}, and peers need --peer-python PATH (see README.md)."
        )
    command = [peer_python, str(HERE / "peers.py"), name, task, str(seed), str(budget), str(workers)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def load(store: Path) -> dict[Key, dict[str, Any]]:
    """What was run before."""
    found: dict[Key, dict[str, Any]] = {}
    if store.exists():
        for line in store.read_text().splitlines():
            entry = json.loads(line)
            found[tuple(entry["key"])] = entry["result"]  # type: ignore[index]
    return found


def table(results: dict[Key, dict[str, Any]], names: list[str], workers: int, budget: int, seeds: Iterable[int]) -> str:
    """Median regret and quartiles at half and full budget, the ratio to the first name's, and mean ranks."""
    lines, ranks, seeds = [], [], list(seeds)
    for task in TASKS:
        rows = {}
        for name in names:
            got = [results.get((name, task, seed, budget, workers)) for seed in seeds]
            if all(r is not None for r in got):
                rows[name] = np.array([[regret(r, TASKS[task], at) for at in (budget // 2, budget)] for r in got if r])
        if len(rows) < 2:
            continue
        mark = " (tuned on)" if task in TUNED_ON else ""
        lines.append(f"\n{task}{mark}, {workers} workers, {len(seeds)} seeds")
        for name, values in rows.items():
            cells = []
            for k in range(2):
                low, middle, high = np.quantile(values[:, k], [0.25, 0.5, 0.75])
                first = float(np.median(rows[next(iter(rows))][:, k]))
                cells.append(f"{middle:10.3g} [{low:.3g}, {high:.3g}] x{middle / first if first else np.inf:.3g}")
            cpu = np.mean([results[name, task, seed, budget, workers]["cpu_s"] for seed in seeds])
            lines.append(f"  {name:20s} {cells[0]:38s} {cells[1]:38s} cpu {cpu:.1f} s")
        if set(rows) == set(names):
            both = [
                rankdata(np.array([rows[name][:, k] for name in names]).round(12), axis=0).mean(axis=1) for k in (0, 1)
            ]
            ranks.append(both)
    if ranks:
        mean = np.mean(ranks, axis=0)
        lines.append(f"\nMean rank over {len(ranks)} tasks, {workers} workers: half budget, full budget")
        lines += [f"  {name:20s} {mean[0][i]:.2f}  {mean[1][i]:.2f}" for i, name in enumerate(names)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--names", nargs="+", default=["ambs", "ambs_rf", "random"], help="ours, or peers of peers.py")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--peer-python", help="interpreter of the peers' environment")
    parser.add_argument("--store", type=Path, default=Path("benchmark-quality.jsonl"))
    parser.add_argument("--quick", action="store_true", help="two seeds of three cheap tasks")
    args = parser.parse_args(arguments)
    if args.quick:
        args.tasks, args.seeds, args.budget = ["branin", "mixed", "diabetes_svm"], 2, 60
    results = load(args.store)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for workers in args.workers:
        for seed in seeds:
            for task in args.tasks:
                for name in args.names:
                    key = (name, task, seed, args.budget, workers)
                    if key in results:
                        continue
                    results[key] = searched(*key, args.peer_python)
                    with args.store.open("a") as out:
                        out.write(json.dumps({"key": key, "result": results[key]}) + "\n")
                    print(".", end="", file=sys.stderr, flush=True)
        print(table(results, args.names, workers, args.budget, seeds))


if __name__ == "__main__":
    main()
