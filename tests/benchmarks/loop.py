"""One search of one task by one optimizer, serial or with simulated workers; imports nothing of the package."""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

try:
    from tests.benchmarks.tasks import Task
except ImportError:  # in the peers' environment the folder itself is on the path
    from tasks import Task  # type: ignore[no-redef]


class Searcher(Protocol):
    """What the loop needs of an optimizer."""

    def ask(self, n: int) -> Sequence[tuple[Any, Mapping[str, Any]]]:
        """`n` pairs of a token and a configuration."""
        ...

    def tell(self, pairs: Sequence[tuple[Any, Mapping[str, Any], float | None]]) -> None:
        """Results as (token, configuration, loss); the loss of a failure is None."""
        ...


def run(searcher: Searcher, task: Task, *, seed: int, budget: int, workers: int = 1) -> dict[str, Any]:
    """Search `task` until `budget` results came back.

    With several workers each run takes a duration drawn from N(60 s, 20 s), at least 1 s, on a virtual clock; the
    optimizer is asked for as many configurations as workers became free at that moment.

    Returns
    -------
    dict
        ``losses`` in the order in which they came back (None for a failure), ``cpu_s`` spent in ask and tell, and
        ``distinct``, the number of different configurations.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(99,)))
    losses: list[float | None] = []
    seen: set[str] = set()
    running: list[tuple[float, int, Any, Mapping[str, Any]]] = []
    clock, order, spent, asked = 0.0, 0, 0.0, 0
    free = workers
    while len(losses) < budget:
        want = min(free, budget - asked)
        if want:
            start = time.process_time()
            trials = searcher.ask(want)
            spent += time.process_time() - start
            for token, config in trials:
                seen.add(repr(sorted(config.items())))
                duration = max(1.0, rng.normal(60.0, 20.0)) if workers > 1 else 1.0
                heapq.heappush(running, (clock + duration, order, token, config))
                order += 1
            asked += len(trials)  # fewer than wanted while a generation is not complete
            free -= len(trials)
        clock, _, token, config = heapq.heappop(running)
        loss = _evaluated(task, config)
        losses.append(loss)
        free += 1
        start = time.process_time()
        searcher.tell([(token, config, loss)])
        spent += time.process_time() - start
    return {"losses": losses, "cpu_s": spent, "distinct": len(seen)}


def _evaluated(task: Task, config: Mapping[str, Any]) -> float | None:
    try:
        return float(task.loss(config))
    except ArithmeticError:
        return None


def regret(result: Mapping[str, Any], task: Task, at: int) -> float:
    """Smallest loss of the first `at` results above the optimum."""
    good = [loss for loss in result["losses"][:at] if loss is not None]
    return (min(good) if good else float("inf")) - task.optimum
