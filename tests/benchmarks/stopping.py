"""Early discarding on real learning curves: which share of the node-hours reaches what the full search finds.

The curves are those of scan-bench's vision-language models (`pip install --no-deps scan-bench==0.2.3`,
vlm/data.csv): 455 configurations that were planned for 8 to 10 epochs, with the seconds of each epoch. A suggestion is
evaluated as the nearest configuration of the table. Everything runs on the virtual clock, and the driver's computing is
not charged.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deephyper_balsam import HpProblem
from deephyper_balsam.driver.loop import Driver, SearchPlan, StopSignals
from deephyper_balsam.driver.session import FailureLimits
from deephyper_balsam.driver.simulated_runs import Record
from deephyper_balsam.driver.simulated_session import SimulatedEvaluator, VirtualClock
from deephyper_balsam.node.stoppers import parse_stopper
from deephyper_balsam.optimizers import make_optimizer, stopped
from deephyper_balsam.store.search_state import Budget
from deephyper_balsam.trial import Result, Trial

REAL = {
    "beta1": (0.9, 0.99),
    "beta2": (0.95, 0.999),
    "eps": (1e-8, 1e-6, "log-uniform"),
    "lr": (1e-5, 5e-2, "log-uniform"),
    "warmup_fraction": (7e-4, 0.75),
    "wd": (1e-6, 0.2, "log-uniform"),
}
WIDTHS = (32, 64, 128, 192, 256, 320, 384, 448, 512)
CHOICES = {"text_width": WIDTHS, "vision_width": WIDTHS, "global_batch_size": (4096, 8192), "total_epochs": (8, 9, 10)}
Array = np.ndarray[Any, np.dtype[np.float64]]
DIVERGED = 5.0
"""The loss that the table gives to a run that diverged."""


@dataclass(frozen=True)
class Curve:
    """Losses after each epoch, and the seconds that each took."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]


def _last(before: Array, after: Array, values: Array) -> Array:
    return values


def _shift(before: Array, after: Array, values: Array) -> Array:
    return np.asarray(values + np.median(after - before))


def _quantile(before: Array, after: Array, values: Array) -> Array:
    every = np.sort(np.concatenate([before, values]))
    share = (np.searchsorted(every, values) + 0.5) / len(every)
    return np.asarray(np.quantile(after, share))


RULES = {"line": stopped.extrapolated, "last": _last, "shift": _shift, "quantile": _quantile}
"""What a stopped run is learnt as, from those that went on."""


class Table:
    """The learning curves, and which of them is nearest to a configuration."""

    def __init__(self, path: Path, least_epochs: int = 8) -> None:
        rows: dict[str, list[dict[str, str]]] = defaultdict(list)
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if float(row["total_epochs"]) >= least_epochs:
                    rows[row["config_id"]].append(row)
        self.curves, points = [], []
        for one in rows.values():
            one.sort(key=lambda row: float(row["epoch"]))
            losses = [_number(row["val_loss"], DIVERGED) for row in one]
            known = [_number(row["train_duration(s)"], math.nan) for row in one]
            usual = statistics.median([value for value in known if value > 60] or [1000.0])
            self.curves.append(Curve(tuple(losses), tuple(value if value > 0 else usual for value in known)))
            points.append(self._point({name: float(one[0][name]) for name in (*REAL, *CHOICES)}))
        self._points = np.array(points)

    def problem(self) -> HpProblem:
        """Return the space of the table."""
        problem = HpProblem("vlm", minimize=True)
        for name, given in REAL.items():
            problem.add_hyperparameter(given, name)
        for name, choices in CHOICES.items():
            problem.add_hyperparameter(list(choices), name)
        return problem

    def nearest(self, config: Mapping[str, Any]) -> Curve:
        """Return the curve of the nearest configuration."""
        return self.curves[int(np.argmin(((self._points - self._point(config)) ** 2).sum(axis=1)))]

    def _point(self, config: Mapping[str, Any]) -> list[float]:
        point = []
        for name, (low, high, *scale) in REAL.items():
            value = float(config[name])
            if scale:
                value, low, high = math.log(value), math.log(low), math.log(high)
            point.append((value - low) / (high - low))
        for name, choices in CHOICES.items():
            point.append([float(one) for one in choices].index(float(config[name])) / (len(choices) - 1))
        return point


class Made:
    """Curves made from a smooth function of six values in [0, 1] (hartmann), or one with ripples (rough).

    A run comes near its final loss exponentially, at a rate that the last value sets: good ones may begin slowly. There
    is noise, which fades with the epochs.
    """

    EPOCHS = 9

    def __init__(self, name: str) -> None:
        self._name = name

    def problem(self) -> HpProblem:
        """Return the space."""
        problem = HpProblem(self._name, minimize=True)
        for i in range(6):
            problem.add_hyperparameter((0.0, 1.0), f"x{i}")
        return problem

    def nearest(self, config: Mapping[str, Any]) -> Curve:
        """Return the curve of a configuration."""
        x = np.array([config[f"x{i}"] for i in range(6)])
        if self._name == "hartmann":
            final = 3.32 - float(HARTMANN_ALPHA @ np.exp(-(HARTMANN_A * (x - HARTMANN_P) ** 2).sum(axis=1)))
        else:
            final = 4.0 * float(((x - 0.3) ** 2).sum()) + 0.3 * float(np.abs(np.sin(9 * x)).sum())
        epochs = np.arange(1, self.EPOCHS + 1)
        rng = np.random.default_rng(int(x.sum() * 1e9) % 2**32)
        losses = final + 2.0 * np.exp(-(0.35 + 1.2 * x[5]) * epochs)
        losses += rng.normal(0.0, 0.05, self.EPOCHS) * np.exp(-epochs / 6)
        losses[-1] = final + rng.normal(0.0, 0.01)
        return Curve(tuple(losses), (600.0,) * self.EPOCHS)


# Hartmann-6 (Picheny et al. 2013), as in tasks.py
HARTMANN_ALPHA = np.array([1.0, 1.2, 3.0, 3.2])
HARTMANN_A = np.array(
    [
        [10, 3, 17, 3.5, 1.7, 8],
        [0.05, 10, 17, 0.1, 8, 14],
        [3, 3.5, 1.7, 10, 17, 8],
        [17, 8, 0.05, 10, 0.1, 14],
    ]
)
HARTMANN_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def _number(text: str, otherwise: float) -> float:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else otherwise


@dataclass(frozen=True)
class Outcome:
    """What a search came to: node-hours spent when each run ended to its end, with the best final loss until then."""

    spent_h: float
    steps: Sequence[tuple[float, float]]
    stopped: int

    def at(self, hours: float) -> float:
        """Return the best final loss after so many node-hours."""
        return min((loss for spent, loss in self.steps if spent <= hours), default=math.inf)

    def reaches(self, loss: float) -> float:
        """Return the node-hours after which a loss was reached."""
        return next((spent for spent, best in self.steps if best <= loss), math.inf)


def search(
    table: Table | Made, method: str, text: str, finish_top: int, workers: int, evaluations: int, seed: int
) -> Outcome:
    """Search on the virtual clock until so many evaluations were begun and have ended."""

    def run(job: Any) -> float:
        for epoch, loss in enumerate(table.nearest(job).losses, 1):
            job.record(epoch, loss)
            if job.stopped():
                break
        return float(job.objective)

    def duration(trial: Trial, _result: Result) -> float:
        return sum(table.nearest(trial.config).seconds)

    def pace(trial: Trial, _records: Sequence[Record], _whole_s: float) -> Sequence[float]:
        return list(np.cumsum(table.nearest(trial.config).seconds))

    problem, clock = table.problem(), VirtualClock()
    session = SimulatedEvaluator(
        run,
        workers,
        clock,
        duration,
        minimize=True,
        stopper=parse_stopper(text),
        finish_top=finish_top,
        pace=pace,
    )
    options = {"max_evals": evaluations} if method == "ambs" else {}
    optimizer = make_optimizer(method, problem, seed=seed, num_workers=workers, **options)
    plan = SearchPlan(problem, "bench", method, seed, limits=FailureLimits(max_failures=0))
    steps: list[tuple[float, float]] = []

    collect = session.collect

    def watched() -> list[Result]:
        arrived = collect()
        for result in arrived:
            if not result.stopped and result.objective is not None:
                best = min(steps[-1][1] if steps else math.inf, -result.objective)
                steps.append((session.busy_s(clock.now) / 3600, best))
        return arrived

    session.collect = watched  # type: ignore[method-assign]
    Driver(plan, session, StopSignals(), make=lambda _plan, _settings: optimizer).drive(Budget(evaluations, None), None)
    return Outcome(session.busy_s(clock.now) / 3600, steps, session.num_stopped)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="vlm/data.csv; default: of the package that is installed")
    parser.add_argument("--curves", choices=["vlm", "hartmann", "rough"], default="vlm", help="of which task")
    parser.add_argument("--methods", nargs="+", default=["ambs", "random"])
    parser.add_argument("--workers", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[256], help="one a number of workers, or for all")
    parser.add_argument("--stoppers", nargs="+", default=["sha:max=10", "epoch:1+10"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--rules", nargs="+", default=["line"], choices=RULES, help="what the model learns of a stopped run"
    )
    parser.add_argument("--store", type=Path, help="keeps searches, a line each, and does not run them again")
    given = parser.parse_args(arguments)
    table = Table(given.data or installed()) if given.curves == "vlm" else Made(given.curves)
    store = Store(given.store, given.curves)
    evaluations = given.evaluations * (len(given.workers) if len(given.evaluations) == 1 else 1)
    print(
        "| method | workers | evaluations | stopper | model | node-hours | reached after | found | at .27 | stopped |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method in given.methods:
        for workers, budget in zip(given.workers, evaluations, strict=True):
            seeds = range(given.first_seed, given.first_seed + given.seeds)
            full = {seed: store.search(table, method, "none", "last", workers, budget, seed) for seed in seeds}
            for text in given.stoppers:
                for rule in given.rules if method != "random" else ["-"]:
                    shares, reached, losses, early, count = [], [], [], [], []
                    for seed in seeds:
                        one, all_h = store.search(table, method, text, rule, workers, budget, seed), full[seed].spent_h
                        wanted = full[seed].at(all_h / 2)
                        shares.append(one.spent_h / all_h)
                        reached.append(one.reaches(wanted) / all_h)
                        losses.append(one.steps[-1][1] - full[seed].steps[-1][1])
                        early.append(one.at(0.27 * all_h) - wanted)
                        count.append(one.stopped)
                    inside = sum(share <= 0.27 for share in reached)
                    cells = [method, workers, budget, text, rule, _middle(shares)]
                    cells += [f"{_middle(reached)}, {inside}/{len(seeds)} by .27", _middle(losses), _middle(early)]
                    print(f"| {' | '.join(map(str, cells))} | {statistics.median(count):.0f} |", flush=True)
    return 0


def _middle(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(np.array(values), [0.25, 0.5, 0.75], method="nearest")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


class Store:
    """Searches that were made, kept in a file if there is one."""

    def __init__(self, path: Path | None, curves: str = "vlm") -> None:
        self._path, self._curves = path, curves
        self._kept: dict[str, Outcome] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                said = json.loads(line)
                key = said.pop("key")
                self._kept[key] = Outcome(**said)

    def search(
        self, table: Table | Made, method: str, text: str, rule: str, workers: int, evaluations: int, seed: int
    ) -> Outcome:
        """Return what a search came to, made now if it was not before."""
        key = json.dumps(
            [*([] if self._curves == "vlm" else [self._curves]), method, text, rule, workers, evaluations, seed]
        )
        if key not in self._kept:
            stopper, _, finish = text.partition("+")
            if rule != "-":
                stopped.extrapolated = RULES[rule]
            began = time.monotonic()
            found = search(table, method, stopper, int(finish or 0), workers, evaluations, seed)
            print(f"{key}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            self._kept[key] = found
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    steps = [step for i, step in enumerate(found.steps) if not i or step[1] < found.steps[i - 1][1]]
                    said = {"spent_h": found.spent_h, "steps": steps, "stopped": found.stopped}
                    file.write(json.dumps({"key": key, **said}) + "\n")
        return self._kept[key]


def installed() -> Path:
    """Return the table of the package that is installed."""
    spec = importlib.util.find_spec("scan_bench")
    if spec is None or spec.origin is None:
        raise SystemExit("scan-bench is not installed: pip install --no-deps scan-bench==0.2.3, or give --data")
    return Path(spec.origin).parent / "vlm" / "data.csv"


if __name__ == "__main__":
    sys.exit(main())
