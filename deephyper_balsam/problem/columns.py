"""What one hyperparameter is as a column of the unit matrix, and how whole columns are scaled and snapped."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import ConfigSpace as cs
import numpy as np
import numpy.typing as npt
from ConfigSpace.hyperparameters import FloatHyperparameter, IntegerHyperparameter

FloatArray = npt.NDArray[np.float64]

REAL, INTEGER, ORDINAL, CATEGORICAL, CONSTANT = "real", "integer", "ordinal", "categorical", "constant"

SIGNIFICANT_DIGITS = 12
"""How many digits of a real are kept; what is lost on the way through the unit interval lies beyond them."""


class Scale:
    """The way between values and the unit interval for columns of one kind, side by side.

    A value is the number itself, or the index of the choice. NaN stays NaN everywhere.

    Parameters
    ----------
    lower, upper
        Bounds, shape (k,), one a column.
    decimals
        Decimal places that a linear real keeps, shape (k,).
    kind
        The columns' kind.
    log
        Whether they are scaled in log space.
    """

    def __init__(self, lower: FloatArray, upper: FloatArray, decimals: FloatArray, kind: str, log: bool) -> None:
        self.lower, self.upper, self.kind, self.log = lower, upper, kind, log
        self._is_index = kind in (CATEGORICAL, CONSTANT)
        self._power = 10.0**decimals
        self._start = np.log(lower) if log else lower
        self._span = (np.log(upper) - np.log(lower)) if log else upper - lower

    def to_unit(self, values: FloatArray) -> FloatArray:
        """Scale values on the grid, shape (n, k), to [0, 1]; an index stays as it is."""
        if self._is_index:
            return values
        # A contiguous copy, always: numpy's vectorised log may differ in the last bit from its strided one.
        position = np.log(np.ascontiguousarray(values)) if self.log else values
        unit = np.minimum(np.maximum((position - self._start) / self._span, 0.0), 1.0)
        if self.log:  # the bounds map to the ends exactly, whatever log rounds to
            unit[values == self.lower] = 0.0
            unit[values == self.upper] = 1.0
        return unit

    def to_values(self, unit: FloatArray) -> FloatArray:
        """Snap columns of the unit matrix, shape (n, k), to legal values."""
        if self._is_index:
            return np.minimum(np.maximum(np.rint(unit), 0.0), self.upper) + 0.0
        position = self._start + np.minimum(np.maximum(unit, 0.0), 1.0) * self._span
        values = self.quantise(np.exp(np.ascontiguousarray(position)) if self.log else position)
        values = np.where(unit <= 0.0, self.lower, values)
        return np.where(unit >= 1.0, self.upper, values)

    def quantise(self, values: FloatArray) -> FloatArray:
        """Round to the grid on which configurations live: whole numbers, or 12 significant digits for a real."""
        if self.kind != REAL:
            snapped = np.rint(values)
        elif self.log:
            digits = np.floor(np.log10(np.ascontiguousarray(values)))
            power = 10.0 ** (SIGNIFICANT_DIGITS - 1 - digits)
            snapped = np.rint(values * power) / power
        else:
            snapped = np.rint(values * self._power) / self._power
        # Adding 0.0 turns a negative zero, which would print as -0.0 and make another key, into zero.
        snapped = np.minimum(np.maximum(snapped, self.lower), self.upper) + 0.0
        if self.kind != REAL:
            return snapped
        return np.where(values == self.lower, self.lower, np.where(values == self.upper, self.upper, snapped))


@dataclass(frozen=True)
class Column:
    """One hyperparameter as one column of the unit matrix.

    Attributes
    ----------
    name
        The hyperparameter.
    kind
        ``"real"``, ``"integer"``, ``"ordinal"``, ``"categorical"`` or ``"constant"`` (whatever has a single value).
    size
        The number of values; 0 for a real.
    log
        Whether the column is scaled in log space.
    lower, upper
        Bounds of a real or an integer, in its own unit; 0 and `size` - 1 otherwise.
    choices
        The plain Python values of an ordinal, a categorical or a constant, in the order of their index; else empty.
    default
        The default as it stands in the matrix: in [0, 1], or the choice's index for a categorical.
    conditional
        Whether some condition decides if it is active.
    """

    name: str
    kind: str
    size: int
    log: bool
    lower: float
    upper: float
    choices: tuple[Any, ...]
    default: float
    conditional: bool

    def to_unit(self, values: FloatArray) -> FloatArray:
        """Scale values, shape (n,), to [0, 1]; a value is the number itself, or the index of the choice."""
        return scale_of([self]).to_unit(np.asarray(values, dtype=np.float64)[:, None])[:, 0]

    def to_values(self, unit: FloatArray) -> FloatArray:
        """Snap a column of the unit matrix, shape (n,), to legal values (numbers, or indices of choices)."""
        return scale_of([self]).to_values(np.asarray(unit, dtype=np.float64)[:, None])[:, 0]


def scale_of(columns: list[Column]) -> Scale:
    """The common scale of columns that share their kind and whether they are logarithmic."""
    first = columns[0]
    lower, upper = np.array([c.lower for c in columns]), np.array([c.upper for c in columns])
    linear = first.kind == REAL and not first.log
    decimals = np.array([_decimals(c.lower, c.upper) if linear else 0.0 for c in columns])
    return Scale(lower, upper, decimals, first.kind, first.log)


def _decimals(lower: float, upper: float) -> float:
    """Decimal places that survive the way through the unit interval and back."""
    by_range = SIGNIFICANT_DIGITS - math.ceil(math.log10(upper - lower))
    by_magnitude = 14 - math.ceil(math.log10(max(abs(lower), abs(upper))))
    return float(min(by_range, by_magnitude))


def make_column(hp: Any, *, conditional: bool) -> Column:
    """The column of a ConfigSpace hyperparameter."""
    if isinstance(hp, (FloatHyperparameter, IntegerHyperparameter)):
        real, log = isinstance(hp, FloatHyperparameter), bool(getattr(hp, "log", False))
        size = 0 if real else int(hp.upper) - int(hp.lower) + 1
        lower, upper = float(hp.lower), float(hp.upper)
        column = Column(hp.name, REAL if real else INTEGER, size, log, lower, upper, (), 0.0, conditional)
        value = float(scale_of([column]).quantise(np.array([float(hp.default_value)]))[0])
    else:
        if isinstance(hp, cs.Constant):
            choices, default, kind = (plain(hp.value),), plain(hp.value), CONSTANT
        else:
            ordinal = isinstance(hp, cs.OrdinalHyperparameter)
            choices, default = tuple(plain(list(hp.sequence if ordinal else hp.choices))), plain(hp.default_value)
            kind = CONSTANT if len(choices) == 1 else ORDINAL if ordinal else CATEGORICAL
        column = Column(hp.name, kind, len(choices), False, 0.0, len(choices) - 1.0, choices, 0.0, conditional)
        value = float(choices.index(default))
    return replace(column, default=float(column.to_unit(np.array([value]))[0]))


def plain(value: Any) -> Any:
    """Plain Python values for numpy's, inside lists, tuples (which become lists) and dicts too."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    return value
