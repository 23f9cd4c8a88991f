"""Which acquisition function chooses the next trial, by what the trials of each were worth."""

from __future__ import annotations

import bisect
import math

from deephyper_balsam.optimizers.acquisition import HEDGED


class Hedge:
    """Chooses among acquisition functions by what each one's trials were worth (Exp3, Auer et al. 2002, after GP-Hedge,
    Hoffman et al. 2011).

    A trial is worth the share of earlier objectives that it beats. The gains after each result are kept, so that the
    choice made for any past trial can be found again from the results told before it.
    """

    _RATE = 0.2

    def __init__(self) -> None:
        self._gains: list[tuple[float, ...]] = [(0.0,) * len(HEDGED)]
        self._sorted: list[float] = []

    def _probabilities(self, told: int) -> list[float]:
        gains = self._gains[min(told, len(self._gains) - 1)]
        top = max(gains)
        weights = [math.exp(self._RATE * (gain - top)) for gain in gains]
        total = sum(weights)
        return [0.9 * weight / total + 0.1 / len(weights) for weight in weights]

    def arm(self, told: int, draw: float) -> int:
        """The acquisition function for a trial asked after `told` results, by a uniform `draw`."""
        for index, probability in enumerate(self._probabilities(told)):
            draw -= probability
            if draw < 0:
                return index
        return len(HEDGED) - 1

    def learn(self, told: int | None, draw: float | None, objective: float) -> None:
        """Count one result; `told` and `draw` are those of its trial, None for a point from elsewhere."""
        worth = 0.0
        if not math.isnan(objective):
            place = bisect.bisect_left(self._sorted, objective)
            worth = place / len(self._sorted) if self._sorted else 0.0
            self._sorted.insert(place, objective)
        gains = list(self._gains[-1])
        if told is not None and draw is not None:
            arm = self.arm(told, draw)
            gains[arm] += worth / self._probabilities(told)[arm] / len(HEDGED)
        self._gains.append(tuple(gains))
