"""How many minutes a launcher must have left to start a run: from the time limit, or learnt from the runs so far.

The one lever that keeps Balsam's launchers from starting what the end of the allocation would cut is a job's
`wall_time_min`: a launcher takes only jobs that have no more than it has left itself. It counts whole minutes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

from deephyper_balsam.errors import InputError
from deephyper_balsam.launcher.wall_time import startable_min
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.gateway import WAITING_STATES, Gateway

logger = logging.getLogger(__name__)

START_S = 10.0
"""From a job's start in the launcher to the call of the run function, and from its end to the launcher's notice."""

MARGIN_MIN = 3
"""Balsam's MPI launcher ends two minutes before its allocation does, and rounds what it has left."""

_SHARE = 0.95  # of the runs fit into what is learnt
_SHORT_S = 15.0  # of runs as short as these a cut costs less than the minutes that launchers count in


def minutes_needed(longest_s: float, allocation_min: int | None) -> int:
    """Return the `wall_time_min` of a job whose run takes at most `longest_s` seconds.

    Parameters
    ----------
    longest_s
        How long the run takes at most.
    allocation_min
        The time of an allocation. In a short one there is no room for the margin that Balsam's own launcher needs; ours
        (`launcher.main`) needs none. None: unknown.
    """
    needed = math.ceil((longest_s + START_S) / 60)
    with_margin = needed + MARGIN_MIN
    if allocation_min is not None and 4 * with_margin > 3 * allocation_min:
        return needed
    return with_margin


def check_fits(asked_min: int, eval_timeout_s: float | None, allocation_min: int) -> None:
    """Refuse minutes or a time limit that no allocation can hold: its trials would wait for ever.

    Raises
    ------
    InputError
        The message says how long the allocation must be.
    """
    needed = asked_min or (0 if eval_timeout_s is None else minutes_needed(eval_timeout_s, allocation_min))
    if needed > startable_min(allocation_min, START_S):
        what = f"{asked_min} min (`wall_time_min`)" if asked_min else f"{eval_timeout_s:g} s"
        raise InputError(
            f"An evaluation may take {what}, and an allocation has {allocation_min} min: no launcher would ever start "
            f"one. Ask for a `wall_time_min` of {needed + MARGIN_MIN} or more (--wall-time-min {needed + MARGIN_MIN}), "
            "or give a shorter `eval_timeout` (--eval-timeout)."
        )


def longest_usual_s(durations_s: Sequence[float]) -> float | None:
    """Return how long all but one in twenty of the runs so far took at most; None before the first has ended."""
    if not durations_s:
        return None
    ordered = sorted(durations_s)
    return ordered[min(len(ordered) - 1, math.ceil(_SHARE * len(ordered)) - 1)]


class StartLimit:
    """The `wall_time_min` of the jobs of one search.

    Parameters
    ----------
    asked_min
        What the user asked for; 0: nothing, so it is derived.
    eval_timeout_s
        The time limit of a run, if there is one.
    """

    def __init__(self, asked_min: int, eval_timeout_s: float | None) -> None:
        self._asked_min, self._eval_timeout_s = asked_min, eval_timeout_s
        self.learnt_s: float | None = None
        self.minutes = self._applied_min = asked_min

    def update(self, durations_s: Sequence[float], wall_time_s: float | None) -> bool:
        """Learn from the runs so far; whether jobs that wait have other `minutes` (see `applied`)."""
        self.learnt_s = longest_usual_s(durations_s)
        if self._asked_min:
            return False
        allocation_min = None if wall_time_s is None else round(wall_time_s / 60)
        if self._eval_timeout_s is not None:
            self.minutes = minutes_needed(self._eval_timeout_s, allocation_min)
        elif self.learnt_s is not None and self.learnt_s >= _SHORT_S:
            minutes = minutes_needed(self.learnt_s, allocation_min)
            # Longer than the allocations: then it is better to try than to wait for ever
            fits = allocation_min is None or minutes <= startable_min(allocation_min, START_S)
            self.minutes = minutes if fits else 0
        return self.minutes != self._applied_min

    def applied(self) -> None:
        """Say that jobs that wait have these `minutes` now."""
        self._applied_min = self.minutes

    @property
    def needed_s(self) -> float:
        """How long a run may usually take, as far as is known."""
        return 60.0 * self.minutes or self.learnt_s or 0.0


def apply(gateway: Gateway, search: str, app_ids: Iterable[int], minutes: int) -> None:
    """Give the jobs of a search that wait at a site another `wall_time_min`, but those that were made with their own.

    Parameters
    ----------
    gateway
        Balsam's API.
    search
        The search's name.
    app_ids
        The applications of the site.
    minutes
        The new `wall_time_min`.
    """
    apps = set(app_ids)
    waiting = [
        row["id"]
        for row in gateway.jobs(trial_rows.trial_tags(search), states=WAITING_STATES)
        if row["app_id"] in apps and row["wall_time_min"] != minutes and not trial_data.has_own_minutes(row)
    ]
    gateway.limit_jobs(waiting, minutes)
    logger.info("A launcher with fewer than %d min left starts no run any more", minutes)
