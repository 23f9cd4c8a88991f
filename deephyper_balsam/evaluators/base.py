"""The seam between the driver and whatever runs the trials: submit and collect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from deephyper_balsam.trial import Result, Trial

EXHAUSTED = "every configuration of the space has been evaluated"
"""Why a driver left that had nothing more to evaluate, whatever the budget."""


@runtime_checkable
class Evaluator(Protocol):
    """Runs trials somewhere and hands back their results.

    Contract
    --------
    - `submit` returns when the trials are safely recorded; it never waits for a run. Submitting no trials does nothing.
    - `collect` returns each result exactly once, in the order in which they became known, and never waits: it returns
      an empty list when nothing new has ended. Results come in any order; a trial that was cancelled has none.
    - `capacity` is how many trials can run at this moment; it may change at any time, and be 0.
    - `backlog` is how many more should wait beside the running ones, so that a free node finds its next run at once.
    - `room` is how many to submit now: capacity and backlog, less what is under way where it can go on.
    - `cancel` withdraws trials that did not start and returns their numbers; a running trial goes on.
    - After an error raised by any of them nothing is lost: the same call may be made again.
    """

    @property
    def capacity(self) -> int:
        """How many trials can run at this moment."""
        ...

    @property
    def backlog(self) -> int:
        """How many more trials should wait in the queue."""
        ...

    @property
    def room(self) -> int:
        """How many trials to submit now."""
        ...

    def submit(self, trials: Sequence[Trial]) -> None:
        """Record the trials to be run."""
        ...

    def collect(self) -> list[Result]:
        """Results that became known since the last call."""
        ...

    def cancel(self) -> list[int]:
        """Withdraw every trial that has not started; their numbers."""
        ...

    def close(self) -> None:
        """Let go of what the evaluator holds. Trials that run go on."""
        ...
