"""A run as a simulation knows it: evaluated once in full, and what it recorded replayed on the virtual clock."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deephyper_balsam.driver.in_memory import result_of
from deephyper_balsam.node.recording import Curve, Recorder
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.stoppers import Stopper
from deephyper_balsam.node.worker import RunFunction, evaluate
from deephyper_balsam.trial import Result, Trial

Duration = Callable[[Trial, Result], float]
"""Seconds that a whole run of a trial takes on its worker."""

SHORTEST_S = 1e-3


@dataclass(frozen=True)
class Record:
    """What a run recorded at one moment.

    Attributes
    ----------
    budget, value
        As given to ``job.record``; the value is maximised.
    took_s
        The real seconds from the run's beginning until then.
    asks
        Whether the run asked ``job.stopped()`` between this record and the next: else it cannot be stopped here.
    """

    budget: float
    value: float
    took_s: float
    asks: bool


Pace = Callable[[Trial, Sequence[Record], float], Sequence[float]]
"""Seconds from the beginning of a run to each of its records, from its trial, its records and its whole seconds."""


def by_budget(_trial: Trial, records: Sequence[Record], whole_s: float) -> Sequence[float]:
    """Return times of records that are in proportion to their budgets, the last at the end of the run."""
    last = max((record.budget for record in records), default=1.0)
    return [whole_s * record.budget / last for record in records]


def as_recorded(_trial: Trial, records: Sequence[Record], _whole_s: float) -> Sequence[float]:
    """Return the real times at which a run recorded here."""
    return [record.took_s for record in records]


class _Notes(Recorder):
    """Keeps every record and the time at which it was made."""

    def __init__(self, *, minimize: bool) -> None:
        super().__init__(minimize=minimize)
        self.records: list[Record] = []
        self._began = time.monotonic()

    def add(self, budget: float, objective: float) -> None:
        super().add(budget, objective)
        self.records.append(Record(budget, objective, time.monotonic() - self._began, asks=False))

    def stopped(self) -> bool:
        if self.records:
            self.records[-1] = replace(self.records[-1], asks=True)
        return False


@dataclass
class ReplayedRun:
    """One run of a trial on the virtual clock.

    Attributes
    ----------
    trial
        What it evaluates.
    whole
        How it ends if nobody stops it.
    records
        All that it records until then.
    seconds
        From its beginning to each record, and to its end: one more than there are records.
    rungs
        For each record the rung that it crosses, or None.
    position
        How many of its records were made.
    told_to_stop
        Whether it was decided at a rung that it ends: it does when it asks next.
    finishing
        Whether it goes on after it was stopped: nobody stops it again.
    started_at
        When it began, by the virtual clock.
    resumed_at, resumed_s
        When it last began or went on, and how many of its seconds it had behind it then.
    """

    trial: Trial
    whole: Result
    records: Sequence[Record]
    seconds: Sequence[float]
    rungs: Sequence[float | None]
    position: int = 0
    told_to_stop: bool = False
    finishing: bool = False
    started_at: float = 0.0
    resumed_at: float = 0.0
    resumed_s: float = 0.0
    curve: Curve = field(default_factory=Curve)

    @property
    def next_at(self) -> float:
        """When the next record is made, or the run ends, by the virtual clock."""
        return self.resumed_at + self.seconds[self.position] - self.resumed_s

    @property
    def end_at(self) -> float:
        """When it ends if nobody stops it."""
        return self.resumed_at + self.seconds[-1] - self.resumed_s

    @property
    def is_over(self) -> bool:
        """Whether all its records were made."""
        return self.position == len(self.records)

    @property
    def may_be_stopped(self) -> bool:
        """Whether somebody may still stop it: it asks, and there is a rung before its end."""
        if self.finishing:
            return False
        return self.told_to_stop or any(rung is not None for rung in self.rungs[self.position :])

    def begin(self, at: float) -> None:
        """Begin, at a time of the virtual clock."""
        self.started_at = self.resumed_at = at

    def go_on(self, at: float) -> None:
        """Go on from where it was stopped."""
        self.resumed_at, self.resumed_s = at, self.seconds[self.position - 1]
        self.finishing, self.told_to_stop = True, False

    def record(self) -> Record:
        """Make the next record."""
        record = self.records[self.position]
        self.position += 1
        self.curve.add(record.budget, record.value)
        return record

    def stopped_result(self, at: float) -> Result:
        """Return how it ended that was stopped at its last record."""
        return replace(
            self.whole,
            objective=self.records[self.position - 1].value,
            failure=None,
            traceback=None,
            metadata={},
            curve=tuple(self.curve.points),
            stopped=True,
            started_at=self.started_at,
            ended_at=at,
        )

    def whole_result(self, at: float) -> Result:
        """Return how it ended by itself."""
        return replace(self.whole, started_at=self.started_at, ended_at=at)


def replayed(
    run: RunFunction, trial: Trial, duration: Duration, pace: Pace, stopper: Stopper, *, minimize: bool
) -> ReplayedRun:
    """Evaluate a trial in full, telling it that nobody stops it, and return it ready to be replayed.

    Parameters
    ----------
    run
        The run function; what it does must not depend on whether it is stopped.
    trial
        Its trial.
    duration, pace
        How long it takes, and when it records.
    stopper
        By whose rungs it is compared.
    minimize
        Whether the run function returns, and records, a loss.
    """
    notes = _Notes(minimize=minimize)
    with tempfile.TemporaryDirectory(prefix="simulated-", ignore_cleanup_errors=True) as folder:
        outcome = evaluate(run, RunningJob(trial.number, trial.config, notes, Path(folder)), minimize=minimize)
    whole = result_of(trial.number, {**outcome, "host": "simulated"})
    records = notes.records
    whole_s = max(duration(trial, whole), SHORTEST_S)
    seconds: list[float] = []
    for one in pace(trial, records, whole_s):  # in order, and none after the end
        seconds.append(min(max(one, seconds[-1] if seconds else 0.0), whole_s))
    rungs: list[float | None] = []
    furthest: float | None = None
    for record in records:
        rungs.append(stopper.rung(furthest, record.budget))
        furthest = record.budget if furthest is None else max(furthest, record.budget)
    return ReplayedRun(trial, whole, records, [*seconds, whole_s], rungs)
