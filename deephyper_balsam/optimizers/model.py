"""What a history of results teaches: a fitted surrogate and a pool of candidates to choose the next trials from.

A `Model` is a function of the problem, the settings, the seed and the results learnt, in the order told. It is built
away from `ask`, which only scores the pool, so that no node waits for a fit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from deephyper_balsam.optimizers.acquisition import Criterion, Neighbourhood, candidate_pool, score
from deephyper_balsam.optimizers.stopped import Curves, finals
from deephyper_balsam.optimizers.surrogates import (
    DistancePool,
    Features,
    ForestSurrogate,
    GPSurrogate,
    Hyperparameters,
    Pool,
    Surrogate,
    fit_gp_hyperparameters,
    make_surrogate,
    warp,
)
from deephyper_balsam.problem.space import CATEGORICAL

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

log = logging.getLogger(__name__)

_OUTSIDE = 1e6
MOST_LIES = 1024
"""More running trials one model is not told of: each costs more than the one before, and the next model is near."""
_ROUGH = 0.03
"""Noise variance of the warped losses above which ``"auto"`` gives every other model to a forest.

A Gaussian process refines smooth losses far beyond any forest, but on a jagged one (the training of boosted trees with
subsampling) it goes on where it was lucky; the two together do better than either.
"""
ELITES = 24
"""How many of the best configurations are moved to make candidates."""


@dataclass(frozen=True)
class Losses:
    """Results in the order told.

    Attributes
    ----------
    unit
        Canonical rows, shape (n, d).
    losses
        Losses to minimise, shape (n,); NaN where a trial failed.
    curves
        What the runs recorded, maximised; None: nothing.
    amended
        How many of them are final results that took the place of stopped ones.
    """

    unit: FloatArray
    losses: FloatArray
    curves: Curves | None = None
    amended: int = 0

    def __len__(self) -> int:
        return len(self.losses)

    def first(self, n: int) -> Losses:
        """The first `n` results."""
        curves = None if self.curves is None else self.curves.first(n)
        return Losses(self.unit[:n], self.losses[:n], curves, self.amended)

    @property
    def finished(self) -> Losses:
        """The losses that each run reached, or would have if it had not been stopped early."""
        return Losses(self.unit, -finals(-self.losses, self.curves), None, self.amended)


class Feasibility:
    """Where configurations fail: extremely randomised trees on what failed and what did not.

    Their small chances are taken as none. Among good configurations the trees say 0.04 here and 0.08 there for no
    reason, and a twentieth of the distance to the worst loss would hide all differences between the best.
    """

    _CLEARLY = 0.2

    def __init__(self, features: Features, history: Losses, seed: int) -> None:
        self._forest = ForestSurrogate(features, "ET")
        self._forest.fit(history.unit, np.isnan(history.losses).astype(float), seed)

    def chance_of_failure(self, rows: FloatArray) -> FloatArray:
        """Probability that each row fails, shape (m,); 0 where the trees give less than a fifth."""
        raw = self._forest.predict(rows)[0]
        return np.asarray(np.maximum(raw - self._CLEARLY, 0.0) / (1.0 - self._CLEARLY))


def refit_point(n: int) -> int:
    """The history length whose hyperparameters a Gaussian process of `n` results uses: at most an eighth, or 256, less.

    It depends on `n` alone, so a search rebuilt from its history uses the hyperparameters that the first run used.
    """
    step = min(256, 1 << max(0, int(math.log2(max(1, n))) - 3))
    return n - n % step


class Teacher:
    """Builds models of one problem; keeps the hyperparameters that it fitted, which any other teacher would fit alike.

    Parameters
    ----------
    near
        The space and its moves.
    surrogate
        One of `surrogates.SURROGATES`, or ``"auto"``: a Gaussian process, and a forest in turn with it where the
        losses are rough.
    pool_size
        How many candidates a model keeps.
    seed
        The search's seed.
    """

    def __init__(self, near: Neighbourhood, surrogate: str, pool_size: int, seed: int) -> None:
        self.near = near
        self.features = Features(tuple(c.size if c.kind == CATEGORICAL else 0 for c in near.encoder.columns))
        self.surrogate = surrogate
        self.pool_size = pool_size
        self.seed = seed
        self._hyperparameters: tuple[int, int, Hyperparameters] | None = None

    def learn(self, history: Losses, criteria: tuple[Criterion, ...]) -> Model:
        """Fit a surrogate to the history and gather its candidates, by local search under each of `criteria`.

        Never raises on degenerate data: without a single success, or with equal losses, the candidates are those
        farthest from what failed or was tried.
        """
        told, history = history, history.finished
        n = len(history)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(n, 1)))
        seed = int(rng.integers(2**31))
        good = np.flatnonzero(~np.isnan(history.losses))
        feasibility = Feasibility(self.features, history, seed) if 0 < len(good) < n else None
        z = warp(history.losses[good]) if len(good) else np.empty(0)
        if not len(good) or np.ptp(z) == 0.0:
            return self._unlearned(history, rng, feasibility)
        surrogate = self._fitted(told, history.unit[good], z, seed)
        return self._pooled(history, good, z, surrogate, feasibility, rng, criteria)

    def _fitted(self, told: Losses, unit: FloatArray, z: FloatArray, seed: int) -> Surrogate:
        kind, hyperparameters = self.surrogate, None
        if kind in ("GP", "auto"):
            hyperparameters = self._hyperparameters_for(told)
            rough = hyperparameters.noise > _ROUGH and len(told) % 2 == 0
            kind = "RF" if kind == "auto" and rough else "GP"
        surrogate = make_surrogate(kind, self.features, hyperparameters)
        surrogate.fit(unit, z, seed)
        return surrogate

    def _hyperparameters_for(self, told: Losses) -> Hyperparameters:
        # What stopped runs would have reached is reckoned from the first results alone, too: a search that goes on, and
        # knows more by then, comes to the same
        point, amended = refit_point(len(told)), told.amended
        if self._hyperparameters is None or self._hyperparameters[:2] != (point, amended):
            past = told.first(point).finished
            good = ~np.isnan(past.losses)
            if not good.any():
                past = told.finished
                good = ~np.isnan(past.losses)
            found = fit_gp_hyperparameters(self.features, past.unit[good], warp(past.losses[good]))
            self._hyperparameters = (point, amended, found)
        return self._hyperparameters[2]

    def _pooled(
        self,
        history: Losses,
        good: IntArray,
        z: FloatArray,
        surrogate: Surrogate,
        feasibility: Feasibility | None,
        rng: np.random.Generator,
        criteria: tuple[Criterion, ...],
    ) -> Model:
        order = np.argsort(z, kind="stable")
        elites = history.unit[good[order[:ELITES]]]
        best, worst = float(z[order[0]]), float(z[order[-1]])

        def scorer(rows: FloatArray) -> FloatArray:
            mean, std = surrogate.predict(rows)
            fail = feasibility.chance_of_failure(rows) if feasibility is not None else None
            away = self.near.away(rows, elites[0])
            scores = [score(c.acq_func, mean, std, best, c.kappa, c.xi, fail, worst) for c in criteria]
            return np.stack(
                [s + np.where(c.excludes(rows, away), _OUTSIDE, 0.0) for s, c in zip(scores, criteria, strict=True)]
            )

        rows, scores = candidate_pool(self.near, elites, scorer, rng)
        if isinstance(surrogate, GPSurrogate):
            polished = self._polish(surrogate, elites[0], rows[np.argmin(scores, axis=1)], criteria)
            rows, scores = np.vstack([rows, polished]), np.hstack([scores, scorer(polished)])
        rows = rows[self._kept(scores, rng)]
        keys = self.near.encoder.keys(rows)
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        rows = rows[sorted(first.values())]
        fail = feasibility.chance_of_failure(rows) if feasibility is not None else None
        away = self.near.away(rows, elites[0])
        return Model(len(history), rows, self.near.encoder.keys(rows), surrogate.pool(rows), fail, z, away)

    def _kept(self, scores: FloatArray, rng: np.random.Generator) -> IntArray:
        """The best half of the pool under all criteria in turn, and a random half of the rest."""
        m = scores.shape[1]
        if m <= self.pool_size:
            return np.arange(m)
        each = self.pool_size // (2 * len(scores))
        best = np.unique(np.argpartition(scores, each, axis=1)[:, :each])
        rest = np.setdiff1d(np.arange(m), best)
        return np.concatenate([best, rng.permutation(rest)[: self.pool_size - len(best)]])

    def _polish(
        self, surrogate: GPSurrogate, centre: FloatArray, starts: FloatArray, criteria: tuple[Criterion, ...]
    ) -> FloatArray:
        """Each start moved downhill in its real columns under its criterion, by L-BFGS-B on the GP's gradient."""
        out = [starts]
        for start, criterion in zip(starts, criteria, strict=True):
            free = np.flatnonzero(self.near.real & ~np.isnan(start))
            if criterion.acq_func != "LCB" or not len(free):
                continue
            low, high = np.zeros(len(free)), np.ones(len(free))
            if np.isfinite(criterion.radius):
                around = np.where(np.isnan(centre[free]), start[free], centre[free])
                low, high = np.maximum(low, around - criterion.radius), np.minimum(high, around + criterion.radius)
            fun = surrogate.lcb_gradient(start, free, criterion.kappa)
            box = list(zip(low, high, strict=True))
            found = minimize(fun, start[free], jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": 20})
            row = start.copy()
            row[free] = np.clip(found.x, 0.0, 1.0)
            out.append(row[None, :])
        return self.near.legal(np.vstack(out))

    def _unlearned(self, history: Losses, rng: np.random.Generator, feasibility: Feasibility | None) -> Model:
        """A pool without a model of the loss: the farther from what was tried, the better."""
        rows = self.near.encoder.sample(self.pool_size, rng, partial=True)
        fail = feasibility.chance_of_failure(rows) if feasibility is not None else None
        pool = DistancePool(self.features, history.unit[-512:], rows)
        return Model(len(history), rows, self.near.encoder.keys(rows), pool, fail, np.zeros(1), np.zeros(len(rows)))


class Model:
    """A pool of candidates under what was learnt, from which trials are chosen one after another.

    Parameters
    ----------
    learnt
        How many results the model knows.
    rows, keys
        The candidates, shape (m, d), and their keys.
    pool
        The surrogate's view of them.
    fail
        Probability that each fails, or None.
    z
        Warped losses that were learnt.
    away
        How far each candidate is from the best configuration.
    """

    def __init__(
        self,
        learnt: int,
        rows: FloatArray,
        keys: list[bytes],
        pool: Pool,
        fail: FloatArray | None,
        z: FloatArray,
        away: FloatArray,
    ) -> None:
        self.learnt = learnt
        self.rows = rows
        self.pool = pool
        self._fail = fail
        self._away = away
        self._keys = keys
        self._at = {key: index for index, key in reversed(list(enumerate(keys)))}
        self._gone = np.zeros(len(rows), dtype=bool)
        self._told_lies = 0
        self._best, self._worst = float(z.min()), float(z.max())
        self._lies = {"cl_min": self._best, "cl_mean": float(z.mean()), "cl_max": self._worst, "believer": None}

    def pend(self, indices: Sequence[int], liar_strategy: str) -> None:
        """Take candidates as running: they are not chosen again, and are lied about, the first of them."""
        self._gone[indices] = True
        if liar_strategy != "none":
            lied = list(indices)[: MOST_LIES - self._told_lies]
            self._told_lies += len(lied)
            self.pool.lie(lied, self._lies[liar_strategy])

    def pend_rows(self, rows: FloatArray, keys: list[bytes], liar_strategy: str) -> None:
        """Take these trials as running, whether they are among the candidates or not, in this order."""
        room = MOST_LIES - self._told_lies
        fresh = [i for i, key in enumerate(keys[:room]) if key not in self._at]
        if fresh and liar_strategy != "none":
            old = len(self._gone)
            self.pool.extend(rows[fresh])
            self._gone = np.concatenate([self._gone, np.ones(len(fresh), dtype=bool)])
            if self._fail is not None:
                self._fail = np.concatenate([self._fail, np.zeros(len(fresh))])
            self._at.update((keys[i], old + offset) for offset, i in enumerate(fresh))
        self.pend([self._at[key] for key in keys if key in self._at], liar_strategy)

    def choose(self, criteria: Sequence[Criterion], seen: Container[bytes]) -> list[int]:
        """For each criterion in turn the candidate with the smallest score, none twice and none in `seen`.

        Fewer when the pool is used up.
        """
        chosen: list[int] = []
        for c in criteria:
            mean, std = self.pool.mean, self.pool.std
            scores = score(c.acq_func, mean, std, self._best, c.kappa, c.xi, self._fail, self._worst)
            scores[: len(self.rows)] += np.where(c.excludes(self.rows, self._away), _OUTSIDE, 0.0)
            # Equal candidates are told apart by their place: lies told in another grouping differ in the last bits
            scores = np.round(scores, 10)
            scores[self._gone] = np.inf
            scores[chosen] = np.inf
            while True:
                index = int(np.argmin(scores))
                if not np.isfinite(scores[index]):
                    return chosen
                if self._keys[index] not in seen:
                    break
                self._gone[index] = True
                scores[index] = np.inf
            chosen.append(index)
        return chosen
