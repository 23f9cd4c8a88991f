"""Random forests and extremely randomised trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deephyper_balsam.optimizers.surrogates.base import Features, FloatArray, IntArray, kept_rows

FOREST_ROWS = 4000
"""Most rows that a forest learns; beyond it the best, the latest and a spread of the rest are kept."""


class ForestSurrogate:
    """Random forest or extremely randomised trees with the variance of Hutter et al. 2014 (arXiv:1211.0906, eq. 4).

    Parameters
    ----------
    features
        How to show the unit matrix to the trees.
    kind
        ``"RF"`` (best splits on bootstrap samples) or ``"ET"`` (random splits).
    num_trees
        Number of trees.
    """

    def __init__(self, features: Features, kind: str, num_trees: int = 24) -> None:
        self.features = features
        self.kind = kind
        self.num_trees = num_trees

    def fit(self, unit: FloatArray, z: FloatArray, seed: int) -> None:
        """Fit on at most `FOREST_ROWS` rows; leaves grow with the logarithm of the history."""
        from skopt.learning import ExtraTreesRegressor, RandomForestRegressor

        rows = kept_rows(z, FOREST_ROWS)
        n = len(rows)
        leaf = 1 if n < 200 else 2 if n < 1000 else 3
        options: dict[str, Any] = {
            "n_estimators": self.num_trees,
            "min_samples_leaf": leaf,
            "random_state": seed,
            "n_jobs": 1,
        }
        if self.kind == "RF":
            model = RandomForestRegressor(bootstrap=True, max_features=0.6, **options)
            most = 400
        else:
            most = 800
            model = ExtraTreesRegressor(bootstrap=n > most, max_features=0.6, **options)
        if n > most:
            model.max_samples = most  # scikit-optimize's constructors do not know this option of scikit-learn's
        model.fit(self.features.for_trees(unit[rows]), z[rows])
        self._trees = [estimator.tree_ for estimator in model.estimators_]
        self._values = [tree.value[:, 0, 0] for tree in self._trees]
        self._impurities = [tree.impurity for tree in self._trees]
        self._counts = [tree.weighted_n_node_samples for tree in self._trees]

    def leaves(self, unit: FloatArray) -> tuple[NDArray[np.int64], FloatArray, FloatArray, FloatArray]:
        """Leaf index, mean, variance and number of samples, per tree and row, shape (trees, m) each."""
        shown = self.features.for_trees(unit)
        index = np.stack([tree.apply(shown) for tree in self._trees]).astype(np.int64)
        each = range(len(self._trees))
        mean = np.stack([self._values[t][index[t]] for t in each])
        variance = np.stack([self._impurities[t][index[t]] for t in each])
        count = np.stack([self._counts[t][index[t]] for t in each])
        return index, mean, variance, count

    def predict(self, unit: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean over the trees, and the root of the mean leaf variance plus the variance of the leaf means."""
        _, mean, variance, _ = self.leaves(unit)
        return _forest_moments(mean, variance)

    def pool(self, unit: FloatArray) -> ForestPool:
        """See `Surrogate.pool`."""
        return ForestPool(self, unit)


def _forest_moments(mean: FloatArray, variance: FloatArray) -> tuple[FloatArray, FloatArray]:
    trees = len(mean)
    centre = mean.sum(axis=0) / trees
    gap = mean - centre
    return centre, np.sqrt(np.maximum((variance.sum(axis=0) + (gap * gap).sum(axis=0)) / trees, 1e-12))


class ForestPool:
    """Points in the leaves of a forest; a lie joins its leaf in every tree, without growing the trees anew."""

    def __init__(self, forest: ForestSurrogate, unit: FloatArray) -> None:
        self._forest = forest
        self._lies: list[tuple[int, float]] = []
        self._set(*forest.leaves(unit))

    def _set(self, index: IntArray, mean: FloatArray, variance: FloatArray, count: FloatArray) -> None:
        self._index = index.astype(np.int32)
        self._mean, self._variance, self._count = mean, variance, count
        # Sums over the trees, so that a lie costs only the cells that it touches.
        self._first, self._second = mean.sum(axis=0), (variance + mean * mean).sum(axis=0)
        self._moments()

    def _moments(self) -> None:
        trees = len(self._index)
        self.mean = self._first / trees
        self.std = np.sqrt(np.maximum(self._second / trees - self.mean * self.mean, 1e-12))

    def lie(self, indices: Sequence[int], value: float | None) -> None:
        """See `Pool.lie`. Costs O(trees x points) comparisons a point."""
        for index in indices:
            told = float(self.mean[index]) if value is None else value
            self._lies.append((index, told))
            self._join(self._index == self._index[:, index, None], told)
            self._moments()

    def _join(self, same: NDArray[np.bool_], told: float) -> None:
        cells = np.flatnonzero(same)
        count, mean, variance = (a.ravel()[cells] for a in (self._count, self._mean, self._variance))
        share = 1.0 / (count + 1.0)
        gap = told - mean
        moved, spread = mean + gap * share, (variance + gap * gap * share) * (1.0 - share)
        for array, fresh in ((self._count, count + 1.0), (self._mean, moved), (self._variance, spread)):
            array.reshape(-1)[cells] = fresh
        points, size = cells % same.shape[1], same.shape[1]
        self._first += np.bincount(points, moved - mean, size)
        self._second += np.bincount(points, spread - variance + moved * moved - mean * mean, size)

    def extend(self, unit: FloatArray) -> None:
        """See `Pool.extend`."""
        old = self._index.shape[1]
        index, mean, variance, count = self._forest.leaves(unit)
        self._set(
            np.hstack([self._index, index]),
            np.hstack([self._mean, mean]),
            np.hstack([self._variance, variance]),
            np.hstack([self._count, count]),
        )
        for point, told in self._lies:
            same = self._index == self._index[:, point, None]
            same[:, :old] = False
            self._join(same, told)
        self._moments()
