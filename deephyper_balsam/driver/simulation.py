"""A whole search on a virtual clock, with the driver's real computing charged to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from deephyper_balsam.common.objective import turned
from deephyper_balsam.driver.loop import Driver, SearchPlan, StopSignals
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.session import FailureLimits
from deephyper_balsam.driver.simulated_runs import Duration, Pace, by_budget
from deephyper_balsam.driver.simulated_session import SimulatedEvaluator, VirtualClock
from deephyper_balsam.errors import SettingsError
from deephyper_balsam.node.stoppers import NEVER, Stopper, parse_stopper
from deephyper_balsam.node.worker import RunFunction
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.optimizers.base import Optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results import table as results
from deephyper_balsam.store.search_state import Budget
from deephyper_balsam.trial import Config, Result, Trial, TrialState


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
        The best trial that ended within the time, or None; the objective is maximised.
    manager_seconds
        Real seconds the driver computed, all charged to the clock; `tell_seconds` and `ask_seconds` are its parts.
    longest_loop_seconds
        The longest the workers' results waited for the driver.
    workers, minutes, minimize
        What was simulated; whether smaller is better.
    stopped
        Trials that a stopper ended early and that did not go on later.
    worker_hours, worker_hours_saved
        What the trials took, and what the stopped ones would have taken besides to their end.
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
    minimize: bool = False
    stopped: int = 0
    worker_hours: float = 0.0
    worker_hours_saved: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; with `best_loss` where smaller is better."""
        return {**asdict(self), **({"best_loss": self.best_loss} if self.minimize else {})}

    @property
    def best_loss(self) -> float | None:
        """What the best run returned, where smaller is better."""
        return None if self.best_objective is None else turned(self.best_objective, True)


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
    stopper: Stopper | str = NEVER,
    finish_top: int = 0,
    pace: Pace = by_budget,
    **options: Any,
) -> SimulationReport:
    """Search for `minutes` of virtual time on `workers` workers.

    The driver is one process on one core: every second it computes, model fits included, passes on the virtual clock
    before its next suggestions start. While it computes, workers that become free find the backlog.

    Parameters
    ----------
    problem
        What is searched.
    run
        The run function; it is really called.
    method
        ``"ambs"``, ``"random"`` or ``"ga"``.
    workers
        How many trials run at once.
    minutes
        Virtual minutes.
    duration
        How long each trial takes (`normal_durations`, `own_durations`).
    seed
        Of the optimizer.
    max_evals
        Ends the simulation earlier.
    timer
        Seconds that the driver computes.
    on_progress
        Called in every loop with the virtual minutes passed and the evaluations so far.
    stopper
        Decides which runs end early, of those that record and ask (``job.record``, ``job.stopped``): a stopper, or its
        text (`node.stoppers.parse_stopper`).
    finish_top
        So many stopped trials, the best, go on to their end once `max_evals` trials were submitted.
    pace
        When a run records: `by_budget`, or `as_recorded` for the real times.
    options
        Of the method.

    Raises
    ------
    SettingsError
        When a value is out of range, or the method or an option is unknown.

    Returns
    -------
    SimulationReport
        What it came to.
    """
    if minutes <= 0:
        raise SettingsError(f"`minutes > 0` must hold, but got {minutes}.")
    stopper = parse_stopper(stopper) if isinstance(stopper, str) else stopper
    if finish_top and (stopper == NEVER or max_evals is None):
        raise SettingsError(
            "`finish_top` (--finish-top) lets stopped trials go on near the end of the evaluations: give `stopper` "
            f"(--stopper) and `max_evals` (--max-evals), too; got (finish_top={finish_top}, "
            f"stopper={stopper.to_text()}, max_evals={max_evals})."
        )
    clock = VirtualClock()
    session = SimulatedEvaluator(
        run,
        workers,
        clock,
        duration,
        minimize=problem.minimize,
        stopper=stopper,
        finish_top=finish_top,
        pace=pace,
    )
    made = _Charged(make_optimizer(method, problem, seed=seed, num_workers=workers, **options), session, timer)
    plan = SearchPlan(problem, "simulation", method, seed, options, limits=FailureLimits(max_failures=0))
    signals = StopSignals()
    driver = Driver(plan, session, signals, make=lambda _plan, _settings: cast("Optimizer", made))

    def tell(progress: Progress) -> None:
        if on_progress is not None:
            on_progress(clock.now / 60, progress.evaluated)

    driver.drive(Budget(max_evals, 60.0 * minutes), tell)
    if signals.stop.is_set():  # Ctrl-C
        raise KeyboardInterrupt
    return _report(session, made, workers, minutes, min(clock.now, 60.0 * minutes), problem.minimize)


class _Charged:
    """An optimizer whose computing passes on the clock of a simulation."""

    def __init__(self, optimizer: Optimizer, session: SimulatedEvaluator, timer: Callable[[], float]) -> None:
        self._optimizer, self._session, self._timer = optimizer, session, timer
        self.tell_s = self.ask_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def tell(self, results: Sequence[Result]) -> None:
        began = self._timer()
        self._optimizer.tell(results)
        took_s = self._timer() - began
        self.tell_s += took_s
        self._session.charge(took_s)

    def ask(self, count: int) -> list[Trial]:
        began = self._timer()
        trials = self._optimizer.ask(count)
        took_s = self._timer() - began
        self.ask_s += took_s
        self._session.charge(took_s)
        return trials


def _report(
    session: SimulatedEvaluator, made: _Charged, workers: int, minutes: float, span_s: float, minimize: bool
) -> SimulationReport:
    counts, best = session.counts, results.best(session.lines)
    return SimulationReport(
        utilization=session.busy_s(span_s) / (workers * span_s) if span_s else 0.0,
        evaluations=counts[TrialState.DONE] + counts[TrialState.FAILED],
        failures=counts[TrialState.FAILED],
        best_objective=None if best is None else best["objective"],
        best_config=None if best is None else results.configuration(best),
        manager_seconds=made.tell_s + made.ask_s,
        tell_seconds=made.tell_s,
        ask_seconds=made.ask_s,
        longest_loop_seconds=session.longest_s,
        workers=workers,
        minutes=minutes,
        minimize=minimize,
        stopped=session.num_stopped,
        worker_hours=session.busy_s(span_s) / 3600,
        worker_hours_saved=session.saved_s / 3600,
    )
