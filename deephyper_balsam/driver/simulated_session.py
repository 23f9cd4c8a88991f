"""Trials on workers of a virtual clock: plan a campaign, or measure an optimizer, without waiting for a node."""

from __future__ import annotations

import heapq
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deephyper_balsam.driver.in_memory import InMemorySession, result_of
from deephyper_balsam.driver.session import Advice, SearchHistory
from deephyper_balsam.errors import SettingsError
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.worker import RunFunction, evaluate
from deephyper_balsam.store.trial_rows import NEVER_STARTED
from deephyper_balsam.trial import Result, Trial

Duration = Callable[[Trial, Result], float]
"""Seconds that a trial takes on its worker."""

_SHORTEST_S = 1e-3
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


@dataclass(order=True)
class _Run:
    end: float
    number: int
    start: float = field(compare=False)
    result: Result = field(compare=False)


class SimulatedEvaluator(InMemorySession):
    """Runs trials on workers of a virtual clock (contract: `deephyper_balsam.driver.session.SearchSession`).

    A worker that becomes free takes the oldest waiting trial at once. The run function is really called, when its trial
    begins; what it takes to compute does not count, its `duration` does. Time passes only in `wait` and `charge`.

    Parameters
    ----------
    run
        The run function.
    num_workers
        How many trials run at once.
    clock
        The virtual clock.
    duration
        How long each trial takes.
    minimize
        Whether the run function returns a loss.

    Attributes
    ----------
    delay_s
        Seconds from a result to the next submission, as the driver's computing makes it; the backlog covers it.
    longest_s
        The longest that the driver computed between two waits.

    Raises
    ------
    SettingsError
        Without a worker.
    """

    def __init__(
        self,
        run: RunFunction,
        num_workers: int,
        clock: VirtualClock,
        duration: Duration,
        *,
        minimize: bool = False,
    ) -> None:
        super().__init__("simulated", num_workers, {"kind": "function", "name": "simulated"})
        self._run = run
        self._minimize = minimize
        self._clock = clock
        self._duration = duration
        self._running: list[_Run] = []
        self._waiting: deque[Trial] = deque()
        self._busy_s = 0.0
        self._ended = 0
        self._ended_s = 0.0
        self._ends_at = math.inf
        self._computed_s = 0.0
        self._submitted = False
        self.delay_s = 0.0
        self.longest_s = 0.0

    def open(self, name: str, settings: dict[str, Any], **options: Any) -> SearchHistory:
        """Begin the search; nothing that ends after its `timeout_s` is collected."""
        history = super().open(name, settings, **options)
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

    def _start(self, trial: Trial, at: float) -> None:
        outcome = evaluate(self._run, RunningJob(trial.number, trial.config), minimize=self._minimize)
        result = result_of(trial.number, {**outcome, "host": "simulated"})
        end = at + max(self._duration(trial, result), _SHORTEST_S)
        result = replace(result, started_at=at, ended_at=end)
        heapq.heappush(self._running, _Run(end, trial.number, at, result))
        self._put_running(trial.number, at)

    def collect(self) -> list[Result]:
        """Return what has ended by now; workers that became free meanwhile took what waited."""
        results = []
        while self._running and self._running[0].end <= min(self._clock.now, self._ends_at):
            ended = heapq.heappop(self._running)
            results.append(ended.result)
            self._put_result(ended.result)
            self._busy_s += ended.end - ended.start
            self._ended += 1
            self._ended_s += ended.end - ended.start
            if self._waiting:
                self._start(self._waiting.popleft(), ended.end)
        return results

    def cancel(self) -> list[int]:
        """Withdraw what waits."""
        withdrawn = [trial.number for trial in self._waiting]
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
        if submitted and self.room:
            return
        until = self._running[0].end if self._running else self._clock.now + seconds
        self._clock.now = max(self._clock.now, min(until, self._ends_at))

    def busy_s(self, until_s: float) -> float:
        """Return the worker-seconds spent on trials up to a time of the clock."""
        return self._busy_s + sum(max(0.0, min(run.end, until_s) - run.start) for run in self._running)

    @property
    def advice(self) -> Advice:
        """What there is to say of a simulation."""
        return Advice("a simulation keeps nothing else", "a simulation keeps no output", "Simulate again.")
