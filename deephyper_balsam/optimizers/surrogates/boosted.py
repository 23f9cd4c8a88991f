"""Gradient-boosted quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from deephyper_balsam.optimizers.surrogates.base import Features, FloatArray, kept_rows

BOOSTED_ROWS = 1000
"""Most rows that the boosted trees learn."""


class BoostedSurrogate:
    """Gradient-boosted quantiles of scikit-optimize: the median, and the spread of the 16 % and 84 % quantiles."""

    def __init__(self, features: Features) -> None:
        self.features = features

    def fit(self, unit: FloatArray, z: FloatArray, seed: int) -> None:
        """Fit three quantile regressors on at most `BOOSTED_ROWS` rows."""
        from skopt.learning import GradientBoostingQuantileRegressor
        from skopt.learning.gbrt import GradientBoostingRegressor

        rows = kept_rows(z, BOOSTED_ROWS)
        base = GradientBoostingRegressor(
            n_estimators=30, loss="quantile", max_depth=3, min_samples_leaf=min(3, len(rows)), subsample=0.8
        )
        self._model = GradientBoostingQuantileRegressor(base_estimator=base, n_jobs=1, random_state=seed)
        self._model.fit(self.features.for_trees(unit[rows]), z[rows])

    def predict(self, unit: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The median and half the distance between the outer quantiles."""
        low, middle, high = np.asarray(self._model.predict(self.features.for_trees(unit), return_quantiles=True)).T
        return np.asarray(middle, dtype=float), np.maximum(np.abs(high - low) / 2, 1e-6)

    def pool(self, unit: FloatArray) -> BoostedPool:
        """See `Surrogate.pool`."""
        return BoostedPool(self, unit)


class BoostedPool:
    """Points of a model without a joint distribution: a lie is spread to its neighbours by a Gaussian kernel.

    It is the local penalisation of Gonzalez et al. 2016 (arXiv:1505.08052) with a fixed width, 0.1 of the diagonal.
    """

    def __init__(self, model: BoostedSurrogate, unit: FloatArray) -> None:
        self._model = model
        self._points = model.features.for_gp(unit)
        self._lies: list[tuple[int, float]] = []
        self._width = 0.1 * math.sqrt(len(model.features.choices))
        self.mean, self.std = model.predict(unit)

    def lie(self, indices: Sequence[int], value: float | None) -> None:
        """See `Pool.lie`."""
        for index in indices:
            told = float(self.mean[index]) if value is None else value
            self._lies.append((index, told))
            self._spread(index, told, slice(None))

    def _spread(self, index: int, told: float, points: slice) -> None:
        away = ((self._points[points] - self._points[index]) ** 2).sum(axis=1)
        near = np.exp(-away / (2 * self._width**2))
        self.mean[points] += near * (told - self.mean[points])
        self.std[points] *= np.sqrt(np.maximum(1.0 - near * near, 1e-6))

    def extend(self, unit: FloatArray) -> None:
        """See `Pool.extend`."""
        old = len(self.mean)
        self._points = np.vstack([self._points, self._model.features.for_gp(unit)])
        mean, std = self._model.predict(unit)
        self.mean, self.std = np.concatenate([self.mean, mean]), np.concatenate([self.std, std])
        for index, told in self._lies:
            self._spread(index, told, slice(old, None))
