"""Surrogate models of the loss over the unit matrix of a problem; the only importer of scikit-optimize.

Losses are minimised here, as in scikit-optimize. A row of a unit matrix is one configuration: numeric columns lie in
[0, 1], a categorical column holds the index of the choice, and an inactive hyperparameter is NaN.

Each model is fitted by ``skopt.learning`` and evaluated here from its arrays, because a pool of candidates has to be
scored, and scored again under every lie, within milliseconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.stats import norm, rankdata

from deephyper_balsam.errors import InputError, SettingsError
from deephyper_balsam.space import INTEGER, Column
from deephyper_balsam.trial import Config

if TYPE_CHECKING:
    from skopt import OptimizeResult

    from deephyper_balsam.problem import HpProblem

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SURROGATES = ("RF", "ET", "GBRT", "GP")

FOREST_ROWS = 4000
"""Most rows that a forest learns; beyond it the best, the latest and a spread of the rest are kept."""
GP_ROWS = 256
"""Most rows that a Gaussian process learns; its fit costs the cube of it."""
ONE_HOT_CHOICES = 8
"""Up to this many choices a categorical becomes one column a choice for the trees; beyond it, one column of indices."""


# --- what the models see -------------------------------------------------------------------------------------------


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


# --- the contract --------------------------------------------------------------------------------------------------


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


# --- forests -------------------------------------------------------------------------------------------------------


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


# --- gradient boosting ---------------------------------------------------------------------------------------------


class BoostedSurrogate:
    """Gradient-boosted quantiles of scikit-optimize: the median, and the spread of the 16 % and 84 % quantiles."""

    def __init__(self, features: Features) -> None:
        self.features = features

    def fit(self, unit: FloatArray, z: FloatArray, seed: int) -> None:
        """Fit three quantile regressors on at most a quarter of `FOREST_ROWS` rows."""
        from skopt.learning import GradientBoostingQuantileRegressor
        from skopt.learning.gbrt import GradientBoostingRegressor

        rows = kept_rows(z, FOREST_ROWS // 4)
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


# --- Gaussian process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hyperparameters:
    """Of a Gaussian process with a Matern 5/2 kernel: one length a unit column, signal and noise variance."""

    lengths: FloatArray
    signal: float
    noise: float


_SQRT5 = math.sqrt(5.0)


def _matern(r2: FloatArray) -> FloatArray:
    """Matern 5/2 of squared scaled distances (Rasmussen and Williams 2006, eq. 4.17)."""
    r = np.sqrt(r2)
    r *= _SQRT5
    return np.asarray((1.0 + r + r2 * (5.0 / 3.0)) * np.exp(-r))


def fit_hyperparameters(shown: FloatArray, groups: IntArray, z: FloatArray, iterations: int = 40) -> Hyperparameters:
    """Maximum a posteriori of the marginal likelihood, by L-BFGS-B with analytic gradients.

    Rasmussen and Williams 2006, eq. 5.8 and 5.9, with the log-normal prior on the lengths of Hvarfner et al. 2024
    (arXiv:2402.02229, eq. 8), whose location grows with the dimension, and weak priors on signal and noise.

    Parameters
    ----------
    shown
        Features of the rows, shape (n, p).
    groups
        Column of the unit matrix behind each feature, shape (p,).
    z
        Standardised losses, shape (n,).
    iterations
        Most iterations of each start.
    """
    n, d = len(z), int(groups[-1]) + 1
    apart = np.zeros((d, n, n))
    for p, group in enumerate(groups):
        apart[group] += (shown[:, p, None] - shown[None, :, p]) ** 2
    flat = apart.reshape(d, n * n)
    mid_length, wide_length = math.sqrt(2.0) + 0.5 * math.log(d), math.sqrt(3.0)
    mid_noise, wide_noise = math.log(1e-4), 3.0
    eye = np.arange(n)

    def objective(theta: FloatArray) -> tuple[float, FloatArray]:
        inverse2 = np.exp(-2.0 * theta[:d])
        signal, noise = math.exp(theta[d]), math.exp(theta[d + 1])
        r2 = (inverse2 @ flat).reshape(n, n)
        r = _SQRT5 * np.sqrt(r2)
        decay = np.exp(-r)
        k = (1.0 + r + r2 * (5.0 / 3.0)) * decay
        covariance = signal * k
        covariance[eye, eye] += noise + 1e-10
        try:
            factor, _ = cho_factor(covariance, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            return 1e10, np.zeros(d + 2)
        alpha = cho_solve((factor, True), z, check_finite=False)
        half_log_det = float(np.log(np.diag(factor)).sum())
        inverse, _ = dpotri(factor, lower=1)
        inverse = np.tril(inverse) + np.tril(inverse, -1).T
        value = 0.5 * float(z @ alpha) + half_log_det
        weight = inverse - np.outer(alpha, alpha)
        gradient = np.empty(d + 2)
        slope = weight * ((signal * 5.0 / 3.0) * (1.0 + r) * decay)
        gradient[:d] = 0.5 * (flat @ slope.ravel()) * inverse2
        gradient[d] = 0.5 * signal * float((weight * k).sum())
        gradient[d + 1] = 0.5 * noise * float(np.trace(weight))
        away = (theta[:d] - mid_length) / wide_length
        value += 0.5 * float(away @ away) + 0.5 * theta[d] ** 2
        gradient[:d] += away / wide_length
        gradient[d] += theta[d]
        noisy = (theta[d + 1] - mid_noise) / wide_noise
        value += 0.5 * noisy**2
        gradient[d + 1] += noisy / wide_noise
        return value, gradient

    bounds = [(math.log(5e-3), math.log(1e3))] * d + [(math.log(1e-2), math.log(1e2)), (math.log(1e-8), 0.0)]
    best: tuple[float, FloatArray] | None = None
    # With few rows the posterior has several modes; with many one start finds the same one at half the cost.
    for start in (0.5, 0.15) if n < 64 else (0.3,):
        theta = np.concatenate([np.full(d, math.log(start * math.sqrt(d))), [0.0, math.log(1e-3)]])
        found = minimize(objective, theta, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": iterations})
        if best is None or found.fun < best[0]:
            best = (float(found.fun), found.x)
    assert best is not None
    theta = best[1]
    return Hyperparameters(np.exp(theta[:d]), math.exp(theta[d]), math.exp(theta[d + 1]))


def fit_gp_hyperparameters(features: Features, unit: FloatArray, z: FloatArray, most: int = 160) -> Hyperparameters:
    """Hyperparameters of a Gaussian process for these rows, from at most `most` of them."""
    rows = kept_rows(z, most)
    return fit_hyperparameters(features.for_gp(unit[rows]), features.groups, z[rows])


class GPSurrogate:
    """Gaussian process of scikit-optimize, Matern 5/2 with one length a hyperparameter.

    Parameters
    ----------
    features
        How to show the unit matrix to the kernel.
    hyperparameters
        Fixed hyperparameters, or None to fit them to the data of each `fit`.
    """

    def __init__(self, features: Features, hyperparameters: Hyperparameters | None = None) -> None:
        self.features = features
        self.hyperparameters = hyperparameters

    def fit(self, unit: FloatArray, z: FloatArray, seed: int) -> None:
        """Fit on at most `GP_ROWS` rows. Nothing is drawn at random, so `seed` changes nothing."""
        from skopt.learning import GaussianProcessRegressor
        from skopt.learning.gaussian_process.kernels import ConstantKernel, Matern

        rows = kept_rows(z, GP_ROWS)
        shown, known = self.features.for_gp(unit[rows]), z[rows]
        groups = self.features.groups
        h = self.hyperparameters or fit_hyperparameters(shown, groups, known)
        self.fitted = h
        self._inverse_lengths = 1.0 / h.lengths[groups]
        noise = h.noise
        while True:
            kernel = ConstantKernel(h.signal, "fixed") * Matern(h.lengths[groups], "fixed", nu=2.5)
            model = GaussianProcessRegressor(kernel=kernel, alpha=noise + 1e-10, optimizer=None, normalize_y=False)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model.fit(shown, known)
                break
            except LinAlgError:
                noise = max(noise, 1e-10) * 10.0
        self._noise = noise
        self._signal = h.signal
        self._train = shown * self._inverse_lengths
        self._factor = np.asarray(model.L_)
        self._alpha = np.asarray(model.alpha_).ravel()

    def covariance(self, shown: FloatArray, others: FloatArray) -> FloatArray:
        """Prior covariance between two sets of scaled features, shape (m, k)."""
        return self._signal * _matern(cdist(shown, others, "sqeuclidean"))

    def scaled(self, unit: FloatArray) -> FloatArray:
        """Features of the rows divided by the lengths, shape (m, p)."""
        return self.features.for_gp(unit) * self._inverse_lengths

    def whitened(self, scaled: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Posterior mean (m,) and the solved cross-covariance ``L^-1 k``, shape (n, m)."""
        cross = self.covariance(self._train, scaled)
        mean = cross.T @ self._alpha
        return mean, np.asarray(solve_triangular(self._factor, cross, lower=True, check_finite=False, overwrite_b=True))

    def predict(self, unit: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and standard deviation of the latent function (Rasmussen and Williams 2006, alg. 2.1)."""
        mean, solved = self.whitened(self.scaled(unit))
        return mean, np.sqrt(np.maximum(self._signal - np.einsum("ij,ij->j", solved, solved), 1e-14))

    def pool(self, unit: FloatArray) -> GPPool:
        """See `Surrogate.pool`."""
        return GPPool(self, unit)

    def lcb_gradient(
        self, row: FloatArray, free: IntArray, kappa: float
    ) -> Callable[[FloatArray], tuple[float, FloatArray]]:
        """Lower confidence bound and its gradient as a function of some numeric columns of one row.

        Parameters
        ----------
        row
            The configuration, shape (d,).
        free
            The numeric columns that move, shape (k,).
        kappa
            Standard deviations to subtract.
        """
        columns = np.searchsorted(self.features.groups, free)
        inverse = self._inverse_lengths[columns]
        point = self.scaled(row[None, :])[0]

        def bound(values: FloatArray) -> tuple[float, FloatArray]:
            point[columns] = values * inverse
            gap = point - self._train
            r2 = np.einsum("ij,ij->i", gap, gap)
            r = _SQRT5 * np.sqrt(r2)
            decay = np.exp(-r)
            cross = self._signal * (1.0 + r + r2 * (5.0 / 3.0)) * decay
            slope = (-self._signal * 5.0 / 3.0 * (1.0 + r) * decay)[:, None] * (gap[:, columns] * inverse)
            value, gradient = float(cross @ self._alpha), slope.T @ self._alpha
            if kappa > 0:
                solved = cho_solve((self._factor, True), cross, check_finite=False)
                std = math.sqrt(max(self._signal - float(cross @ solved), 1e-14))
                value -= kappa * std
                gradient = gradient + (kappa / std) * (slope.T @ solved)
            return value, gradient

        return bound


class GPPool:
    """Points under the joint posterior; a lie conditions it exactly by one more row of the Cholesky factor.

    With the model's own mean as lie this is the hallucination of GP-BUCB (Desautels et al. 2014, JMLR 15, eq. 9).
    """

    def __init__(self, model: GPSurrogate, unit: FloatArray) -> None:
        self._model = model
        # A lie that contradicts a noiseless model would make it swing between its points.
        self._noise = max(model._noise, 1e-6)
        self._points = model.scaled(unit)
        self.mean, self._solved = model.whitened(self._points)
        self._variance = model._signal - np.einsum("ij,ij->j", self._solved, self._solved)
        self._chosen = np.empty(0, dtype=np.int64)  # the points lied about, in order; one row, one step each
        self._steps: FloatArray = np.empty(0)
        self._rows: FloatArray = np.empty((0, len(unit)))
        self._blocks: list[FloatArray] = []  # Cholesky factors of the blocks in which the lies were told
        self.std = np.sqrt(np.maximum(self._variance, 1e-14))

    def lie(self, indices: Sequence[int], value: float | None) -> None:
        """See `Pool.lie`. One block of the Cholesky factor, so that hundreds of lies cost one matrix product."""
        chosen, known = np.array(indices, dtype=np.int64), len(self._chosen)
        if not len(chosen):
            return
        gaps = np.zeros(len(chosen)) if value is None else value - self.mean[chosen]
        rows = self._model.covariance(self._points[chosen], self._points)
        rows -= self._solved[:, chosen].T @ self._solved
        rows -= self._rows[:known, chosen].T @ self._rows[:known]
        block = rows[:, chosen]
        block[np.diag_indices(len(chosen))] = np.maximum(np.diag(block), 0.0) + self._noise
        factor = np.linalg.cholesky(block)
        rows = solve_triangular(factor, rows, lower=True, check_finite=False)
        steps = solve_triangular(factor, gaps, lower=True, check_finite=False)
        self._keep(rows)
        self._chosen = np.concatenate([self._chosen, chosen])
        self._steps = np.concatenate([self._steps, steps])
        self._blocks.append(np.asarray(factor, dtype=np.float64))
        self.mean += steps @ rows
        self._variance -= np.einsum("ij,ij->j", rows, rows)
        self.std = np.sqrt(np.maximum(self._variance, 1e-14))

    def _keep(self, rows: FloatArray) -> None:
        known, needed = len(self._chosen), len(self._chosen) + len(rows)
        if needed > len(self._rows):
            grown = np.empty((max(needed, 2 * known, 8), rows.shape[1]))
            grown[:known] = self._rows[:known]
            self._rows = grown
        self._rows[known:needed] = rows

    def extend(self, unit: FloatArray) -> None:
        """See `Pool.extend`."""
        fresh = self._model.scaled(unit)
        mean, solved = self._model.whitened(fresh)
        variance = self._model._signal - np.einsum("ij,ij->j", solved, solved)
        known = len(self._chosen)
        rows = self._model.covariance(self._points[self._chosen], fresh)
        rows -= self._solved[:, self._chosen].T @ solved
        done = 0
        for factor in self._blocks:
            here = slice(done, done + len(factor))
            rows[here] -= self._rows[:done, self._chosen[here]].T @ rows[:done]
            rows[here] = solve_triangular(factor, rows[here], lower=True, check_finite=False)
            done += len(factor)
        mean += self._steps @ rows
        variance -= np.einsum("ij,ij->j", rows, rows)
        self._points = np.vstack([self._points, fresh])
        self._solved = np.hstack([self._solved, solved])
        self._rows = np.hstack([self._rows[:known], rows])
        self._variance = np.concatenate([self._variance, variance])
        self.mean = np.concatenate([self.mean, mean])
        self.std = np.sqrt(np.maximum(self._variance, 1e-14))


# --- no model yet --------------------------------------------------------------------------------------------------


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


# --- ways in and out -----------------------------------------------------------------------------------------------


def make_surrogate(name: str, features: Features, hyperparameters: Hyperparameters | None = None) -> Surrogate:
    """A surrogate by its name, one of `SURROGATES`.

    Raises
    ------
    SettingsError
        If there is no surrogate of that name.
    """
    if name in ("RF", "ET"):
        return ForestSurrogate(features, name)
    if name == "GBRT":
        return BoostedSurrogate(features)
    if name == "GP":
        return GPSurrogate(features, hyperparameters)
    raise SettingsError(f"`surrogate` must be one of {', '.join(SURROGATES)}, but got {name!r}.")


def to_optimize_result(problem: HpProblem, configs: Sequence[Config], objectives: Sequence[float]) -> OptimizeResult:
    """The history as scikit-optimize knows it, for its plots; objectives are turned into losses.

    Parameters
    ----------
    problem
        The problem, which gives the dimensions. A hyperparameter that is inactive in a configuration takes its default.
    configs, objectives
        What was evaluated with success, in the order told; objectives are maximised.

    Returns
    -------
    skopt.OptimizeResult
        With ``x``, ``fun``, ``x_iters``, ``func_vals`` and ``space``, and a fitted model in ``models``.

    Raises
    ------
    InputError
        If there is no successful evaluation.
    """
    from skopt.learning import RandomForestRegressor
    from skopt.space import Space
    from skopt.utils import create_result

    if not len(objectives):
        raise InputError("A result for scikit-optimize needs at least one successful evaluation, but got none.")
    columns = problem.encoder.columns
    space = Space([_dimension(column) for column in columns])
    defaults = {column.name: value for column, value in zip(columns, _default_values(columns), strict=True)}
    points = [[config.get(column.name, defaults[column.name]) for column in columns] for config in configs]
    losses = [-float(objective) for objective in objectives]
    result = create_result(points, losses, space)
    model = RandomForestRegressor(n_estimators=50, min_samples_leaf=min(3, len(losses)), random_state=0)
    model.fit(space.transform(points), np.array(losses))
    result.models = [model]
    return result


def _default_values(columns: Sequence[Column]) -> list[Any]:
    values = [float(column.to_values(np.array([column.default]))[0]) for column in columns]
    return [
        column.choices[int(value)] if column.choices else int(value) if column.kind == INTEGER else value
        for column, value in zip(columns, values, strict=True)
    ]


def _dimension(column: Column) -> Any:
    from skopt.space import Categorical, Integer, Real

    prior = "log-uniform" if column.log else "uniform"
    if column.choices:
        return Categorical(list(column.choices), name=column.name)
    if column.kind == INTEGER:
        return Integer(int(column.lower), int(column.upper), prior=prior, name=column.name)
    return Real(column.lower, column.upper, prior=prior, name=column.name)
