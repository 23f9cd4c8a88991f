"""Clocks that nobody can set: seconds for durations, and moments that only go forward.

The time of day may be set forward or back while a search runs, by a person or by NTP. So durations are taken from a
clock that only goes forward, and goes on while a laptop sleeps. Moments are the server's at first, and that clock's
from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_AGREE_S = 2.0  # the server tells whole seconds: a local clock that agrees so far is the more exact one


def steady() -> float:
    """Return seconds of a clock that only goes forward; where the system has one, it also counts sleep."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


_EPOCH = time.time() - time.monotonic()


def moment() -> float:
    """Return the time (epoch) by a clock that goes only forward: one that is set during a run changes no duration."""
    return _EPOCH + time.monotonic()


class Moments:
    """Seconds since the epoch by the server's clock as it was first seen, and from then on only forward.

    Parameters
    ----------
    server_now
        Tells the server's time; asked once, at the first call.
    """

    def __init__(self, server_now: Callable[[], float]) -> None:
        self._server_now = server_now
        self._base: float | None = None

    def __call__(self) -> float:
        """Return the moment."""
        if self._base is None:
            local, server = time.time(), self._server_now()
            self._base = (local if abs(local - server) <= _AGREE_S else server) - steady()
        return self._base + steady()

    def not_before(self, moment: float) -> None:
        """Go on from `moment` if it is later than now: an earlier process has seen it already."""
        behind = moment - self()
        if behind > 0:
            self._base = (self._base or 0.0) + behind
