"""Whose fault it was that a run ended without an objective, and what happens next.

| whose fault | what happened | what next |
|---|---|---|
| configuration | it raised, gave no number, exited, took longer than `eval_timeout` | FAILED, learnt, never again |
| machine | a signal killed it (out of memory?), or it left no result | once more, then FAILED |
| allocation | its time was over, or its launcher died | again in the next one, uncharged (FAILED after 3 whole ones) |
| application | the first trials all failed alike | the search ends with the traceback |

Pure functions and values; the table is the one in docs/howto.md.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from deephyper_balsam.common.wording import without_numbers

MAX_RETRIES = 1
"""How often a run that ended by the machine's fault is run again."""

DEFAULT_MAX_CUTS = 3
"""After so many cuts of a run that had the whole of each allocation, its trial is too long for them."""

DEFAULT_MAX_FAILURES = 5
"""When so many trials fail alike before any has an objective, the application is broken."""

GIVEN_BACK = "given back to the queue: the batch or the file system was away as the run ended"
"""What Balsam's log says of a run that starts again although its allocation goes on: it was not cut."""

_SUSPECT_AFTER = 3
_WHOLE_SHARE, _WHOLE_BUT_S, _LEAST_SHARE = 0.9, 150.0, 0.5  # see `had_the_whole`
_ENDED_FROM_OUTSIDE = ("SIGTERM", "SIGINT", "SIGHUP")


class Fault(str, Enum):
    """Whose fault an end without an objective is."""

    CONFIGURATION = "configuration"
    MACHINE = "machine"
    ALLOCATION = "allocation"


def of_outcome(outcome: Mapping[str, Any]) -> Fault | None:
    """Return whose fault an outcome is; None when it has an objective. Unless the outcome says, the configuration's."""
    if outcome.get("objective") is not None:
        return None
    try:
        return Fault(outcome.get("fault", Fault.CONFIGURATION))
    except ValueError:  # of a later version
        return Fault.CONFIGURATION


def runs_again(outcome: Mapping[str, Any], earlier_tries: int) -> bool:
    """Return whether a run that ended so is run once more, after `earlier_tries` that ended by the machine's fault."""
    return of_outcome(outcome) is Fault.MACHINE and earlier_tries < MAX_RETRIES


def signal_name(number: int) -> str:
    """Return the name of a signal: ``SIGKILL``; of a number that has none, ``signal 77``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def killed(number: int) -> str:
    """Return the reason of a run that a signal killed."""
    name = signal_name(number)
    hint = {"SIGKILL": " (out of memory?)", "SIGSEGV": " (a crash outside Python)", "SIGBUS": " (memory, or its file)"}
    if name in _ENDED_FROM_OUTSIDE:
        return f"killed by {name} (from outside)"
    return f"killed by {name}{hint.get(name, '')}"


def exit_status_said(status: int | None) -> str:
    """Return the reason of a run of which Balsam knows only the exit status; the shell says 128 + n for signal n."""
    if status is None:
        return "the run left no result"
    if status < 0:
        return killed(-status)
    if 128 < status <= 192:
        return killed(status - 128)
    return f"the run ended with status {status} before it left a result"


# --- a broken application --------------------------------------------------------------------------------------------


@dataclass
class BrokenApplication:
    """Watches the first results of a search: when they all fail alike, the fault is the application's.

    Attributes
    ----------
    limit
        How many; 0: never.
    """

    limit: int = DEFAULT_MAX_FAILURES
    _patterns: list[str] = field(default_factory=list)
    _settled: bool = False

    def settle(self) -> None:
        """Say that a trial has had an objective: the application works."""
        self._settled = True

    def sees(self, objective: float | None, failure: str | None) -> bool:
        """Take in one result; whether it makes the application a broken one."""
        if self._settled or not self.limit:
            return False
        if objective is not None:
            self._settled = True
            return False
        self._patterns.append(without_numbers(failure or ""))
        if len(self._patterns) < self.limit:
            return False
        self._settled = True  # said once; failures that differ are the configurations' own
        return len(set(self._patterns)) == 1


# --- nodes that fail what they get -----------------------------------------------------------------------------------


@dataclass
class Nodes:
    """What became of the runs on each node, to name one that fails everything it gets."""

    failed: Counter[str] = field(default_factory=Counter)
    worked: Counter[str] = field(default_factory=Counter)

    def add(self, host: str | None, fault: Fault | None) -> None:
        """Take in how a run on `host` ended."""
        if host and fault is Fault.MACHINE:
            self.failed[host] += 1
        elif host:
            self.worked[host] += 1

    def suspects(self) -> dict[str, int]:
        """Return the nodes with three failures of the machine or more and no other run, while others work: how many."""
        if not self.worked:
            return {}
        return {host: count for host, count in self.failed.items() if count >= _SUSPECT_AFTER and not self.worked[host]}


# --- runs that are longer than the allocations -----------------------------------------------------------------------


def had_the_whole(lasted_s: float, wall_time_s: float) -> bool:
    """Return whether a run that was cut after `lasted_s` seconds had an allocation to itself from its beginning.

    A launcher takes a while to start its first runs, and Balsam's own one ends two minutes early: so nine tenths less
    two and a half minutes count as the whole, and at least half of it must have been had.
    """
    return lasted_s >= max(_LEAST_SHARE * wall_time_s, _WHOLE_SHARE * wall_time_s - _WHOLE_BUT_S)


def is_too_long(cut_after_s: Iterable[float], wall_time_s: float, max_cuts: int = DEFAULT_MAX_CUTS) -> bool:
    """Return whether a run is longer than the allocations.

    Parameters
    ----------
    cut_after_s
        How long each of its runs had lasted when it was cut by the end of the allocation.
    wall_time_s
        The time of an allocation.
    max_cuts
        How many of them must have had a whole allocation.
    """
    return sum(had_the_whole(lasted_s, wall_time_s) for lasted_s in cut_after_s) >= max_cuts


def too_long(cuts: int, last_s: float, wall_time_s: float) -> str:
    """Return the reason of a trial that failed because its runs are longer than the allocations."""
    return (
        f"cut by the end of {cuts} allocations of {wall_time_s / 60:.0f} min, the last time after {last_s / 60:.1f} "
        "min: its runs are longer than an allocation (ask for a longer `wall_time_min`, --wall-time-min, or give an "
        "`eval_timeout`, --eval-timeout)"
    )
