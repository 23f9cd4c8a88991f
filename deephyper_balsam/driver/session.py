"""The seam between the loop and whatever evaluates: a session in which one driver has one search."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from deephyper_balsam.node.failure_policy import DEFAULT_MAX_CUTS, DEFAULT_MAX_FAILURES
from deephyper_balsam.store.driver_requests import DriverRequest
from deephyper_balsam.trial import Result, Trial, TrialState

Line = dict[str, Any]
"""A trial in `results.csv`: column -> value."""


@dataclass(frozen=True)
class SearchHistory:
    """A search as its driver finds it: new, or begun before.

    Attributes
    ----------
    settings
        What it is, as written when it was begun: ``problem``, ``method``, ``options``, ``seed``, ``num_workers``, and
        ``max_evals`` and ``warm_start`` where it has them.
    trials
        Every trial, by number.
    results
        The results that a driver took in, in the order in which it did.
    withdrawn
        The numbers of trials that were withdrawn before they ran.
    requests
        What people asked of it, answered or not; the oldest first.
    max_evals, timeout_s
        Its budget now: as planned, given, and extended; None: no limit.
    drove_s
        How long earlier drivers drove it, seconds.
    """

    settings: Mapping[str, Any]
    trials: list[Trial]
    results: list[Result]
    withdrawn: list[int]
    requests: list[DriverRequest]
    max_evals: int | None
    timeout_s: float | None
    drove_s: float


@dataclass(frozen=True)
class FailureLimits:
    """When failures are taken for more than the fault of their configurations.

    Attributes
    ----------
    max_failures
        When so many trials, the first of a driver, all fail alike, the application is broken; 0: never.
    max_cuts
        After so many cuts of a run that had the whole of an allocation, its trial fails; 0: never.
    """

    max_failures: int = DEFAULT_MAX_FAILURES
    max_cuts: int = DEFAULT_MAX_CUTS


DEFAULT_LIMITS = FailureLimits()


@dataclass(frozen=True)
class Advice:
    """What the loop tells people to do, in the words of where the trials run.

    Attributes
    ----------
    files_are_copies
        What is lost with the files in the search's folder, and what to do.
    where_runs_print
        Where to read what a trial's run printed.
    to_go_on
        How to go on with a search that was interrupted.
    """

    files_are_copies: str
    where_runs_print: str
    to_go_on: str


@runtime_checkable
class SearchSession(Protocol):
    """Runs the trials of one search somewhere, for one driver at a time, and hands back their results.

    Contract
    --------
    - `open` comes first, `close` or `abandon` last; then `open` may be called again, for this search or another.
    - `submit` returns when the trials are safely recorded; it never waits for a run. Submitting no trials does nothing.
      A trial that was submitted before is not run twice.
    - `collect` returns each result exactly once, in the order in which they became known, and never waits: it returns
      an empty list when nothing new has ended. Results come in any order; a trial that was cancelled has none.
    - `cancel` withdraws trials that did not start and returns their numbers; a running trial goes on.
    - `counts`, `lines` and `line` show every trial of the search as it was at the last call of one of those three.
    - After an error raised by any of them nothing is lost: the same call may be made again. `UnreachableError` and
      `NotLoggedInError` say that trying again later helps; `TakenOverError` that only `abandon` may follow.
    """

    @property
    def settings(self) -> dict[str, Any]:
        """What the session adds to the settings of its searches, ``run`` (the spec of the run function) among it."""
        ...

    # --- the beginning and the end

    def begun(self, name: str, folder: Path) -> bool:
        """Return whether a search of this name was begun before; `folder` is where its files are."""
        ...

    def open(
        self,
        name: str,
        settings: dict[str, Any],
        *,
        max_evals: int | None = None,
        timeout_s: float | None = None,
        asked_for: Mapping[str, Any] | None = None,
        takeover: bool = False,
        folder: Path | None = None,
        limits: FailureLimits = DEFAULT_LIMITS,
    ) -> SearchHistory:
        """Begin the search `name`, or pick it up where it stands, as its only driver.

        Parameters
        ----------
        name
            The search's name.
        settings
            What the search is; one that was begun before must have been begun with the same. A ``seed`` of None accepts
            the seed it was begun with, or draws one.
        max_evals, timeout_s
            The budget that this driver is given; None for both: that of the search as it stands.
        asked_for
            In what words the search was asked for.
        takeover
            The driver that there is, is gone.
        folder
            Where the search's files are; None: nowhere.
        limits
            When failures are taken for more than the fault of their configurations.

        Raises
        ------
        SearchExistsError
            The name belongs to another search, or to one that cannot go on.
        SearchRunningError
            Another driver is at work.
        """
        ...

    def close(self, why: str = "it was closed", *, leave_running: bool = False) -> None:
        """Let go of what the session holds, in order; it may be called twice.

        Parameters
        ----------
        why
            Why the driver ends.
        leave_running
            Trials that run may go on, where a later driver can find their results.
        """
        ...

    def abandon(self, why: str) -> None:
        """Let go of the search and touch nothing else: another driver has it, or it could not be begun."""
        ...

    # --- trials

    @property
    def capacity(self) -> int:
        """How many trials can run at this moment; it may change at any time, and be 0."""
        ...

    @property
    def room(self) -> int:
        """How many trials to submit now, so that a free place finds its next run at once."""
        ...

    @property
    def counts(self) -> dict[TrialState, int]:
        """How many trials are in each state."""
        ...

    @property
    def lines(self) -> list[Line]:
        """The lines of `results.csv`, by trial number."""
        ...

    def line(self, number: int | None) -> Line:
        """Return the line of `results.csv` of one trial."""
        ...

    def take_changed_lines(self) -> list[Line]:
        """Return the lines of `results.csv` that changed since the last call."""
        ...

    def submit(self, trials: Sequence[Trial]) -> None:
        """Record the trials to be run."""
        ...

    def collect(self) -> list[Result]:
        """Return the results that became known since the last call."""
        ...

    def cancel(self) -> list[int]:
        """Withdraw every trial that has not started; their numbers."""
        ...

    # --- all that is done between two looks

    def requests(self) -> list[DriverRequest]:
        """Give a sign of life, now and then; what people asked of the search since the last call.

        Raises
        ------
        TakenOverError
            Another driver has taken over.
        """
        ...

    def answer(self, request: DriverRequest, did: str, **details: Any) -> None:
        """Write down what became of a request."""
        ...

    def upkeep(self) -> list[int]:
        """Mend what others did to the trials, tidy up, now and then; the numbers of trials that were withdrawn so."""
        ...

    def ensure_allocation(self, evaluations: int | None = None, seconds: float | None = None) -> None:
        """Ask for something to run on where it is wanted and the session may ask.

        Parameters
        ----------
        evaluations, seconds
            What is left of the search's budgets; None: no limit.
        """
        ...

    @property
    def hopeless(self) -> str | None:
        """Why no trial of this search can end with a result where it runs; None: some may. It changes in `collect`."""
        ...

    @property
    def notice(self) -> str | None:
        """What a person should know of where the trials run, if there is something."""
        ...

    @property
    def advice(self) -> Advice:
        """What to tell people of the search that is open."""
        ...

    # --- time, and when a call was of no avail

    def now(self) -> float:
        """Return the time in seconds by a clock that only goes forward; its zero is anywhere."""
        ...

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Let up to so many seconds pass: until `stop` is set, or there is something to collect."""
        ...

    def hurry(self, hurried: bool = True) -> None:
        """Let calls give up soon from now on: somebody waits for the end. False: as before. Safe in signal handlers."""
        ...

    def reconnect(self) -> None:
        """Find anew whom the session talks to, before a call is made again that was of no avail."""
        ...

    def note_outage(self, lasted_s: float, why: str) -> None:
        """Keep for people that calls were of no avail for so many seconds until now."""
        ...
