"""Which hyperparameters matter: functional ANOVA of a random forest that learnt the trials.

Hutter, Hoos, Leyton-Brown, *An Efficient Approach for Assessing Hyperparameter Importance* (ICML 2014). Each tree cuts
the space into boxes of constant value, so the mean over any hyperparameters is a sum over boxes and needs no sampling.

- The space is the unit cube: each hyperparameter is uniform on [0, 1] in its own scale (logarithmic if it is), and each
  choice owns an equal share. Choices stand in the order of their mean objective, so that one cut parts good from bad.
- An inactive hyperparameter has no effect: the forest sees such a trial several times, with values drawn at random.
- Objectives are learnt with mean 0 and variance 1, so that no share hangs on their unit: a tree stops at a variance
  below 2e-16, and squares of very large numbers overflow.
- Trials without an objective are left out. Where they lie is a question of its own: `Landscape.of_failures`.
- An optimizer's trials crowd near the optimum. The integral over the space gives each region its due once the forest
  knows it; to weigh trials by the room around them as well was tried and gained nothing. `explained` says how far to
  trust it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from deephyper_balsam.errors import InputError
from deephyper_balsam.problem.columns import CATEGORICAL, CONSTANT, REAL, Column
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Config

FloatArray = npt.NDArray[np.float64]

MIN_TRIALS = 10
"""With fewer trials than this a forest says nothing."""
MOST_ROWS = 3000
"""Of more trials so many are drawn."""
NUM_TREES = 48
MOST_LEAVES = 400
MOST_PAIRED = 10
"""Pairs are looked at among so many hyperparameters, those with the greatest shares."""
COPIES = 4
"""How often a trial with an inactive hyperparameter is shown, with other values."""
CURVE_POINTS = 60


@dataclass(frozen=True)
class Share:
    """The share of the objective's variance that one hyperparameter explains, or two beyond what each does alone.

    Attributes
    ----------
    names
        One hyperparameter, or two.
    share
        From 0 to 1, mean over the trees.
    spread
        Standard deviation over the trees.
    """

    names: tuple[str, ...]
    share: float
    spread: float


@dataclass(frozen=True)
class Curve:
    """The mean objective against one hyperparameter, over all values of the others.

    Attributes
    ----------
    column
        The hyperparameter.
    values
        Values in its own unit, or its choices.
    mean, spread
        Mean and standard deviation over the trees, shape (len(values),).
    """

    column: Column
    values: list[Any]
    mean: FloatArray
    spread: FloatArray


@dataclass(frozen=True)
class Surface:
    """The mean objective against two hyperparameters; `mean` has the shape (first's values, second's values)."""

    columns: tuple[Column, Column]
    values: tuple[list[Any], list[Any]]
    mean: FloatArray


class Landscape:
    """What a forest makes of the trials of a search.

    Parameters
    ----------
    problem
        The search space.
    configs, objectives
        Evaluated configurations and their objectives, n each.
    seed
        Seed of the forest.

    Attributes
    ----------
    columns
        The hyperparameters that vary, in the order of the problem.
    explained
        Share of the variance that the forest foretells for trials that its trees did not learn (R², at most 1). Near 0
        its importances mean nothing.
    num_trials
        How many trials it learnt.

    Raises
    ------
    InputError
        With fewer than `MIN_TRIALS` trials, when all have the same objective, or when no hyperparameter varies.
    """

    def __init__(
        self, problem: HpProblem, configs: Sequence[Config], objectives: Sequence[float], seed: int = 0
    ) -> None:
        y = np.asarray(objectives, dtype=np.float64)
        if len(y) < MIN_TRIALS:
            raise InputError(f"Importances need {MIN_TRIALS} trials with an objective, but got {len(y)}.")
        rng = np.random.default_rng(seed)
        if len(y) > MOST_ROWS:
            kept = np.sort(rng.choice(len(y), MOST_ROWS, replace=False))
            configs, y = [configs[i] for i in kept], y[kept]
        if y.min() == y.max():
            raise InputError(f"Importances need objectives that differ, but all {len(y)} are {y[0]:g}.")
        varying = [j for j, column in enumerate(problem.encoder.columns) if column.kind != CONSTANT]
        if not varying:
            raise InputError("Importances need a hyperparameter that varies, but all are constant.")
        self.columns: list[Column] = [problem.encoder.columns[j] for j in varying]
        self.num_trials = len(y)
        self._unit = _Unit(y)
        y = self._unit.standard
        unit = problem.encoder.encode(configs)[:, varying]
        self._orders = [_order(column, unit[:, j], y) for j, column in enumerate(self.columns)]
        cube = np.column_stack([self._to_cube(j, unit[:, j]) for j in range(len(self.columns))])
        self._fit(cube, y, rng)

    @classmethod
    def of_failures(cls, problem: HpProblem, configs: Sequence[Config], failed: Sequence[bool]) -> Landscape:
        """Learn where trials fail: the objective is 1 for a failure and 0 for a success."""
        return cls(problem, configs, [float(one) for one in failed])

    def _fit(self, cube: FloatArray, y: FloatArray, rng: np.random.Generator) -> None:
        from sklearn.tree import DecisionTreeRegressor

        n, width = cube.shape
        missing = np.isnan(cube)
        copies = COPIES if missing.any() else 1
        leaf = (2 if n < 200 else 3) * copies
        told, times = np.zeros(n), np.zeros(n)
        self._trees = []
        for _ in range(NUM_TREES):
            drawn = rng.integers(0, n, n)  # all copies of a trial, or none: else a tree would know the answer
            rows, values = np.tile(cube[drawn], (copies, 1)), np.tile(y[drawn], copies)
            rows[np.isnan(rows)] = rng.random(int(np.isnan(rows).sum()))
            tree = DecisionTreeRegressor(
                min_samples_leaf=leaf, max_leaf_nodes=MOST_LEAVES, random_state=int(rng.integers(2**31))
            )
            tree.fit(rows, values)
            self._trees.append(_Boxes(tree.tree_, width))
            out = np.setdiff1d(np.arange(n), drawn)
            if not len(out):  # of few trials a tree may have drawn all
                continue
            told[out] += tree.predict(np.where(missing[out], rng.random((len(out), width)), cube[out]))
            times[out] += 1
        seen = times > 0
        gap = y[seen] - told[seen] / times[seen]
        self.explained = float(1 - (gap**2).mean()) if seen.any() else 0.0  # the variance of y is 1

    def shares(self) -> list[Share]:
        """Return the share of each hyperparameter alone, the greatest first."""
        each = np.array([[tree.variance_of(j) for j in range(len(self.columns))] for tree in self._trees])
        return _ranked([(column.name,) for column in self.columns], each, self._totals())

    def pairs(self) -> list[Share]:
        """Return the share of each pair among the `MOST_PAIRED` greatest, beyond what each explains alone; ranked."""
        greatest = {share.names[0] for share in self.shares()[:MOST_PAIRED]}
        members = [j for j, column in enumerate(self.columns) if column.name in greatest]
        both = list(combinations(members, 2))
        if not both:
            return []
        each = np.array([[tree.variance_of_pair(i, j) for i, j in both] for tree in self._trees])
        return _ranked([(self.columns[i].name, self.columns[j].name) for i, j in both], each, self._totals())

    def _totals(self) -> FloatArray:
        return np.array([tree.variance for tree in self._trees])

    def curve(self, name: str) -> Curve:
        """Return the mean objective against one hyperparameter (its partial dependence over the whole space)."""
        j = self._place(name)
        cube, values = self._grid(j, CURVE_POINTS)
        means = np.array([tree.means(j, cube) for tree in self._trees])
        return Curve(
            self.columns[j],
            values,
            self._unit.value(means.mean(axis=0)),
            self._unit.difference(means.std(axis=0)),
        )

    def surface(self, first: str, second: str, points: int = 24) -> Surface:
        """Return the mean objective against two hyperparameters."""
        i, j = self._place(first), self._place(second)
        (cube_i, values_i), (cube_j, values_j) = self._grid(i, points), self._grid(j, points)
        mean = np.mean([tree.means_of_pair(i, cube_i, j, cube_j) for tree in self._trees], axis=0)
        return Surface((self.columns[i], self.columns[j]), (values_i, values_j), self._unit.value(mean))

    def _place(self, name: str) -> int:
        return [column.name for column in self.columns].index(name)

    def _to_cube(self, j: int, unit: FloatArray) -> FloatArray:
        """A column of the unit matrix as positions in the cube, where each discrete value owns an equal share."""
        column = self.columns[j]
        if column.kind == CATEGORICAL:
            place = np.full(len(unit), np.nan)
            there = ~np.isnan(unit)
            place[there] = self._orders[j][unit[there].astype(int)]
            return np.asarray((place + 0.5) / column.size)
        if column.kind == REAL or column.log:
            return unit
        return np.asarray((unit * (column.size - 1) + 0.5) / column.size)

    def _grid(self, j: int, points: int) -> tuple[FloatArray, list[Any]]:
        """Positions in the cube, and the values there: every value if they are few, else evenly spaced ones."""
        column = self.columns[j]
        if column.choices:
            unit = np.arange(column.size, dtype=float)
            if column.kind != CATEGORICAL:
                unit = unit / (column.size - 1)
            return self._to_cube(j, unit), list(column.choices)
        few = 0 < column.size <= points and not column.log
        unit = np.linspace(0.0, 1.0, column.size if few else points)
        values = column.to_values(unit)
        if column.kind != REAL:
            values = np.unique(values)
            unit = column.to_unit(values)
            return self._to_cube(j, unit), [int(value) for value in values]
        return self._to_cube(j, unit), values.tolist()


class _Unit:
    """The way from objectives to numbers with mean 0 and variance 1, and back, without overflow or underflow.

    Attributes
    ----------
    standard
        The objectives as such numbers, shape (n,).
    """

    def __init__(self, y: FloatArray) -> None:
        # Powers of two lose no digit; the second one brings out differences that are small beside the values
        self._outer = int(np.frexp(np.abs(y).max())[1])
        scaled = np.ldexp(y, -self._outer)
        self._middle = float(scaled.mean())
        gaps = scaled - self._middle
        self._inner = int(np.frexp(np.abs(gaps).max())[1])
        gaps = np.ldexp(gaps, -self._inner)
        self._shift, self._deviation = float(gaps.mean()), float(gaps.std())
        self.standard: FloatArray = (gaps - self._shift) / self._deviation

    def value(self, standard: FloatArray) -> FloatArray:
        """Return objectives for standard numbers."""
        gaps = np.ldexp(standard * self._deviation + self._shift, self._inner)
        return np.asarray(np.ldexp(self._middle + gaps, self._outer))

    def difference(self, standard: FloatArray) -> FloatArray:
        """Return a difference of objectives for one of standard numbers."""
        return np.asarray(np.ldexp(standard * self._deviation, self._inner + self._outer))


def _order(column: Column, unit: FloatArray, y: FloatArray) -> FloatArray:
    """The place of each choice in the order of their mean objective; one without a trial has the mean of all."""
    if column.kind != CATEGORICAL:
        return np.zeros(0)
    means = [y[unit == choice].mean() if (unit == choice).any() else y.mean() for choice in range(column.size)]
    return np.argsort(np.argsort(means, kind="stable")).astype(float)


def _ranked(names: list[tuple[str, ...]], each: FloatArray, totals: FloatArray) -> list[Share]:
    """Shares from variances of shape (trees, names); a tree without a cut has none."""
    grown = totals > 0
    if not grown.any():
        return [Share(name, 0.0, 0.0) for name in names]
    shares = each[grown] / totals[grown, None]
    found = [
        Share(name, float(mean), float(std))
        for name, mean, std in zip(names, shares.mean(axis=0), shares.std(axis=0), strict=True)
    ]
    return sorted(found, key=lambda share: -share.share)


class _Boxes:
    """The leaves of a tree as boxes of the unit cube, L of them.

    Attributes
    ----------
    lower, upper
        Bounds, shape (L, d).
    value
        The tree's prediction in each box, shape (L,).
    """

    def __init__(self, tree: Any, width: int) -> None:
        lower, upper, value = [], [], []
        stack = [(0, np.zeros(width), np.ones(width))]
        while stack:
            node, low, high = stack.pop()
            if tree.children_left[node] < 0:
                lower.append(low)
                upper.append(high)
                value.append(tree.value[node, 0, 0])
                continue
            j, cut = tree.feature[node], tree.threshold[node]
            left, right = high.copy(), low.copy()
            left[j] = right[j] = cut
            stack += [(tree.children_left[node], low, left), (tree.children_right[node], right, high)]
        self.lower, self.upper, self.value = np.array(lower), np.array(upper), np.array(value)
        self._side = self.upper - self.lower
        self._volume = self._side.prod(axis=1)
        self.mean = float(self._volume @ self.value)
        self.variance = float(self._volume @ (self.value - self.mean) ** 2)

    def means(self, j: int, points: FloatArray) -> FloatArray:
        """Mean over all others at points of one hyperparameter, shape (len(points),)."""
        weight = self.value * self._volume / self._side[:, j]
        return np.asarray(weight @ self._inside(j, points))

    def means_of_pair(self, i: int, points_i: FloatArray, j: int, points_j: FloatArray) -> FloatArray:
        """Mean over all others at each pair of points, shape (len(points_i), len(points_j))."""
        weight = self.value * self._volume / (self._side[:, i] * self._side[:, j])
        return np.asarray((self._inside(i, points_i) * weight[:, None]).T @ self._inside(j, points_j))

    def variance_of(self, j: int) -> float:
        """Variance that one hyperparameter explains alone (eq. 5 of the paper)."""
        points, size = self._cells(j)
        return float(size @ (self.means(j, points) - self.mean) ** 2)

    def variance_of_pair(self, i: int, j: int) -> float:
        """Variance that two explain together, less what each does alone."""
        (points_i, size_i), (points_j, size_j) = self._cells(i), self._cells(j)
        if len(points_i) == 1 or len(points_j) == 1:
            return 0.0
        both = self.means_of_pair(i, points_i, j, points_j)
        alone_i, alone_j = both @ size_j, size_i @ both
        interaction = both - alone_i[:, None] - alone_j[None, :] + self.mean
        return float(size_i @ interaction**2 @ size_j)

    def _cells(self, j: int) -> tuple[FloatArray, FloatArray]:
        """Middles and sizes of the intervals between the cuts in one hyperparameter."""
        edges = np.unique(np.concatenate([self.lower[:, j], self.upper[:, j]]))
        return (edges[1:] + edges[:-1]) / 2, np.diff(edges)

    def _inside(self, j: int, points: FloatArray) -> FloatArray:
        inside = (self.lower[:, j, None] <= points) & (
            (points < self.upper[:, j, None]) | (self.upper[:, j, None] == 1)
        )
        return np.asarray(inside, dtype=np.float64)
