"""Trials on workers of a virtual clock: plan a campaign, or measure an optimizer, without waiting for a node."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.trial import Result, Trial
from deephyper_balsam.worker import RunFunction, RunningJob, evaluate

Duration = Callable[[Trial, Result], float]
"""Seconds that a trial takes on its worker."""

_SHORTEST_S = 1e-3


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


class SimulatedEvaluator:
    """Runs trials on `num_workers` workers of a virtual clock (contract: `deephyper_balsam.evaluators.base.Evaluator`).

    A worker that becomes free takes the oldest waiting trial at once. The run function is really called, when its trial
    begins; what it takes to compute does not count, its `duration` does.

    Parameters
    ----------
    run
        The run function.
    num_workers
        How many trials run at once.
    clock
        The virtual clock; whoever drives the simulation advances it.
    duration
        How long each trial takes.
    """

    def __init__(self, run: RunFunction, num_workers: int, clock: VirtualClock, duration: Duration) -> None:
        if num_workers < 1:
            raise SettingsError(f"`num_workers >= 1` must hold, but got {num_workers}.")
        self._run = run
        self._workers = num_workers
        self._clock = clock
        self._duration = duration
        self._running: list[_Run] = []
        self._waiting: deque[Trial] = deque()
        self._known: set[int] = set()
        self._busy_s = 0.0
        self._ended = 0
        self._ended_s = 0.0
        self.delay_s = 0.0
        """Seconds from a result to the next submission, as measured by the driver; the backlog covers it."""

    @property
    def capacity(self) -> int:
        """The number of workers."""
        return self._workers

    @property
    def backlog(self) -> int:
        """What completes while the driver is busy (Little's law)."""
        if not self._ended:
            return 0
        mean_s = self._ended_s / self._ended
        return min(self._workers, math.ceil(self._workers * self.delay_s / mean_s))

    @property
    def under_way(self) -> int:
        """Trials that run or wait."""
        return len(self._running) + len(self._waiting)

    @property
    def room(self) -> int:
        """How many trials to submit now."""
        return max(0, self.capacity + self.backlog - self.under_way)

    def submit(self, trials: Sequence[Trial]) -> None:
        """Start the trials on free workers; the others wait."""
        for trial in trials:
            if trial.number in self._known:
                continue  # the same call made again after an error
            self._known.add(trial.number)
            if len(self._running) < self._workers:
                self._start(trial, self._clock.now)
            else:
                self._waiting.append(trial)

    def _start(self, trial: Trial, at: float) -> None:
        outcome = evaluate(self._run, RunningJob(trial.number, trial.config))
        result = Result(
            trial.number,
            outcome["objective"],
            failure=outcome["failure"],
            traceback=outcome.get("traceback"),
            started_at=outcome["start"],
            ended_at=outcome["end"],
            host="simulated",
            metadata=outcome["metadata"],
        )
        end = at + max(self._duration(trial, result), _SHORTEST_S)
        result = replace(result, started_at=at, ended_at=end)
        heapq.heappush(self._running, _Run(end, trial.number, at, result))

    def collect(self) -> list[Result]:
        """Return what has ended by now; workers that became free meanwhile took what waited."""
        results = []
        while self._running and self._running[0].end <= self._clock.now:
            ended = heapq.heappop(self._running)
            results.append(ended.result)
            self._busy_s += ended.end - ended.start
            self._ended += 1
            self._ended_s += ended.end - ended.start
            if self._waiting:
                self._start(self._waiting.popleft(), ended.end)
        return results

    def next_end(self) -> float:
        """Return when the next running trial ends; infinity when none runs."""
        return self._running[0].end if self._running else math.inf

    def busy_s(self, horizon_s: float) -> float:
        """Return the worker-seconds spent on trials up to `horizon_s`."""
        return self._busy_s + sum(max(0.0, min(run.end, horizon_s) - run.start) for run in self._running)

    def cancel(self) -> list[int]:
        """Withdraw what waits."""
        withdrawn = [trial.number for trial in self._waiting]
        self._waiting.clear()
        return withdrawn

    def close(self) -> None:
        """Nothing is held."""
