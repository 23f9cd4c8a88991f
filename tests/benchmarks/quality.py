"""Regret of our optimizers and of peers on the same tasks, seeds and budgets, as ratios and mean ranks.

Every search that was run is kept as one line of ``--store``, and is not run again; the table is made from the store.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from tests.benchmarks.loop import run
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
TUNED_ON = ("ackley5", "levy5", "rosenbrock4", "hartmann6", "wine_mlp", "diabetes_gbm", "diabetes_svm", "conditional")
"""Tasks on which defaults were chosen, with seeds from 100 on; reports use seeds from 0 on and mark these tasks."""

FIELDS = ("name", "task", "seed", "budget", "workers", "half", "full", "cpu_s", "distinct")
"""Columns of a store: `half` and `full` are the smallest losses at half and at full budget, inf if all failed."""

Key = tuple[str, str, int, int, int]


@dataclass(frozen=True)
class Score:
    """What is kept of one search: smallest losses at half and at full budget, processor seconds, configurations."""

    half: float
    full: float
    cpu_s: float
    distinct: int

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Score:
        """What is kept of what `loop.run` returned."""
        losses = [math.inf if loss is None else loss for loss in result["losses"]]
        return cls(min(losses[: len(losses) // 2]), min(losses), round(result["cpu_s"], 2), result["distinct"])


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


def load(store: Path) -> dict[Key, Score]:
    """What was run before."""
    if not store.exists():
        return {}
    with store.open(encoding="utf-8", newline="") as lines:
        return {
            (row["name"], row["task"], int(row["seed"]), int(row["budget"]), int(row["workers"])): Score(
                float(row["half"]), float(row["full"]), float(row["cpu_s"]), int(row["distinct"])
            )
            for row in csv.DictReader(lines)
        }


def keep(store: Path, key: Key, score: Score) -> None:
    """Add one search to the store, at once, so that a long comparison can be stopped and continued."""
    new = not store.exists()
    with store.open("a", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        if new:
            writer.writerow(FIELDS)
        writer.writerow([*key, *astuple(score)])


def table(results: dict[Key, Score], names: list[str], workers: int, budget: int, seeds: Iterable[int]) -> str:
    """Markdown: median regret with quartiles at half / full budget and processor seconds, a row a task; mean ranks."""
    seeds = list(seeds)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    ranks: list[Any] = []
    for task in TASKS:
        rows = {}
        for name in names:
            got = [results.get((name, task, seed, budget, workers)) for seed in seeds]
            if all(score is not None for score in got):
                optimum = TASKS[task].optimum
                rows[name] = np.array([[s.half - optimum, s.full - optimum, s.cpu_s] for s in got if s is not None])
        if len(rows) < 2:
            continue
        medians = {name: np.median(values, axis=0) for name, values in rows.items()}
        best = np.min([middle[:2] for middle in medians.values()], axis=0)
        cells = [_cell(rows.get(name), best) for name in names]
        lines.append(f"| {task}{'*' if task in TUNED_ON else ''} | " + " | ".join(cells) + " |")
        if set(rows) == set(names):
            at = [np.array([rows[name][:, k] for name in names]).round(12) for k in (0, 1)]
            ranks.append([rankdata(values, axis=0).mean(axis=1) for values in at])
    if ranks:
        mean = np.mean(ranks, axis=0)
        cells = [f"{half:.2f} / {full:.2f}" for half, full in mean.T]
        lines.append(f"| mean rank over {len(ranks)} tasks | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Any, best: Any) -> str:
    if values is None:
        return ""
    parts = []
    for k in range(2):
        low, middle, high = np.quantile(values[:, k], [0.25, 0.5, 0.75])
        shown = f"**{middle:.3g}**" if middle <= best[k] else f"{middle:.3g}"
        parts.append(f"{shown} [{low:.2g}, {high:.2g}]")
    return f"{' / '.join(parts)}, {values[:, 2].mean():.1f} s"


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
    parser.add_argument(
        "--store", type=Path, default=Path("benchmark-quality.csv"), help="searches run before; continued"
    )
    parser.add_argument("--table", action="store_true", help="print the table of what is in the store, and run nothing")
    parser.add_argument("--quick", action="store_true", help="two seeds of three cheap tasks")
    args = parser.parse_args(arguments)
    if args.quick:
        args.tasks, args.seeds, args.budget = ["branin", "mixed", "diabetes_svm"], 2, 60
    results = load(args.store)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for workers in args.workers:
        wanted = itertools.product(seeds, args.tasks, args.names)
        for key in ((name, task, seed, args.budget, workers) for seed, task, name in wanted):
            if key not in results and not args.table:
                results[key] = Score.of(searched(*key, args.peer_python))
                keep(args.store, key, results[key])
                print(".", end="", file=sys.stderr, flush=True)
        print(f"\n{workers} workers, {args.budget} evaluations, {len(seeds)} seeds: ", end="")
        print("regret at half / full budget (median [quartiles]), processor seconds\n")
        print(table(results, args.names, workers, args.budget, seeds))


if __name__ == "__main__":
    main()
