"""What a run that was stopped early would have reached: what an optimizer learns in the place of its last value.

A stopped value is not a final one: after one epoch of nine the best is worse than the worst is after all nine, and a
model that took both as they are would learn from how far a run got, not from its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

MOST_POINTS = 32
"""Points of a curve that an optimizer keeps."""

_MOST_LEVELS = 16
"""At no more budgets are stopped runs compared with those that went on."""
_FEW = 3
"""With fewer runs that went on no slope is fitted."""
_STEEPEST = 20.0
_SLACK = 1e-9


@dataclass(frozen=True)
class Curves:
    """What the runs of a history recorded, in the order told.

    Attributes
    ----------
    budgets, values
        Shape (n, `MOST_POINTS`), by budget; behind the last point of a run infinity, and NaN.
    stopped
        Which runs were stopped early, shape (n,).
    """

    budgets: FloatArray
    values: FloatArray
    stopped: BoolArray

    def first(self, n: int) -> Curves:
        """Return the first `n`."""
        return Curves(self.budgets[:n], self.values[:n], self.stopped[:n])

    @property
    def last_budgets(self) -> FloatArray:
        """The budget that each run used, shape (n,); 0 for one that recorded nothing."""
        reached: FloatArray = np.where(np.isfinite(self.budgets), self.budgets, 0.0).max(axis=1, initial=0.0)
        return reached

    def at(self, budget: float) -> FloatArray:
        """Return the value of each run at a budget, shape (n,), between its points in a straight line.

        Before the first point it is the first value; NaN for a run that did not get there.
        """
        n = len(self.budgets)
        after = (self.budgets < budget * (1 - _SLACK)).sum(axis=1)  # the first point that is not before
        here = np.minimum(after, MOST_POINTS - 1)
        before = np.maximum(here - 1, 0)
        rows = np.arange(n)
        low, high = self.budgets[rows, before], self.budgets[rows, here]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(high > low, np.clip((budget - low) / (high - low), 0.0, 1.0), 1.0)
        value = self.values[rows, before] * (1 - share) + self.values[rows, here] * share
        return np.asarray(np.where(np.isfinite(high) & (after < MOST_POINTS), value, np.nan))


def thinned(curve: Any) -> tuple[FloatArray, FloatArray]:
    """Return the budgets and values of a curve that an optimizer keeps, evenly by the logarithm of the budget.

    Parameters
    ----------
    curve
        Pairs of budget and value, by budget.
    """
    points = np.array([(budget, value) for budget, value in curve], dtype=np.float64).reshape(-1, 2)
    if len(points) > MOST_POINTS:
        wanted = np.geomspace(max(points[0, 0], points[-1, 0] * _SLACK), points[-1, 0], MOST_POINTS)
        kept = np.unique(np.searchsorted(points[:, 0], wanted * (1 - _SLACK)))
        points = points[np.minimum(kept, len(points) - 1)]
    budgets, values = np.full(MOST_POINTS, np.inf), np.full(MOST_POINTS, np.nan)
    budgets[: len(points)], values[: len(points)] = points.T
    return budgets, values


def grown_curves(curves: Curves | None, size: int) -> Curves:
    """Return curves of `size` runs, the given ones first; the others recorded nothing."""
    budgets, values = np.full((size, MOST_POINTS), np.inf), np.full((size, MOST_POINTS), np.nan)
    stopped = np.zeros(size, dtype=np.bool_)
    if curves is not None:
        n = len(curves.stopped)
        budgets[:n], values[:n], stopped[:n] = curves.budgets, curves.values, curves.stopped
    return Curves(budgets, values, stopped)


def finals(objectives: FloatArray, curves: Curves | None) -> FloatArray:
    """Return what each run reached, or would have: those that were stopped are extrapolated from those that went on.

    From the largest budget at which some were stopped down to the smallest, a straight line is fitted from the values
    of the runs that went on from there to what they reached, or would have. A function of its arguments alone.

    Parameters
    ----------
    objectives
        What was told, maximised, shape (n,); NaN for a failure.
    curves
        What was recorded; None: nothing was.

    Returns
    -------
    FloatArray
        Shape (n,); the same where nothing was stopped.
    """
    if curves is None:
        return objectives
    stopped = curves.stopped & ~np.isnan(objectives)
    if not stopped.any():
        return objectives
    reached = objectives.copy()
    last = curves.last_budgets
    level_of = _levels(last, stopped)
    for level in np.unique(level_of[stopped])[::-1]:
        here = stopped & (level_of == level)
        values = curves.at(float(level))
        went_on = ~here & (last > level * (1 + _SLACK)) & ~np.isnan(values) & ~np.isnan(reached)
        went_on &= ~stopped | (level_of > level)
        if went_on.any():
            reached[here] = extrapolated(values[went_on], reached[went_on], values[here])
    return reached


def _levels(last: FloatArray, stopped: BoolArray) -> FloatArray:
    """Return for each stopped run the budget at which it is compared: its last, or one of few a little before."""
    budgets = np.unique(last[stopped])
    if len(budgets) > _MOST_LEVELS:
        budgets = np.unique(budgets[np.linspace(0, len(budgets) - 1, _MOST_LEVELS).astype(np.int64)])
    return np.asarray(budgets[np.clip(np.searchsorted(budgets, last, side="right") - 1, 0, len(budgets) - 1)])


def extrapolated(before: FloatArray, after: FloatArray, values: FloatArray) -> FloatArray:
    """Return where runs that were stopped would have got to, from those that went on.

    The line has the slope of least squares, at least 0, and goes through the median of what went on; with fewer than
    three of these its slope is 1. What was measured with other rules stands in docs/early_discarding.md.

    Parameters
    ----------
    before, after
        What the runs that went on had recorded at the budget, and what they reached; shape (m,), m >= 1.
    values
        What the stopped ones had recorded there, shape (k,).
    """
    slope = 1.0
    if len(before) >= _FEW and np.ptp(before) > 0:
        slope = float(np.clip(np.polyfit(before, after, 1)[0], 0.0, _STEEPEST))
    return np.asarray(slope * values + np.median(after - slope * before))
