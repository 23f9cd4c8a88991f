"""Configurations to and from a float matrix, by whole columns.

ConfigSpace stays the authority: activity and legality are decided by its own conditions and forbidden clauses,
evaluated on whole arrays. Only the columns that such a clause reads are translated into its vector representation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import ConfigSpace as cs
import numpy as np
import numpy.typing as npt

from deephyper_balsam.errors import ProblemError
from deephyper_balsam.problem.columns import (
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

_LONG_KEY = 128  # bytes
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
        self.parents = frozenset(at[name] for clause in space.conditions for name in _names_read(clause))
        """Columns on whose values others depend for being active."""
        self._scales = {j: scale_of([self.columns[j]]) for j in self._read}
        self._tables = {j: self._vector_table(j) for j in self._read}
        self._quantiles = {j: q for j in range(self.width) if (q := self._quantile_table(j)) is not None}
        self._groups = self._make_groups()
        self._legal_share: float | None = None

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
        for group in self._groups:
            scale = group.scale
            matrix[:, group.members] = scale.to_unit(scale.quantise(values[:, group.members]))
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

        A real is only clipped; `snap` rounds it too. What is active and legal is decided on rounded values in any case.
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
        cube = self._checked(cube)
        out = _by_columns(*cube.shape)
        for group in self._groups:
            self._spread(group, cube[:, group.members], out)
        self._deactivate(out, self._evaluate(out)[1])
        return out

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
        if not self._forbidden:
            return self._complete(n, rng, matrix_sampler)
        parts: list[tuple[FloatArray, FloatArray | None, dict[int, BoolArray]]] = []
        have, drawn = 0, 0
        while have < n and drawn < _MAX_DRAWS_PER_ROW * max(n, 8):
            # Only what clauses read is drawn for rows that may be refused; the rest is drawn for those that stay.
            want = min(int(1.1 * (n - have) / max(self._share_of_legal(), 1e-3)) + 8, 65536)
            cube = matrix_sampler(want, rng) if matrix_sampler else None
            rows = _by_columns(want, self.width)
            for group in self._groups:
                if group.read:
                    points = rng.random((want, len(group.members))) if cube is None else cube[:, group.members]
                    self._spread(group, points, rows)
            vectors, off = self._evaluate(rows)
            kept = np.flatnonzero(~self._is_forbidden(vectors))[: n - have]
            parts.append(
                (rows.T[:, kept].T, None if cube is None else cube[kept], {j: mask[kept] for j, mask in off.items()})
            )
            have, drawn = have + len(kept), drawn + want
        if have < n and not partial:
            raise ProblemError(
                f"The forbidden clauses leave almost nothing of the space: {have} of {drawn} random configurations "
                "were legal. Narrow the ranges of the hyperparameters instead, or remove a clause."
            )
        found: list[FloatArray] = []
        for rows, cube, off in parts:
            for group in self._groups:
                if not group.read:
                    points = rng.random((len(rows), len(group.members))) if cube is None else cube[:, group.members]
                    self._spread(group, points, rows)
            self._deactivate(rows, off)
            found.append(rows)
        return found[0] if len(found) == 1 else np.concatenate([np.empty((0, self.width)), *found])

    def enumerate(self, limit: int) -> FloatArray | None:
        """All legal rows of a finite space, in a fixed order; None if there are more than `limit`."""
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
        """One key a row: equal exactly when the decoded configurations are equal. Rows must be canonical.

        The values themselves, or a hash of 128 bits where they are many: a search keeps a key of every trial.
        """
        data, width = self._values(self._checked(matrix)).tobytes(), 8 * self.width
        keys = [data[start : start + width] for start in range(0, len(data), width)]
        return keys if width <= _LONG_KEY else [blake2b(key, digest_size=16).digest() for key in keys]

    def key(self, config: Config) -> bytes:
        """The key of one configuration."""
        return self.keys(self.encode([config]))[0]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _checked(self, matrix: FloatArray) -> FloatArray:
        matrix = np.asarray(matrix, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[1] != self.width:
            raise ValueError(f"The matrix must have shape (n, {self.width}), but got {matrix.shape}.")
        return matrix

    def _make_groups(self) -> list[_Group]:
        groups: dict[tuple[str, bool, bool], list[int]] = {}
        for j, column in enumerate(self.columns):
            groups.setdefault((column.kind, column.log, j in self._read), []).append(j)
        return [
            _Group(np.array(members), scale_of([self.columns[j] for j in members]), read)
            for (_, _, read), members in groups.items()
        ]

    def _values(self, matrix: FloatArray) -> FloatArray:
        """Values on the grid: the number itself, or the index of the choice; one bit pattern for all NaN."""
        values = np.empty(matrix.shape)
        for group in self._groups:
            values[:, group.members] = group.scale.to_values(matrix[:, group.members])
        values[np.isnan(matrix)] = np.nan
        return values

    def _settle(self, matrix: FloatArray, *, exact: bool) -> FloatArray:
        matrix = self._checked(matrix)
        out = np.where(np.isnan(matrix), self._defaults, matrix)
        for group in self._groups:
            unit = out[:, group.members]
            if group.scale.kind == REAL and not exact:
                out[:, group.members] = np.minimum(np.maximum(unit, 0.0), 1.0)
            else:
                out[:, group.members] = group.scale.to_unit(group.scale.to_values(unit))
        self._deactivate(out, self._evaluate(out)[1])
        return out

    def _evaluate(self, rows: FloatArray) -> tuple[FloatArray, dict[int, BoolArray]]:
        """Decide what is inactive in rows that are complete and on the grid, parents first.

        Returns
        -------
        vectors
            The columns that clauses read as ConfigSpace sees them, in its order; shape (d, n), NaN where inactive.
        off
            For each conditional column, by its number, where it is inactive; shape (n,).
        """
        vectors = np.full((self.width, len(rows)), np.nan)
        off: dict[int, BoolArray] = {}
        if not self._read:
            return vectors, off
        for position, j in enumerate(self._order):
            condition = self._conditions.get(j)
            if condition is not None:
                off[j] = ~np.asarray(condition.satisfied_by_vector_array(vectors), dtype=bool)
            if j in self._read:
                vectors[position] = self._vector(j, rows[:, j])
                if j in off:
                    vectors[position][off[j]] = np.nan
        return vectors, off

    @staticmethod
    def _deactivate(rows: FloatArray, off: dict[int, BoolArray]) -> None:
        for j, mask in off.items():
            rows[mask, j] = np.nan

    def _vectors(self, matrix: FloatArray) -> FloatArray:
        """The columns that clauses read, as ConfigSpace sees them: shape (d, n), in ConfigSpace's order."""
        vectors = np.full((self.width, len(matrix)), np.nan)
        for position, j in enumerate(self._order):
            if j in self._read:
                vectors[position] = self._vector(j, matrix[:, j])
        return vectors

    def _vector(self, j: int, unit: FloatArray) -> FloatArray:
        """One column of canonical rows as ConfigSpace would compute it from the values, to the last bit."""
        column, table, scale = self.columns[j], self._tables[j], self._scales[j]
        missing = np.isnan(unit)
        unit = np.where(missing, 0.0, unit)
        if table is not None:
            if column.log:
                index = scale.to_values(unit[:, None])[:, 0] - column.lower
            else:
                index = unit if column.kind in (CATEGORICAL, CONSTANT) else np.rint(unit * (column.size - 1))
            vector = table[index.astype(np.intp)]
        else:
            values = scale.to_values(unit[:, None])[:, 0]
            legal = values if column.kind == REAL else values.astype(np.int64)
            vector = np.asarray(self._space[column.name].to_vector(legal), dtype=np.float64)
        vector[missing] = np.nan
        return vector

    def _vector_table(self, j: int) -> FloatArray | None:
        """ConfigSpace's vector value of each value of a column, if they are few."""
        column = self.columns[j]
        hp = self._space[column.name]
        if isinstance(hp, cs.Constant):
            return np.array([hp.to_vector(hp.value)], dtype=np.float64)
        if column.choices:
            return np.arange(column.size, dtype=np.float64)
        if column.kind == INTEGER and column.size <= _TABLE_LIMIT:
            values = np.arange(int(column.lower), int(column.upper) + 1)
            return np.asarray(hp.to_vector(values), dtype=np.float64)
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

    def _complete(self, n: int, rng: np.random.Generator, matrix_sampler: MatrixSampler | None) -> FloatArray:
        return self.from_unit_cube(matrix_sampler(n, rng) if matrix_sampler else rng.random((n, self.width)))

    def _share_of_legal(self) -> float:
        """About which part of the space the forbidden clauses leave; measured once, with a seed of its own."""
        if self._legal_share is None:
            rows = self.from_unit_cube(np.random.default_rng(0).random((1024, self.width)))
            self._legal_share = float(np.mean(self.legal(rows)))
        return self._legal_share

    def _spread(self, group: _Group, cube: FloatArray, out: FloatArray) -> None:
        """Fill a group's columns of `out` from points of the unit cube, shape (n, k): complete and on the grid."""
        scale = group.scale
        if scale.kind == CONSTANT:
            unit = np.zeros(cube.shape)
        elif scale.kind == REAL:
            unit = cube
        elif scale.kind == INTEGER and scale.log:
            # Every integer owns the interval of half a unit to both sides, measured in log space.
            low, high = np.log(np.maximum(scale.lower - 0.5, 0.5)), np.log(scale.upper + 0.5)
            values = np.rint(np.exp(low + np.ascontiguousarray(cube) * (high - low)))
            unit = scale.to_unit(np.minimum(np.maximum(values, scale.lower), scale.upper))
        else:
            last = scale.upper - scale.lower
            unit = np.minimum(np.floor(cube * (last + 1.0)), last)
            unit = unit if scale.kind == CATEGORICAL else unit / last
        out[:, group.members] = unit
        for place, j in enumerate(group.members.tolist()):
            if (quantiles := self._quantiles.get(j)) is not None:
                u = cube[:, place]
                if scale.kind == CATEGORICAL:
                    out[:, j] = np.minimum(np.searchsorted(quantiles, u, side="right"), self.columns[j].size - 1)
                else:
                    column = self.columns[j]
                    position = np.interp(u, np.linspace(0.0, 1.0, len(quantiles)), quantiles)
                    out[:, j] = column.to_unit(column.to_values(position))


@dataclass(frozen=True)
class _Group:
    """Columns that scale alike, to be handled side by side; `read` if conditions or clauses depend on them."""

    members: npt.NDArray[np.intp]
    scale: Scale
    read: bool


def _by_columns(n: int, width: int) -> FloatArray:
    """An empty matrix whose columns are contiguous, because columns are what is worked on."""
    return np.empty((width, n)).T


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
