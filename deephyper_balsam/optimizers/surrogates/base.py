"""What every surrogate is shown, and the contract that it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ONE_HOT_CHOICES = 8
"""Up to this many choices a categorical becomes one column a choice for the trees; beyond it, one column of indices."""


@dataclass(frozen=True)
class Features:
    """How the columns of a unit matrix are shown to trees and to Gaussian processes.

    Attributes
    ----------
    choices
        For each column the number of choices if it is categorical, otherwise 0.
    """

    choices: tuple[int, ...]

    def for_trees(self, unit: FloatArray) -> NDArray[np.float32]:
        """Columns for axis-aligned splits, shape (n, p); an inactive value is -1, which one split sets apart."""
        columns: list[FloatArray] = []
        for j, count in enumerate(self.choices):
            column = unit[:, j]
            if 2 < count <= ONE_HOT_CHOICES:
                columns.append((column[:, None] == np.arange(count)).astype(float))
            else:
                columns.append(np.where(np.isnan(column), -1.0, column)[:, None])
        return np.ascontiguousarray(np.hstack(columns), dtype=np.float32)

    def for_gp(self, unit: FloatArray) -> FloatArray:
        """Columns for a stationary kernel, shape (n, p).

        A categorical becomes one column a choice, scaled so that two different choices are at distance 1; an inactive
        number stands at the centre of its range, and an inactive categorical at none of its choices.
        """
        columns: list[FloatArray] = []
        for j, count in enumerate(self.choices):
            column = unit[:, j]
            if count:
                columns.append((column[:, None] == np.arange(count)) * math.sqrt(0.5))
            else:
                columns.append(np.where(np.isnan(column), 0.5, column)[:, None])
        return np.ascontiguousarray(np.hstack(columns), dtype=np.float64)

    @property
    def groups(self) -> IntArray:
        """For each column of `for_gp` the column of the unit matrix it came from, shape (p,)."""
        return np.repeat(np.arange(len(self.choices)), [max(1, count) for count in self.choices])


def warp(losses: FloatArray) -> FloatArray:
    """Losses on a scale that a surrogate can learn: mean 0, standard deviation 1, order kept.

    The data decide. Above the median a loss is compressed by ``log(1 + u)`` of its distance u in units of the distance
    from the median to the 5 % quantile, so that terrible configurations do not flatten the good ones, which stay
    linear. If outliers remain (losses over many orders of magnitude), the normal scores of the ranks are taken instead.

    Parameters
    ----------
    losses
        Finite losses, shape (n,), n >= 1.

    Returns
    -------
    FloatArray
        Shape (n,); all 0 when the losses are equal.
    """
    low, high = float(losses.min()), float(losses.max())
    if low == high:
        return np.zeros(len(losses))
    scale = max(abs(low), abs(high))
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        scaled = losses / scale
        middle = float(np.median(scaled))
        unit = middle - float(np.quantile(scaled, 0.05))
        offset = (scaled - middle) / unit
        z = np.where(offset > 0, np.log1p(np.maximum(offset, 0.0)), offset)
        spread = float(z.std())
        if unit > 1e-12 and np.isfinite(spread) and spread > 0:
            z = (z - z.mean()) / spread
            if np.abs(z).max() < 8.0 and len(np.unique(z)) * 2 > len(np.unique(losses)):
                return np.asarray(z)
    z = norm.ppf((rankdata(losses) - 0.5) / len(losses))
    return np.asarray((z - z.mean()) / z.std())


def kept_rows(z: FloatArray, most: int) -> IntArray:
    """Rows that a bounded model learns, ascending: half the best, a quarter the latest, a quarter spread over all.

    Costs O(n) and draws nothing at random, so that it is a function of the history.
    """
    n = len(z)
    if n <= most:
        return np.arange(n)
    best = np.argpartition(z, most // 2)[: most // 2]
    latest = np.arange(n - most // 4, n)
    spread = np.linspace(0, n - 1, most - most // 2 - most // 4).astype(np.int64)
    return np.unique(np.concatenate([best, latest, spread]))


class Pool(Protocol):
    """The surrogate's view of a fixed set of points, which can be told lies about some of them.

    `mean` and `std` have shape (m,) and are on the warped scale; `lie` updates them in place as if the point had been
    evaluated. A lie is never part of the fitted model.
    """

    mean: FloatArray
    std: FloatArray

    def lie(self, indices: Sequence[int], value: float | None) -> None:
        """Take points as evaluated with `value`, one after another; None: the model's own mean there (a believer)."""
        ...

    def extend(self, unit: FloatArray) -> None:
        """Add points, which see the lies told so far."""
        ...


class Surrogate(Protocol):
    """A regression model with uncertainty over unit matrices."""

    def fit(self, unit: FloatArray, z: FloatArray, seed: int) -> None:
        """Learn the warped losses `z` (n,) of the rows of `unit` (n, d); a function of its arguments alone."""
        ...

    def predict(self, unit: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation at the rows of `unit`, shape (m,) each."""
        ...

    def pool(self, unit: FloatArray) -> Pool:
        """The rows of `unit` as a set that can be lied about."""
        ...
