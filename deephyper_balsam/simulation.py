"""A whole search on a virtual clock, with the driver's real computing charged to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.evaluators.simulated import Duration, SimulatedEvaluator, VirtualClock
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem import HpProblem
from deephyper_balsam.trial import Config
from deephyper_balsam.worker import RunFunction

_SMOOTHING = 0.2


@dataclass(frozen=True)
class SimulationReport:
    """What a simulated search came to.

    Attributes
    ----------
    utilization
        Share of the workers' time spent on trials, from 0 to 1.
    evaluations, failures
        Trials that ended within the time, and how many of them failed.
    best_objective, best_config
        The best trial that ended within the time, or None.
    manager_seconds
        Real seconds the driver computed, all charged to the clock; `tell_seconds` and `ask_seconds` are its parts.
    longest_loop_seconds
        The longest the workers' results waited for the driver.
    workers, minutes
        What was simulated.
    """

    utilization: float
    evaluations: int
    failures: int
    best_objective: float | None
    best_config: Config | None
    manager_seconds: float
    tell_seconds: float
    ask_seconds: float
    longest_loop_seconds: float
    workers: int
    minutes: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def simulate(
    problem: HpProblem,
    run: RunFunction,
    *,
    method: str = "ambs",
    workers: int,
    minutes: float,
    duration: Duration,
    seed: int = 0,
    max_evals: int | None = None,
    timer: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[float, int], None] | None = None,
    **options: Any,
) -> SimulationReport:
    """Search for `minutes` of virtual time on `workers` workers.

    The driver is one process on one core: every second it computes, model fits included, passes on the virtual clock
    before its next suggestions start. While it computes, workers that become free find the backlog.

    Parameters
    ----------
    duration
        How long each trial takes (`normal_durations`, `own_durations`).
    max_evals
        Ends the simulation earlier.
    on_progress
        Called in every loop with the virtual minutes passed and the evaluations so far.
    options
        Of the method.

    Raises
    ------
    SettingsError
        When a value is out of range, or the method or an option is unknown.
    """
    if minutes <= 0:
        raise SettingsError(f"`minutes > 0` must hold, but got {minutes}.")
    horizon_s = 60.0 * minutes
    clock = VirtualClock()
    evaluator = SimulatedEvaluator(run, workers, clock, duration)
    optimizer = make_optimizer(method, problem, seed=seed, num_workers=workers, **options)
    configs: dict[int, Config] = {}
    best_objective: float | None = None
    best_config: Config | None = None
    evaluations = failures = asked = 0
    tell_s = ask_s = longest_s = 0.0

    while True:
        arrived = [result for result in evaluator.collect() if (result.ended_at or 0.0) <= horizon_s]
        for result in arrived:
            evaluations += 1
            assert result.number is not None
            config = configs.pop(result.number)
            if result.objective is None:
                failures += 1
            elif best_objective is None or result.objective > best_objective:
                best_objective, best_config = result.objective, config
        if clock.now >= horizon_s or (max_evals is not None and evaluations >= max_evals):
            break
        if on_progress is not None:
            on_progress(clock.now / 60, evaluations)
        began = timer()
        if arrived:
            optimizer.tell(arrived)
        told = timer()
        wanted = evaluator.room
        if max_evals is not None:
            wanted = min(wanted, max_evals - asked)
        trials = optimizer.ask(wanted) if wanted > 0 else []
        answered = timer()
        tell_s, ask_s = tell_s + told - began, ask_s + answered - told
        longest_s = max(longest_s, answered - began)
        clock.advance(answered - began)
        evaluator.delay_s += _SMOOTHING * (answered - began - evaluator.delay_s)
        asked += len(trials)
        configs.update((trial.number, trial.config) for trial in trials)
        evaluator.submit(trials)
        if not evaluator.under_way:
            break  # every configuration of the space was evaluated
        clock.now = max(clock.now, min(evaluator.next_end(), horizon_s))

    optimizer.close()
    span_s = min(clock.now, horizon_s)
    return SimulationReport(
        utilization=evaluator.busy_s(span_s) / (workers * span_s) if span_s else 0.0,
        evaluations=evaluations,
        failures=failures,
        best_objective=best_objective,
        best_config=best_config,
        manager_seconds=tell_s + ask_s,
        tell_seconds=tell_s,
        ask_seconds=ask_s,
        longest_loop_seconds=longest_s,
        workers=workers,
        minutes=minutes,
    )
