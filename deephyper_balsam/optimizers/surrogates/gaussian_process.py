"""Gaussian processes: their hyperparameters, their posterior, and lies that condition it exactly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from deephyper_balsam.optimizers.surrogates.base import Features, FloatArray, IntArray, kept_rows

GP_ROWS = 256
"""Most rows that a Gaussian process learns; its fit costs the cube of it."""


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
