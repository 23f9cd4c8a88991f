"""Configurations to and from a float matrix, by whole columns.

ConfigSpace stays the authority: activity and legality are decided by its own conditions and forbidden clauses,
evaluated on whole arrays. Only the columns that such a clause reads are translated into its vector representation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ConfigSpace as cs
import numpy as np
import numpy.typing as npt

from deephyper_balsam.columns import (
    CATEGORICAL,
    CONSTANT,
    INTEGER,
    ORDINAL,
    REAL,
    Column,
    FloatArray,
    Scale,
    make_column,
    plain,
    scale_of,
)
from deephyper_balsam.errors import ProblemError
from deephyper_balsam.trial import Config

__all__ = [
    "CATEGORICAL",
    "CONSTANT",
    "INTEGER",
    "ORDINAL",
    "REAL",
    "BoolArray",
    "Column",
    "Encoder",
    "FloatArray",
    "MatrixSampler",
    "plain",
]

BoolArray = npt.NDArray[np.bool_]
MatrixSampler = Callable[[int, np.random.Generator], FloatArray]
"""Draws ``n`` points of the unit cube: ``(n, rng) -> (n, d)``."""

_TABLE_LIMIT = 4096
_MAX_DRAWS_PER_ROW = 2000


class Encoder:
    """The space as a matrix: one row a configuration, one column a hyperparameter, in their order of addition.

    Reals, integers and ordinals are scaled to [0, 1] (in log space when they are log-uniform); an integer or an ordinal
    of k values uses k evenly spread points. A categorical is the index of its choice as a float, a constant is 0, and
    an inactive hyperparameter is NaN. All methods take and give float64 matrices of shape (n, d), changing none.

    An encoder is a snapshot of its space: after the problem has changed, take `problem.encoder` anew.
    """

    def __init__(self, space: cs.ConfigurationSpace, names: Sequence[str]) -> None:
        space = copy.deepcopy(space)  # its clauses hold places that change when the problem grows
        self._space = space
        self.names = tuple(names)
        conditional = set(space.conditional_hyperparameters)
        self.columns = tuple(make_column(space[name], conditional=name in conditional) for name in self.names)
        self._defaults = np.array([column.default for column in self.columns])
        self._lookups = [{choice: i for i, choice in enumerate(c.choices)} for c in self.columns]
        self._choices = [_objects(column.choices) for column in self.columns]
        at = {name: index for index, name in enumerate(self.names)}
        # ConfigSpace sorts by depth in the tree of conditions, so its order has parents before children.
        self._order = [at[name] for name in space.at]
        self._conditions = {at[c.child.name]: c for c in space.conditions}
        self._forbidden = list(space.forbidden_clauses)
        clauses = [*space.conditions, *self._forbidden]
        self._read = {at[name] for clause in clauses for name in _names_read(clause)}
        self._scales = {j: scale_of([self.columns[j]]) for j in self._read}
        self._tables = {j: self._vector_table(j) for j in self._read}
        self._quantiles = {j: q for j in range(self.width) if (q := self._quantile_table(j)) is not None}
        self._groups = self._make_groups()

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
        values = np.empty((len(configs), self.width))
        for j, column in enumerate(self.columns):
            name, lookup = column.name, self._lookups[j]
            try:
                if column.choices:
                    values[:, j] = [lookup[c[name]] if name in c else math.nan for c in configs]
                else:
                    values[:, j] = [c.get(name, math.nan) for c in configs]
            except (KeyError, TypeError, ValueError) as error:
                allowed = f"one of {list(column.choices)}" if column.choices else "a number"
                raise ProblemError(f"`{name}` must be {allowed}, but got: {error}.") from error
        matrix = np.empty(values.shape)
        for index, scale, _ in self._groups:
            matrix[:, index] = scale.to_unit(scale.quantise(values[:, index]))
        return matrix

    def decode(self, matrix: FloatArray) -> list[Config]:
        """The configurations of these rows: plain Python values on the legal grid, inactive (NaN) ones left out."""
        matrix = self._checked(matrix)
        missing, values = np.isnan(matrix), self._values(matrix)
        columns: list[list[Any]] = []
        for j, column in enumerate(self.columns):
            if column.kind == REAL:
                columns.append(values[:, j].tolist())
                continue
            whole = np.where(missing[:, j], column.lower, values[:, j]).astype(np.int64)
            columns.append(whole.tolist() if column.kind == INTEGER else self._choices[j][whole].tolist())
        if not missing.any():
            return [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]
        active = (~missing).tolist()
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

    def forbidding_clause(self, row: FloatArray) -> str | None:
        """The first forbidden clause, as text, that excludes this canonical row of shape (d,)."""
        vectors = self._vectors(self._checked(row[None, :]))
        for clause in self._forbidden:
            if np.asarray(clause.is_forbidden_vector_array(vectors))[0]:
                return str(clause).replace("Forbidden: ", "")
        return None

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
        """All legal rows of a finite space, in a fixed order; None if there are more than `limit` or no end of them."""
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
        data, width = self._values(self._checked(matrix)).tobytes(), 8 * self.width
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

    def _make_groups(self) -> list[tuple[npt.NDArray[np.intp], Scale, bool]]:
        """Columns that scale alike, to be handled side by side; and whether `canonical` must snap them."""
        groups: dict[tuple[str, bool, bool], list[int]] = {}
        for j, column in enumerate(self.columns):
            groups.setdefault((column.kind, column.log, column.kind != REAL or j in self._read), []).append(j)
        return [
            (np.array(members), scale_of([self.columns[j] for j in members]), must_snap)
            for (_, _, must_snap), members in groups.items()
        ]

    def _values(self, matrix: FloatArray) -> FloatArray:
        """Values on the grid: the number itself, or the index of the choice; one bit pattern for all NaN."""
        values = np.empty(matrix.shape)
        for index, scale, _ in self._groups:
            values[:, index] = scale.to_values(matrix[:, index])
        values[np.isnan(matrix)] = np.nan
        return values

    def _settle(self, matrix: FloatArray, *, exact: bool) -> FloatArray:
        matrix = self._checked(matrix)
        out = np.where(np.isnan(matrix), self._defaults, matrix)
        for index, scale, must_snap in self._groups:
            if exact or must_snap:
                out[:, index] = scale.to_unit(scale.to_values(out[:, index]))
            else:
                out[:, index] = np.minimum(np.maximum(out[:, index], 0.0), 1.0)
        if self._conditions:
            vectors = np.full((self.width, len(out)), np.nan)
            for position, j in enumerate(self._order):
                condition = self._conditions.get(j)
                if condition is not None:
                    out[~np.asarray(condition.satisfied_by_vector_array(vectors), dtype=bool), j] = np.nan
                if j in self._read:
                    vectors[position] = self._vector(j, out[:, j])
        return out

    def _vectors(self, matrix: FloatArray) -> FloatArray:
        """The columns that clauses read, as ConfigSpace sees them: shape (d, n), in ConfigSpace's order."""
        vectors = np.full((self.width, len(matrix)), np.nan)
        for position, j in enumerate(self._order):
            if j in self._read:
                vectors[position] = self._vector(j, matrix[:, j])
        return vectors

    def _vector(self, j: int, unit: FloatArray) -> FloatArray:
        """One column of canonical rows as ConfigSpace would compute it from the values, to the last bit."""
        column, table = self.columns[j], self._tables[j]
        missing = np.isnan(unit)
        values = self._scales[j].to_values(unit[:, None])[:, 0]
        if table is not None:
            vector = table[np.where(missing, 0.0, values - column.lower).astype(np.intp)]
        else:
            filled = np.where(missing, column.lower, values)
            legal = filled if column.kind == REAL else filled.astype(np.int64)
            vector = np.asarray(self._space[column.name].to_vector(legal), dtype=np.float64)
        vector[missing] = np.nan
        return vector

    def _vector_table(self, j: int) -> FloatArray | None:
        """ConfigSpace's vector value of each value of a column, if they are few."""
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
        hp: Any = self._space[self.names[j]]
        column = self.columns[j]
        if column.kind == CATEGORICAL and hp.weights is not None:
            cumulative: FloatArray = np.cumsum(np.asarray(hp.probabilities, dtype=np.float64))
            weights: FloatArray = cumulative / cumulative[-1]
            return weights
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


def _objects(values: tuple[Any, ...]) -> npt.NDArray[np.object_]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _names_read(clause: Any) -> Iterator[str]:
    """Names of the hyperparameters on whose values a condition or a forbidden clause depends."""
    for part in clause.dlcs if hasattr(clause, "dlcs") else [clause]:
        for attribute in ("parent", "hyperparameter", "left", "right"):
            if hasattr(part, attribute):
                yield getattr(part, attribute).name
