"""Configurations to and from a float matrix, by whole columns.

ConfigSpace stays the authority: activity and legality are decided by its own conditions and forbidden clauses, evaluated
on whole arrays. Only the columns that such a clause reads are translated into ConfigSpace's vector representation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ConfigSpace as cs
import numpy as np
import numpy.typing as npt
from ConfigSpace.forbidden import ForbiddenLike
from ConfigSpace.hyperparameters import FloatHyperparameter, IntegerHyperparameter

from deephyper_balsam.errors import ProblemError
from deephyper_balsam.trial import Config

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
MatrixSampler = Callable[[int, np.random.Generator], FloatArray]
"""Draws ``n`` points of the unit cube: ``(n, rng) -> (n, d)``."""

REAL, INTEGER, ORDINAL, CATEGORICAL, CONSTANT = "real", "integer", "ordinal", "categorical", "constant"

_SIGNIFICANT_DIGITS = 12
_TABLE_LIMIT = 4096
_MAX_DRAWS_PER_ROW = 2000


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
    _decimals: int = field(default=0, repr=False)

    @property
    def is_numeric(self) -> bool:
        """Whether distance means something in this column: a real, an integer or an ordinal."""
        return self.kind in (REAL, INTEGER, ORDINAL)

    # -- values (float64: the number itself, or the index of the choice) <-> unit -------------------------------------

    def to_unit(self, values: FloatArray) -> FloatArray:
        """Scale values, shape (n,), to [0, 1]; indices of a categorical stay as they are. NaN stays NaN."""
        if self.kind in (CATEGORICAL, CONSTANT):
            return values
        if self.log:
            # A contiguous copy, always: numpy's vectorised log may differ in the last bit from its strided one.
            span = math.log(self.upper) - math.log(self.lower)
            unit = (np.log(np.ascontiguousarray(values)) - math.log(self.lower)) / span
        else:
            unit = (values - self.lower) / (self.upper - self.lower)
        unit = np.clip(unit, 0.0, 1.0)
        unit[values == self.lower] = 0.0
        unit[values == self.upper] = 1.0
        return unit

    def to_values(self, unit: FloatArray) -> FloatArray:
        """Snap a column of the unit matrix, shape (n,), to legal values. NaN stays NaN."""
        if self.kind == CONSTANT:
            return np.where(np.isnan(unit), np.nan, 0.0)
        if self.kind == CATEGORICAL:
            return np.clip(np.rint(unit), 0.0, self.size - 1.0) + 0.0
        unit = np.clip(unit, 0.0, 1.0)
        if self.log:
            low, high = math.log(self.lower), math.log(self.upper)
            values = np.exp(low + np.ascontiguousarray(unit) * (high - low))
        else:
            values = self.lower + unit * (self.upper - self.lower)
        values = self.quantise(values)
        values[unit == 0.0] = self.lower
        values[unit == 1.0] = self.upper
        return values

    def quantise(self, values: FloatArray) -> FloatArray:
        """Round to the grid on which configurations live: whole numbers, or 12 significant digits for a real."""
        if self.kind != REAL:
            snapped = np.rint(values)
        elif self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = 10.0 ** (_SIGNIFICANT_DIGITS - 1 - np.floor(np.log10(np.ascontiguousarray(values))))
                rounded = np.rint(values * scale) / scale
            snapped = np.where(np.isfinite(rounded), rounded, values)
        else:
            snapped = np.round(values, self._decimals)
        return np.clip(snapped, self.lower, self.upper) + 0.0  # + 0.0: no negative zero, which prints as -0.0


def _decimals(lower: float, upper: float) -> int:
    """Decimal places that survive the way through the unit interval and back."""
    by_range = _SIGNIFICANT_DIGITS - math.ceil(math.log10(upper - lower))
    by_magnitude = 14 - math.ceil(math.log10(max(abs(lower), abs(upper))))
    return min(by_range, by_magnitude)


def plain(value: Any) -> Any:
    """A plain Python value for a numpy scalar, inside lists, tuples and mappings too."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    return value


def _make_column(hp: cs.hyperparameters.Hyperparameter[Any, Any], *, conditional: bool) -> Column:
    if isinstance(hp, (FloatHyperparameter, IntegerHyperparameter)):
        lower, upper = float(hp.lower), float(hp.upper)
        real = isinstance(hp, FloatHyperparameter)
        size = 0 if real else int(hp.upper) - int(hp.lower) + 1
        column = Column(
            hp.name,
            REAL if real else INTEGER,
            size,
            bool(getattr(hp, "log", False)),
            lower,
            upper,
            (),
            0.0,
            conditional,
            _decimals(lower, upper) if real else 0,
        )
        default = float(column.to_unit(column.quantise(np.array([float(hp.default_value)])))[0])
    elif isinstance(hp, cs.Constant):
        return Column(hp.name, CONSTANT, 1, False, 0.0, 0.0, (plain(hp.value),), 0.0, conditional)
    else:
        ordinal = isinstance(hp, cs.OrdinalHyperparameter)
        choices = tuple(plain(choice) for choice in (hp.sequence if ordinal else hp.choices))
        kind = CONSTANT if len(choices) == 1 else ORDINAL if ordinal else CATEGORICAL
        column = Column(hp.name, kind, len(choices), False, 0.0, len(choices) - 1.0, choices, 0.0, conditional)
        default = float(column.to_unit(np.array([float(choices.index(plain(hp.default_value)))]))[0])
    return Column(**{**column.__dict__, "default": default})


class Encoder:
    """The space as a matrix: one row a configuration, one column a hyperparameter, in their order of addition.

    Reals, integers and ordinals are scaled to [0, 1] (in log space when they are log-uniform); an integer or an ordinal of
    k values uses k evenly spread points. A categorical is the index of its choice as a float, a constant is 0, and an
    inactive hyperparameter is NaN. All methods take and give float64 matrices of shape (n, d) and change none in place.

    An encoder is a snapshot of its space: after the problem has changed, take `problem.encoder` anew.
    """

    def __init__(self, space: cs.ConfigurationSpace, names: Sequence[str]) -> None:
        self._space = space
        self.names = tuple(names)
        conditional = set(space.conditional_hyperparameters)
        self.columns = tuple(_make_column(space[name], conditional=name in conditional) for name in self.names)
        self._at = {name: index for index, name in enumerate(self.names)}
        self._lookups = [{choice: i for i, choice in enumerate(c.choices)} for c in self.columns]
        self._choices: list[npt.NDArray[np.object_]] = []
        for column in self.columns:
            choices = np.empty(len(column.choices), dtype=object)
            choices[:] = column.choices
            self._choices.append(choices)
        # ConfigSpace sorts by depth in the tree of conditions, so its order has parents before children.
        self._order = [self._at[name] for name in space.at]
        self._conditions = {self._at[c.child.name]: c for c in space.conditions}
        self._forbidden = list(space.forbidden_clauses)
        self._parents = sorted({self._at[n] for c in space.conditions for n in _names_in_condition(c)})
        self._read = sorted(
            set(self._parents) | {self._at[n] for clause in self._forbidden for n in _names_in_clause(clause)}
        )
        self._tables = {j: self._vector_table(j) for j in self._read}
        self._quantiles = {j: q for j in range(self.width) if (q := self._quantile_table(j)) is not None}
        self._defaults = np.array([column.default for column in self.columns])

    @property
    def width(self) -> int:
        """The number of columns, d."""
        return len(self.columns)

    # -- configurations <-> matrix -------------------------------------------------------------------------------------

    def encode(self, configs: Sequence[Config]) -> FloatArray:
        """The matrix of these configurations, which must be legal (see `HpProblem.check_configuration`).

        Returns
        -------
        ndarray of shape (n, d)
            NaN where a configuration has no value for a hyperparameter.

        Raises
        ------
        ProblemError
            If a value is of the wrong type or not among the choices.
        """
        matrix = np.empty((len(configs), self.width))
        for j, column in enumerate(self.columns):
            name, lookup = column.name, self._lookups[j]
            try:
                if column.choices:
                    values = [lookup[c[name]] if name in c else math.nan for c in configs]
                else:
                    values = [c.get(name, math.nan) for c in configs]
                array = np.array(values, dtype=np.float64)
            except (KeyError, TypeError, ValueError) as error:
                allowed = f"one of {list(column.choices)}" if column.choices else "a number"
                raise ProblemError(f"`{name}` must be {allowed}, but got {error}.") from error
            matrix[:, j] = column.to_unit(array if column.choices else column.quantise(array))
        return matrix

    def decode(self, matrix: FloatArray) -> list[Config]:
        """The configurations of these rows: plain Python values on the legal grid, inactive (NaN) ones left out."""
        matrix = self._checked(matrix)
        columns: list[list[Any]] = []
        for j, column in enumerate(self.columns):
            values = column.to_values(matrix[:, j])
            missing = np.isnan(values)
            if column.choices:
                index = np.where(missing, 0, values).astype(np.intp)
                if column.kind == ORDINAL:
                    index = np.clip(index, 0, column.size - 1)
                columns.append(self._choices[j][index].tolist())
            elif column.kind == INTEGER:
                columns.append(np.where(missing, column.lower, values).astype(np.int64).tolist())
            else:
                columns.append(values.tolist())
        if not np.isnan(matrix).any():
            return [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]
        active = (~np.isnan(matrix)).tolist()
        return [
            {name: value for name, value, on in zip(self.names, row, mask, strict=True) if on}
            for row, mask in zip(zip(*columns, strict=True), active, strict=True)
        ]

    # -- the legal form of a row ---------------------------------------------------------------------------------------

    def canonical(self, matrix: FloatArray) -> FloatArray:
        """Clip and snap to the grid, then decide anew what is active: inactive becomes NaN, active NaN the default.

        A real that no condition or clause reads is only clipped; `snap` rounds it too.
        """
        return self._settle(matrix, exact=False)

    def snap(self, matrix: FloatArray) -> FloatArray:
        """`canonical`, with reals on their grid of 12 digits as well: exactly ``encode(decode(canonical(matrix)))``."""
        return self._settle(matrix, exact=True)

    def legal(self, matrix: FloatArray) -> BoolArray:
        """Which canonical rows no forbidden clause excludes; shape (n,)."""
        matrix = self._checked(matrix)
        if not self._forbidden:
            return np.ones(len(matrix), dtype=bool)
        return ~self._is_forbidden(self._vectors(matrix))

    def forbids(self, clause: ForbiddenLike, matrix: FloatArray) -> BoolArray:
        """Which canonical rows this one clause of the space excludes; shape (n,)."""
        return np.asarray(clause.is_forbidden_vector_array(self._vectors(self._checked(matrix))), dtype=bool)

    def active(self, matrix: FloatArray) -> BoolArray:
        """Which hyperparameters are active in these rows, decided by the conditions; shape (n, d)."""
        return ~np.isnan(self.canonical(matrix))

    # -- drawing -------------------------------------------------------------------------------------------------------

    def from_unit_cube(self, cube: FloatArray) -> FloatArray:
        """Map points of the unit cube, shape (n, d), to canonical rows, each value with its probability in the space.

        Any space-filling design (Sobol', Latin hypercube, Halton) keeps its spread. Forbidden rows are not removed.
        """
        return self.canonical(self._spread(self._checked(cube)))

    def sample(
        self, n: int, rng: np.random.Generator, matrix_sampler: MatrixSampler | None = None, *, partial: bool = False
    ) -> FloatArray:
        """Draw `n` legal canonical rows at random, possibly with repetitions.

        Parameters
        ----------
        n
            The number of rows.
        rng
            The source of randomness.
        matrix_sampler
            Draws points of the unit cube; by default independent uniform ones.
        partial
            Return the rows found when almost every configuration is forbidden, instead of raising.

        Raises
        ------
        ProblemError
            If the forbidden clauses leave so little that fewer than one in 2000 draws is legal.
        """
        draw = matrix_sampler or (lambda k, generator: generator.random((k, self.width)))
        found: list[FloatArray] = []
        have, drawn, want = 0, 0, n
        while have < n:
            rows = self.from_unit_cube(draw(want, rng))
            drawn += want
            if self._forbidden:
                rows = rows[self.legal(rows)]
            found.append(rows)
            have += len(rows)
            if have < n and drawn >= _MAX_DRAWS_PER_ROW * max(n, 8):
                if partial:
                    break
                raise ProblemError(
                    f"The forbidden clauses leave almost nothing of the space: {have} of {drawn} random configurations "
                    "were legal. Narrow the ranges of the hyperparameters instead, or remove a clause."
                )
            rate = max((have + 1) / (drawn + 1), 1e-3)
            want = min(max(int(1.2 * (n - have) / rate) + 8, 16), 65536)
        if not found:
            return np.empty((0, self.width))
        return found[0][:n] if len(found) == 1 else np.concatenate(found)[:n]

    def enumerate(self, limit: int) -> FloatArray | None:
        """All legal rows of a finite space, in a fixed order, or None if there are more than `limit` or infinitely many."""
        rows = np.full((1, self.width), np.nan)
        for j in self._order:
            column = self.columns[j]
            condition = self._conditions.get(j)
            on = np.ones(len(rows), dtype=bool)
            if condition is not None:
                on = np.asarray(condition.satisfied_by_vector_array(self._vectors(rows)), dtype=bool)
            if not on.any():
                continue
            if column.kind == REAL or len(rows) + int(on.sum()) * (column.size - 1) > limit:
                return None
            values = np.arange(column.size, dtype=np.float64)
            units = column.to_unit(values + column.lower)
            repeats = np.where(on, column.size, 1)
            start = np.repeat(np.cumsum(repeats) - repeats, repeats)
            position = np.arange(int(repeats.sum())) - start
            on = np.repeat(on, repeats)
            rows = np.repeat(rows, repeats, axis=0)
            rows[on, j] = units[position[on]]
            if self._forbidden:
                # A clause that reads a column without a value yet forbids nothing, so this prunes early and safely.
                rows = rows[self.legal(rows)]
        return rows

    # -- identity ------------------------------------------------------------------------------------------------------

    def keys(self, matrix: FloatArray) -> list[bytes]:
        """One key a row: equal exactly when the decoded configurations are equal. Rows must be canonical."""
        matrix = self._checked(matrix)
        values = np.empty(matrix.shape)
        for j, column in enumerate(self.columns):
            values[:, j] = column.to_values(matrix[:, j])
        values[np.isnan(matrix)] = np.nan
        data, width = values.tobytes(), 8 * self.width
        return [data[start : start + width] for start in range(0, len(data), width)]

    def key(self, config: Config) -> bytes:
        """The key of one configuration."""
        return self.keys(self.encode([config]))[0]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _checked(self, matrix: FloatArray) -> FloatArray:
        matrix = np.asarray(matrix, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[1] != self.width:
            raise ValueError(f"The matrix must have shape (n, {self.width}), but got {matrix.shape}.")
        return matrix

    def _settle(self, matrix: FloatArray, *, exact: bool) -> FloatArray:
        matrix = self._checked(matrix)
        out = np.where(np.isnan(matrix), self._defaults, matrix)
        for j, column in enumerate(self.columns):
            if column.kind == REAL and not exact and j not in self._tables:
                out[:, j] = np.clip(out[:, j], 0.0, 1.0)
            else:
                out[:, j] = column.to_unit(column.to_values(out[:, j]))
        if self._conditions:
            vectors = np.full((len(self._order), len(out)), np.nan)
            for position, j in enumerate(self._order):
                condition = self._conditions.get(j)
                on = None
                if condition is not None:
                    on = np.asarray(condition.satisfied_by_vector_array(vectors), dtype=bool)
                    out[~on, j] = np.nan
                if j in self._tables:
                    vectors[position] = self._vector(j, out[:, j])
        return out

    def _vectors(self, matrix: FloatArray) -> FloatArray:
        """The columns that clauses read, as ConfigSpace sees them: shape (d, n), in ConfigSpace's order."""
        vectors = np.full((len(self._order), len(matrix)), np.nan)
        for position, j in enumerate(self._order):
            if j in self._tables:
                vectors[position] = self._vector(j, matrix[:, j])
        return vectors

    def _vector(self, j: int, unit: FloatArray) -> FloatArray:
        column, table = self.columns[j], self._tables[j]
        values = column.to_values(unit)
        missing = np.isnan(values)
        if table is not None:
            index = np.where(missing, 0.0, values - column.lower).astype(np.intp)
            vector = table[index]
        else:
            hp = self._space[column.name]
            filled = np.where(missing, column.lower, values)
            vector = np.asarray(
                hp.to_vector(filled if column.kind == REAL else filled.astype(np.int64)), dtype=np.float64
            )
        vector[missing] = np.nan
        return vector

    def _vector_table(self, j: int) -> FloatArray | None:
        column = self.columns[j]
        if column.choices:
            return np.arange(column.size, dtype=np.float64)
        if column.kind == INTEGER and column.size <= _TABLE_LIMIT:
            values = np.arange(int(column.lower), int(column.upper) + 1)
            return np.asarray(self._space[column.name].to_vector(values), dtype=np.float64)
        return None

    def _is_forbidden(self, vectors: FloatArray) -> BoolArray:
        forbidden = np.zeros(vectors.shape[1], dtype=bool)
        for clause in self._forbidden:
            forbidden |= np.asarray(clause.is_forbidden_vector_array(vectors), dtype=bool)
        return forbidden

    def _quantile_table(self, j: int) -> FloatArray | None:
        """For a distribution that is not uniform: cumulative weights, or quantiles of the unit value."""
        hp, column = self._space[self.names[j]], self.columns[j]
        if column.kind == CATEGORICAL and hp.weights is not None:
            cumulative: FloatArray = np.cumsum(np.asarray(hp.probabilities, dtype=np.float64))
            return cumulative / cumulative[-1]
        if column.choices or isinstance(hp, (cs.UniformFloatHyperparameter, cs.UniformIntegerHyperparameter)):
            return None
        values = np.asarray(hp.sample_value(8191, seed=np.random.RandomState(0)), dtype=np.float64)
        return np.concatenate([[0.0], np.sort(column.to_unit(values)), [1.0]])

    def _spread(self, cube: FloatArray) -> FloatArray:
        out = np.empty(cube.shape)
        for j, column in enumerate(self.columns):
            u, quantiles = cube[:, j], self._quantiles.get(j)
            if column.kind == CONSTANT:
                out[:, j] = 0.0
            elif column.kind == CATEGORICAL and quantiles is not None:
                out[:, j] = np.minimum(np.searchsorted(quantiles, u, side="right"), column.size - 1)
            elif column.kind == CATEGORICAL:
                out[:, j] = np.minimum(np.floor(u * column.size), column.size - 1)
            elif quantiles is not None:
                out[:, j] = np.interp(u, np.linspace(0.0, 1.0, len(quantiles)), quantiles)
            elif column.kind == REAL:
                out[:, j] = u
            elif column.log:
                # Every integer owns the interval of half a unit to both sides, measured in log space.
                low, high = math.log(max(column.lower - 0.5, 0.5)), math.log(column.upper + 0.5)
                values = np.clip(np.rint(np.exp(low + u * (high - low))), column.lower, column.upper)
                out[:, j] = column.to_unit(values)
            else:
                out[:, j] = np.minimum(np.floor(u * column.size), column.size - 1) / (column.size - 1)
        return out


def _names_in_condition(condition: Any) -> Iterable[str]:
    parts = condition.dlcs if hasattr(condition, "dlcs") else [condition]
    return (part.parent.name for part in parts)


def _names_in_clause(clause: Any) -> Iterable[str]:
    for part in clause.dlcs if hasattr(clause, "dlcs") else [clause]:
        if hasattr(part, "hyperparameter"):
            yield part.hyperparameter.name
        else:
            yield part.left.name
            yield part.right.name
