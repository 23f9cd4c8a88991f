"""What stands for a surrogate while nothing is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist

from deephyper_balsam.optimizers.surrogates.base import Features, FloatArray


class DistancePool:
    """Points of which nothing is known but how far each is from what was tried, which stands for the deviation."""

    def __init__(self, features: Features, tried: FloatArray, unit: FloatArray) -> None:
        self._features = features
        self._tried = features.for_gp(tried)
        self._points = features.for_gp(unit)
        self.mean = np.zeros(len(unit))
        self.std = self._away(self._points)

    def _away(self, points: FloatArray) -> FloatArray:
        if not len(self._tried):
            return np.ones(len(points))
        return np.asarray(cdist(points, self._tried).min(axis=1))

    def lie(self, indices: Sequence[int], value: float | None) -> None:
        """See `Pool.lie`; only the places matter."""
        if len(indices):
            at = self._points[list(indices)]
            self._tried = np.vstack([self._tried, at])
            self.std = np.minimum(self.std, cdist(self._points, at).min(axis=1))

    def extend(self, unit: FloatArray) -> None:
        """See `Pool.extend`."""
        fresh = self._features.for_gp(unit)
        self._points = np.vstack([self._points, fresh])
        self.mean = np.zeros(len(self._points))
        self.std = np.concatenate([self.std, self._away(fresh)])
