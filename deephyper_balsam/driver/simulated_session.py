"""Trials on workers of a virtual clock: plan a campaign, or measure an optimizer, without waiting for a node."""

from __future__ import annotations

import heapq
import math
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deephyper_balsam.driver.in_memory import InMemorySession
from deephyper_balsam.driver.session import Advice, Line, SearchHistory
from deephyper_balsam.driver.simulated_runs import Duration, Pace, ReplayedRun, by_budget, replayed
from deephyper_balsam.errors import SettingsError
from deephyper_balsam.node.stoppers import NEVER, Decision, Stopper
from deephyper_balsam.node.worker import RunFunction
from deephyper_balsam.store.trial_rows import NEVER_STARTED
from deephyper_balsam.trial import Result, Trial, TrialState

_SMOOTHING = 0.2


@dataclass
class VirtualClock:
    """Seconds since the simulation began."""

    now: float = 0.0

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += max(0.0, seconds)


def normal_durations(mean_s: float, std_s: float, seed: int) -> Duration:
    """Return durations from a normal distribution, at least a hundredth of its mean; drawn per (seed, trial number)."""
    if mean_s <= 0 or std_s < 0:
        raise SettingsError(f"`mean > 0` and `std >= 0` (seconds) must hold, but got (mean={mean_s}, std={std_s}).")

    def draw(trial: Trial, _result: Result) -> float:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, trial.number)))
        return max(float(rng.normal(mean_s, std_s)), mean_s / 100)

    return draw


def own_durations(_trial: Trial, result: Result) -> float:
    """Return the seconds that the run function really took here."""
    assert result.started_at is not None
    assert result.ended_at is not None
    return result.ended_at - result.started_at


class SimulatedEvaluator(InMemorySession):
    """Runs trials on workers of a virtual clock (contract: `deephyper_balsam.driver.session.SearchSession`).

    A worker that becomes free takes the oldest waiting trial at once. The run function is really called, when its trial
    begins; what it takes to compute does not count, its `duration` does. Time passes only in `wait` and `charge`.

    With a stopper the run function is still evaluated in full, once: what it recorded is then replayed on the clock,
    and at each rung it is decided from what all others had recorded there by that time. So it must not depend on
    whether it is stopped.

    Parameters
    ----------
    run
        The run function.
    num_workers
        How many trials run at once.
    clock
        The virtual clock.
    duration
        How long each trial takes in full.
    minimize
        Whether the run function returns a loss.
    stopper
        Decides which runs end early.
    finish_top
        Once as many trials as the search's `max_evals` were submitted, and no other can be stopped any more, so many of
        the stopped ones, the best, go on to their end.
    pace
        When a run records.

    Attributes
    ----------
    delay_s
        Seconds from a result to the next submission, as the driver's computing makes it; the backlog covers it.
    longest_s
        The longest that the driver computed between two waits.
    decisions
        What was decided at the rungs: trial number and decision, in the order of the clock.

    Raises
    ------
    SettingsError
        Without a worker, or when `finish_top` is negative.
    """

    def __init__(
        self,
        run: RunFunction,
        num_workers: int,
        clock: VirtualClock,
        duration: Duration,
        *,
        minimize: bool = False,
        stopper: Stopper = NEVER,
        finish_top: int = 0,
        pace: Pace = by_budget,
    ) -> None:
        super().__init__("simulated", num_workers, {"kind": "function", "name": "simulated"})
        if finish_top < 0:
            raise SettingsError(f"`finish_top >= 0` must hold, but got {finish_top}.")
        self._run = run
        self._minimize = minimize
        self._clock = clock
        self._duration, self._pace = duration, pace
        self._stopper, self._finish_top = stopper, finish_top
        self._to_finish = finish_top
        self._lines_as_stopped: dict[int, Line] = {}
        self._running: dict[int, ReplayedRun] = {}
        self._events: list[tuple[float, int]] = []  # when which running trial records next, or ends
        self._waiting: deque[Trial | ReplayedRun] = deque()
        self._stopped: dict[int, ReplayedRun] = {}
        self._at_rungs: dict[float, list[float]] = defaultdict(list)
        self._largest_budget: float | None = None
        self._news: list[Result] = []
        self._busy_s = 0.0
        self._ended = 0
        self._ended_s = 0.0
        self._ends_at = math.inf
        self._computed_s = 0.0
        self._submitted = False
        self.delay_s = 0.0
        self.longest_s = 0.0
        self.decisions: list[tuple[int, Decision]] = []

    def open(self, name: str, settings: dict[str, Any], **options: Any) -> SearchHistory:
        """Begin the search; nothing that ends after its `timeout_s` is collected."""
        history = super().open(name, settings, **options)
        self._to_finish = self._finish_top
        self._ends_at = math.inf if history.timeout_s is None else self._clock.now + history.timeout_s
        return history

    def now(self) -> float:
        """Return the virtual time."""
        return self._clock.now

    def moment(self) -> float:
        """Return the virtual time."""
        return self._clock.now

    @property
    def backlog(self) -> int:
        """What completes while the driver is busy (Little's law)."""
        if not self._ended:
            return 0
        mean_s = self._ended_s / self._ended
        return min(self._workers, math.ceil(self._workers * self.delay_s / mean_s))

    @property
    def room(self) -> int:
        """How many trials to submit now."""
        return max(0, self.capacity + self.backlog - len(self._running) - len(self._waiting))

    def submit(self, trials: Sequence[Trial]) -> None:
        """Start the trials on free workers; the others wait."""
        for trial in trials:
            if not self._put_new(trial):
                continue
            self._submitted = True
            if len(self._running) < self._workers:
                self._start(trial, self._clock.now)
            else:
                self._waiting.append(trial)

    def _start(self, what: Trial | ReplayedRun, at: float) -> None:
        """Give a worker a trial that waits, or a stopped run that goes on."""
        if isinstance(what, ReplayedRun):
            what.go_on(at)
        else:
            what = replayed(self._run, what, self._duration, self._pace, self._stopper, minimize=self._minimize)
            what.begin(at)
        self._running[what.trial.number] = what
        heapq.heappush(self._events, (what.next_at, what.trial.number))
        self._put_running(what.trial.number, what.started_at)

    def collect(self) -> list[Result]:
        """Return what has ended by now; workers that became free meanwhile took what waited."""
        while self._events and self._events[0][0] <= min(self._clock.now, self._ends_at):
            self._step()
        news, self._news = self._news, []
        return news

    # --- what happens on the clock -------------------------------------------------------------------------------

    def _step(self) -> None:
        """Let the next thing happen: a run records, or ends."""
        at, number = heapq.heappop(self._events)
        run = self._running[number]
        if run.is_over:
            self._end(run, at, run.whole_result(at))
            if run.records and run.whole.objective is not None:
                budgets = [record.budget for record in run.records]
                self._largest_budget = max(*budgets, self._largest_budget or 0.0)
            return
        rung, record = run.rungs[run.position], run.record()
        if rung is not None and not run.finishing:
            self._decide(run, rung, record.value)
        if run.told_to_stop and record.asks and at < run.end_at:
            self._stopped[number] = run
            self._end(run, at, run.stopped_result(at))
        else:
            heapq.heappush(self._events, (run.next_at, number))

    def _decide(self, run: ReplayedRun, rung: float, value: float) -> None:
        others = self._at_rungs[rung]
        standing = self._stopper.standing({rung: others}, self._largest_budget)
        decision = self._stopper.decide(rung, value, standing)
        others.append(value)
        self.decisions.append((run.trial.number, decision))
        run.told_to_stop = run.told_to_stop or decision.stop

    def _end(self, run: ReplayedRun, at: float, result: Result) -> None:
        """Take in how a run ended, and give its worker to what waits."""
        del self._running[run.trial.number]
        took_s = at - run.resumed_at
        self._busy_s += took_s
        self._ended += 1
        self._ended_s += took_s
        self._news.append(result)
        self._put_result(result)
        self._finish_the_best()
        while self._waiting and len(self._running) < self._workers:  # several, when stopped ones go on
            self._start(self._waiting.popleft(), at)

    def _finish_the_best(self) -> None:
        """Let the best stopped runs go on, once nothing else is to come and none that runs may still be stopped."""
        if not self._to_finish or not self._all_submitted or any(run.may_be_stopped for run in self._running.values()):
            return
        best = sorted(self._stopped.values(), key=lambda run: (-run.records[run.position - 1].value, run.trial.number))
        for run in best[: self._to_finish]:
            del self._stopped[run.trial.number]
            self._waiting.append(run)
            line = self._lines_as_stopped[run.trial.number] = self._table[run.trial.number]
            self._table.put({**line, "job_status": TrialState.READY.value})
        self._to_finish = 0  # once

    @property
    def _all_submitted(self) -> bool:
        max_evals, counts = self._budget[0], self.counts
        if max_evals is None or self._waiting:
            return False
        return sum(counts.values()) - counts[TrialState.CANCELLED] >= max_evals

    @property
    def num_stopped(self) -> int:
        """How many trials were stopped, and did not go on later."""
        return len(self._stopped)

    @property
    def saved_s(self) -> float:
        """The worker-seconds that the stopped trials would have taken to their end."""
        return sum(run.seconds[-1] - run.seconds[run.position - 1] for run in self._stopped.values())

    # --- the rest of the session ---------------------------------------------------------------------------------

    def cancel(self) -> list[int]:
        """Withdraw what waits."""
        withdrawn = [what.number for what in self._waiting if isinstance(what, Trial)]
        for run in self._waiting:
            if isinstance(run, ReplayedRun):  # it stays as it was stopped
                self._stopped[run.trial.number] = run
                self._table.put(self._lines_as_stopped[run.trial.number])
        self._waiting.clear()
        self._put_withdrawn(withdrawn, NEVER_STARTED)
        return withdrawn

    def charge(self, seconds: float) -> None:
        """Let the seconds pass that the driver computed, while the workers went on."""
        self._clock.advance(seconds)
        self._computed_s += seconds

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Let time pass until the next trial ends; none while the driver still has trials to submit."""
        self.longest_s = max(self.longest_s, self._computed_s)
        self.delay_s += _SMOOTHING * (self._computed_s - self.delay_s)
        self._computed_s = 0.0
        submitted, self._submitted = self._submitted, False
        if self._news or (submitted and self.room):
            return
        until = self._clock.now + seconds
        while self._events and not self._news:
            until = min(self._events[0][0], self._ends_at)
            self._clock.now = max(self._clock.now, until)
            if self._events[0][0] > self._ends_at:
                return
            self._step()
        self._clock.now = max(self._clock.now, min(until, self._ends_at))

    def busy_s(self, until_s: float) -> float:
        """Return the worker-seconds spent on trials up to a time of the clock."""
        return self._busy_s + sum(max(0.0, min(run.end_at, until_s) - run.resumed_at) for run in self._running.values())

    @property
    def advice(self) -> Advice:
        """What there is to say of a simulation."""
        return Advice("a simulation keeps nothing else", "a simulation keeps no output", "Simulate again.")
