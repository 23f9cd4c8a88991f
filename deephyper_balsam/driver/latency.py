"""How long Balsam's pipeline takes from a run's end to the start of the next one: measured while a search runs."""

from __future__ import annotations

from collections import deque

UNKNOWN_DELAY_S = 6.0
"""Taken until enough was seen; what a stock site was measured to take is 5 to 6 s."""

_LEAST_SEEN = 4
_KEPT = 200
_SHARE = 0.9  # of the trials are no slower than what is planned for


class PipelineLatency:
    """The delay that a backlog of waiting trials has to cover.

    It has two parts. A result takes its time to the driver: from the end of each run to when it was taken in. And a new
    trial takes its time to a node: only those tell it that were submitted while a place was free, for the others also
    waited for their turn. When the backlog is too small places become free, and the second part is measured again. The
    clocks of nodes and driver may differ: the two parts are off by as much, one up and one down.
    """

    def __init__(self) -> None:
        self._to_driver_s: deque[float] = deque(maxlen=_KEPT)
        self._to_node_s: deque[float] = deque(maxlen=_KEPT)
        self._into_free_places: set[int] = set()

    def submitted(self, numbers: list[int], free: int) -> None:
        """Note the numbers of trials that were submitted while `free` places were empty."""
        self._into_free_places.update(numbers[: max(0, free)])

    def ended(self, number: int, submitted_at: float, started_at: float, ended_at: float, gathered_at: float) -> None:
        """Note a trial whose result was taken in; times in seconds since the epoch."""
        self._to_driver_s.append(gathered_at - ended_at)
        if number in self._into_free_places:
            self._into_free_places.discard(number)
            self._to_node_s.append(started_at - submitted_at)

    @property
    def seconds(self) -> float:
        """Return the delay, seconds."""
        if min(len(self._to_driver_s), len(self._to_node_s)) < _LEAST_SEEN:
            return UNKNOWN_DELAY_S
        return max(0.0, _usual(self._to_driver_s) + _usual(self._to_node_s))


def _usual(seconds: deque[float]) -> float:
    return sorted(seconds)[int(_SHARE * (len(seconds) - 1))]
