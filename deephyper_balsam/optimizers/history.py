"""What an optimizer asked and was told, as growing arrays: no step costs more as the history grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from deephyper_balsam.optimizers.stopped import Curves, finals, grown_curves, thinned
from deephyper_balsam.problem.space import BoolArray, FloatArray

Array = TypeVar("Array", bound=npt.NDArray[Any])

_NEVER, _PENDING, _WITHDRAWN = -3, -2, -1


class History:
    """Results in the order told, and the pending trials beside them.

    Parameters
    ----------
    width
        The number of columns of the unit matrix, d.
    """

    def __init__(self, width: int) -> None:
        self._told = 0
        self._rows: FloatArray = np.empty((64, width))
        self._objectives: FloatArray = np.empty(64)
        self._numbers: npt.NDArray[np.int64] = np.empty(64, dtype=np.int64)
        self._asked = 0
        self._place: npt.NDArray[np.int64] = np.full(
            64, _NEVER, dtype=np.int64
        )  # trial number -> its place in the order told
        self._pending_rows: FloatArray = np.empty((64, width))
        self._pending_numbers: list[int] = []
        self._slots: dict[int, int] = {}
        self._curves: Curves | None = None  # of all results, once one recorded something
        self.amended = 0

    def __len__(self) -> int:
        return self._told

    @property
    def X(self) -> FloatArray:
        """Encoded configurations in the order told; shape (n, d), NaN where inactive. A read-only view."""
        return _view(self._rows, self._told)

    @property
    def y(self) -> FloatArray:
        """Objectives (maximised), in the order told; shape (n,), NaN for a failure. A read-only view."""
        return _view(self._objectives, self._told)

    def curves(self, count: int | None = None) -> Curves | None:
        """What the first `count` runs recorded, all by default; None: nothing. Views of what is never written again."""
        return None if self._curves is None else self._curves.first(self._told if count is None else count)

    def finals(self, count: int | None = None) -> FloatArray:
        """What the first `count` runs reached, or would have if they had not been stopped early; shape (count,)."""
        count = self._told if count is None else count
        return finals(self.y[:count], self.curves(count))

    def was_stopped(self, number: int) -> bool:
        """Whether a told trial was stopped early."""
        return self._curves is not None and bool(self._curves.stopped[self._place[number]])

    @property
    def failed(self) -> BoolArray:
        """Which results are failures; shape (n,)."""
        return np.isnan(self._objectives[: self._told])

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Trial numbers of the results, in the order told; shape (n,), -1 for a warm start. A read-only view."""
        view = self._numbers[: self._told]
        view.flags.writeable = False
        return view

    @property
    def num_asked(self) -> int:
        """The next trial number."""
        return self._asked

    @property
    def num_pending(self) -> int:
        """How many trials have no result yet."""
        return len(self._pending_numbers)

    def pending_numbers(self) -> npt.NDArray[np.int64]:
        """Numbers of the pending trials, ascending; shape (p,)."""
        return np.sort(np.array(self._pending_numbers, dtype=np.int64))

    def pending_rows(self) -> FloatArray:
        """Encoded configurations of the pending trials, by ascending number; shape (p, d)."""
        order = np.argsort(np.array(self._pending_numbers, dtype=np.int64))
        return self._pending_rows[: len(order)][order]

    def state(self, number: int) -> str:
        """``"unknown"``, ``"pending"``, ``"told"`` or ``"withdrawn"``."""
        place = int(self._place[number]) if 0 <= number < self._asked else _NEVER
        return {_NEVER: "unknown", _PENDING: "pending", _WITHDRAWN: "withdrawn"}.get(place, "told")

    def objective_of(self, number: int) -> float | None:
        """What a told trial was told; None for a failure."""
        value = float(self._objectives[self._place[number]])
        return None if math.isnan(value) else value

    def ask(self, row: FloatArray, number: int | None = None) -> int:
        """Record a pending trial, by default under the next number, and return its number."""
        number = self._asked if number is None else number
        self._asked = max(self._asked, number + 1)
        if self._asked > len(self._place):
            self._place = _grown(self._place, self._asked, fill=_NEVER)
        self._place[number] = _PENDING
        slot = len(self._pending_numbers)
        if slot == len(self._pending_rows):
            self._pending_rows = _grown(self._pending_rows, slot + 1)
        self._pending_rows[slot] = row
        self._pending_numbers.append(number)
        self._slots[number] = slot
        return number

    def tell(
        self,
        number: int | None,
        row: FloatArray | None,
        objective: float | None,
        curve: Sequence[tuple[float, float]] = (),
        stopped: bool = False,
    ) -> None:
        """Record the result of a pending trial, or of a warm start (no number, but a row)."""
        if number is not None:
            row = self._take(number)
            self._place[number] = self._told
        if self._told == len(self._rows):
            size = self._told + 1
            self._rows = _grown(self._rows, size)
            self._objectives = _grown(self._objectives, size)
            self._numbers = _grown(self._numbers, size)
        self._rows[self._told] = row
        self._objectives[self._told] = math.nan if objective is None else objective
        self._numbers[self._told] = -1 if number is None else number
        if curve or stopped or self._curves is not None:
            self._put_curve(self._told, curve, stopped)
        self._told += 1

    def amend(self, number: int, objective: float | None, curve: Sequence[tuple[float, float]]) -> None:
        """Take the final result of a trial that was stopped early, and went on later, in the place of the first.

        What others were given of the history stays as it was: they may read it in another thread.
        """
        place = int(self._place[number])
        self._objectives = self._objectives.copy()
        self._objectives[place] = math.nan if objective is None else objective
        assert self._curves is not None
        self._curves = Curves(self._curves.budgets.copy(), self._curves.values.copy(), self._curves.stopped.copy())
        self._put_curve(place, curve, stopped=False)
        self.amended += 1

    def _put_curve(self, place: int, curve: Sequence[tuple[float, float]], stopped: bool) -> None:
        kept = self._curves
        if kept is None or place >= len(kept.stopped):
            kept = self._curves = grown_curves(kept, len(self._rows))
        kept.budgets[place], kept.values[place] = thinned(curve)
        kept.stopped[place] = stopped

    def withdraw(self, number: int) -> FloatArray:
        """Take a pending trial out, and return its row."""
        row = self._take(number)
        self._place[number] = _WITHDRAWN
        return row

    def _take(self, number: int) -> FloatArray:
        slot, last = self._slots.pop(number), len(self._pending_numbers) - 1
        row: FloatArray = self._pending_rows[slot].copy()
        moved = self._pending_numbers.pop()
        if slot != last:
            self._pending_rows[slot] = self._pending_rows[last]
            self._pending_numbers[slot] = moved
            self._slots[moved] = slot
        return row


def _view(array: FloatArray, n: int) -> FloatArray:
    view = array[:n]
    view.flags.writeable = False
    return view


def _grown(array: Array, needed: int, fill: int | None = None) -> Array:
    size = max(2 * len(array), needed)
    out = np.empty((size, *array.shape[1:]), dtype=array.dtype)
    out[: len(array)] = array
    if fill is not None:
        out[len(array) :] = fill
    return cast("Array", out)
