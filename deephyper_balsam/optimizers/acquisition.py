"""Acquisition functions, and the candidates on which they are evaluated. Losses are minimised, and so are scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, qmc

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.problem.space import CATEGORICAL, CONSTANT, INTEGER, REAL, Encoder

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

ACQUISITIONS = ("LCB", "EI", "PI", "gp_hedge")
HEDGED = ("LCB", "EI", "PI")
INITIAL_DESIGNS = ("sobol", "lhs", "halton", "random")


@dataclass(frozen=True)
class Criterion:
    """What the next trial is to be best at.

    Attributes
    ----------
    acq_func
        ``"LCB"``, ``"EI"`` or ``"PI"``.
    kappa, xi
        See `score`.
    radius
        How far from the best configuration it may be, see `Neighbourhood.away`; a trust region (Eriksson et al. 2019,
        arXiv:1910.01739) keeps exploration from being spent on the far corners of the space.
    choice
        Column of a categorical and index of the choice that it must have; None: any.
    """

    acq_func: str
    kappa: float = 0.0
    xi: float = 0.0
    radius: float = math.inf
    choice: tuple[int, int] | None = None

    def excludes(self, rows: FloatArray, away: FloatArray) -> BoolArray:
        """Which rows, shape (m, d), that far from the best configuration, are not where it looks; shape (m,)."""
        excluded = away > self.radius
        if self.choice is not None:
            column, index = self.choice
            excluded |= rows[:, column] != index
        return excluded


def score(
    name: str,
    mean: FloatArray,
    std: FloatArray,
    best: float,
    kappa: float,
    xi: float,
    fail: FloatArray | None = None,
    worst: float = 0.0,
) -> FloatArray:
    """How unattractive candidates are; the smallest score is the one to evaluate next.

    Parameters
    ----------
    name
        ``"LCB"`` (Cox and John 1997), ``"EI"`` (Jones et al. 1998, eq. 15; as its negative logarithm, which does not
        vanish far from the optimum: Ament et al. 2023, arXiv:2310.20708) or ``"PI"`` (Kushner 1964; as its negative
        logarithm).
    mean, std
        Prediction on the warped scale, shape (m,) each.
    best
        Smallest warped loss so far.
    kappa
        Standard deviations that LCB subtracts.
    xi
        Improvement that EI and PI ask for beyond `best`.
    fail
        Probability that a candidate fails, shape (m,). EI and PI are multiplied by that of success (Gelbart et al.
        2014, arXiv:1403.5607, eq. 7); LCB becomes its expectation when a failure counts as `worst`.
    worst
        Largest warped loss so far.

    Returns
    -------
    FloatArray
        Shape (m,).

    Raises
    ------
    SettingsError
        If there is no acquisition function of that name.
    """
    if name == "LCB":
        bound = mean - kappa * std
        return bound if fail is None else (1.0 - fail) * bound + fail * max(worst, float(bound.max()))
    std = np.maximum(std, 1e-12)
    gain = (best - xi - mean) / std
    lost = 0.0 if fail is None else np.log(np.maximum(1.0 - fail, 1e-6))
    if name == "PI":
        return np.asarray(-(norm.logcdf(gain) + lost))
    if name == "EI":
        return np.asarray(-(np.log(std) + _log_improvement(gain) + lost))
    raise SettingsError(f"`acq_func` must be one of {', '.join(ACQUISITIONS)}, but got {name!r}.")


def _log_improvement(gain: FloatArray) -> FloatArray:
    """``log(phi(u) + u Phi(u))``, by its asymptotic series where the sum cancels."""
    out = np.empty_like(gain)
    near = gain > -5.0
    u = gain[near]
    out[near] = np.log(norm.pdf(u) + u * norm.cdf(u))
    u2 = gain[~near] ** 2
    out[~near] = -0.5 * u2 - 0.5 * math.log(2 * math.pi) - np.log(u2) + np.log1p(-3.0 / u2)
    return out


def unit_design(name: str, n: int, d: int, rng: np.random.Generator) -> FloatArray:
    """`n` points of the unit cube, shape (n, d): ``"sobol"`` and ``"halton"`` scrambled, ``"lhs"`` or ``"random"``.

    Raises
    ------
    SettingsError
        If there is no design of that name.
    """
    if name == "random":
        return rng.random((n, d))
    if name == "sobol":
        power = max(0, math.ceil(math.log2(max(1, n))))
        return np.asarray(qmc.Sobol(d, rng=rng).random_base2(power)[:n])
    if name == "halton":
        return np.asarray(qmc.Halton(d, rng=rng).random(n))
    if name == "lhs":
        return np.asarray(qmc.LatinHypercube(d, rng=rng).random(n))
    raise SettingsError(f"`initial_design` must be one of {', '.join(INITIAL_DESIGNS)}, but got {name!r}.")


class Neighbourhood:
    """Moves from known configurations to new legal ones, by whole matrices."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        columns = encoder.columns
        self.categorical: BoolArray = np.array([c.kind == CATEGORICAL for c in columns])
        self.constant: BoolArray = np.array([c.kind == CONSTANT for c in columns])
        self.real: BoolArray = np.array([c.kind == REAL for c in columns])
        self.numeric: BoolArray = ~(self.categorical | self.constant)
        self.sizes: FloatArray = np.array([float(c.size) for c in columns])
        self.steps: FloatArray = np.array(
            [0.0 if c.kind == REAL or c.log else 1.0 / max(1, c.size - 1) for c in columns]
        )
        self.log_integer: list[tuple[int, float, float]] = [
            (j, math.log(c.lower), math.log(c.upper) - math.log(c.lower))
            for j, c in enumerate(columns)
            if c.kind == INTEGER and c.log
        ]
        self.free = max(1, int((~self.constant).sum()))

    def legal(self, rows: FloatArray) -> FloatArray:
        """Those of the rows that are legal, in canonical form."""
        rows = self.encoder.canonical(rows)
        return rows[self.encoder.legal(rows)]

    def filled(self, rows: FloatArray, rng: np.random.Generator) -> FloatArray:
        """The rows with a random value for each inactive hyperparameter, which it takes if a move makes it active."""
        drawn = rng.random(rows.shape)
        drawn[:, self.categorical] = np.floor(drawn[:, self.categorical] * self.sizes[self.categorical])
        return np.where(np.isnan(rows), drawn, rows)

    def away(self, rows: FloatArray, centre: FloatArray) -> FloatArray:
        """Distance of the rows from one row, shape (m,): the largest difference of a number, 0.15 a changed choice."""
        gap = np.abs(rows - centre)
        gap[np.isnan(gap)] = 0.0
        switched = (gap[:, self.categorical] > 0).sum(axis=1)
        largest = gap[:, self.numeric].max(axis=1) if self.numeric.any() else np.zeros(len(rows))
        return np.asarray(np.maximum(largest, 0.15 * switched))

    def mutate(self, parents: FloatArray, scales: FloatArray, rng: np.random.Generator) -> FloatArray:
        """One legal child a parent, moved by about its scale in the unit cube; children that are illegal are dropped.

        Half of the children change about two hyperparameters, the others change each with probability 1/2; integers
        and ordinals move by whole steps, rounded at random, so that small scales still reach their neighbours.

        Parameters
        ----------
        parents
            Canonical rows, shape (m, d).
        scales
            Standard deviation of a move in each row, shape (m,).
        rng
            Where the moves are drawn from.
        """
        m, d = parents.shape
        base = self.filled(parents, rng)
        share = np.where(rng.random(m) < 0.5, min(1.0, 2.0 / self.free), 0.5)
        chosen = rng.random((m, d)) < share[:, None]
        chosen[np.arange(m), rng.integers(0, d, m)] = True
        move = rng.standard_normal((m, d)) * scales[:, None]
        steps = np.tile(self.steps, (m, 1))
        for j, low, span in self.log_integer:
            steps[:, j] = np.log1p(np.exp(-low - base[:, j] * span)) / span
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = np.floor(np.abs(move) / steps + rng.random((m, d))) * steps * np.sign(move)
        move = np.where(steps > 0, whole, move)
        child = base + np.where(chosen, move, 0.0)
        child = np.abs(child)
        child = np.where(child > 1.0, np.clip(2.0 - child, 0.0, 1.0), child)
        switch = chosen & (rng.random((m, d)) < np.clip(2.0 * scales, 0.1, 0.5)[:, None])
        fresh = np.floor(rng.random((m, d)) * self.sizes)
        child[:, self.categorical] = np.where(switch, fresh, base)[:, self.categorical]
        return self.legal(child)

    def cross(self, parents: FloatArray, n: int, rng: np.random.Generator) -> FloatArray:
        """Differential moves between good configurations (Storn and Price 1997), scaled by the spread of them.

        Child = a + F (b - c) on numbers, and a's or b's choice on categoricals; `parents` has at least three rows.
        """
        base = self.filled(parents, rng)
        m, d = base.shape
        a, b, c = (rng.integers(0, m, n) for _ in range(3))
        factor = rng.uniform(0.2, 1.0, (n, 1))
        child = np.clip(base[a] + factor * (base[b] - base[c]), 0.0, 1.0)
        keep = rng.random((n, d)) < 0.3
        child = np.where(keep, base[a], child)
        mixed = np.where(rng.random((n, d)) < 0.5, base[a], base[b])
        child[:, ~self.numeric] = mixed[:, ~self.numeric]
        return self.legal(child)


Scorer = Callable[[FloatArray], FloatArray]
"""Scores of the rows of a unit matrix under several criteria, smaller is better: (m, d) -> (criteria, m)."""


def candidate_pool(
    near: Neighbourhood,
    elites: FloatArray,
    scorer: Scorer,
    rng: np.random.Generator,
    *,
    spread: int = 384,
    mutants: int = 384,
    rounds: Sequence[float] = (0.1, 0.03, 0.01, 0.002),
    climbers: int = 6,
    brood: int = 16,
) -> tuple[FloatArray, FloatArray]:
    """Rows worth scoring: space-filling points, moves from the best, and a local search under each criterion.

    Parameters
    ----------
    near
        The moves of the space.
    elites
        Best evaluated rows, best first, shape (k, d).
    scorer
        The criteria of the local search.
    rng
        The source of randomness.
    spread, mutants
        How many space-filling points, and how many moves from the elites.
    rounds
        Scale of the moves in each round of the local search.
    climbers, brood
        Rows that each criterion sends into a round, and children of each.

    Returns
    -------
    rows, scores
        Canonical legal rows, shape (m, d), possibly with repetitions, and their scores, shape (criteria, m).
    """
    encoder = near.encoder
    parts = [encoder.sample(spread, rng, lambda n, g: unit_design("sobol", n, encoder.width, g), partial=True)]
    if len(elites):
        rank = np.minimum(rng.exponential(max(1.0, len(elites) / 4), mutants).astype(np.int64), len(elites) - 1)
        parts.append(elites)  # known, but where the local search begins
        parts.append(near.mutate(elites[rank], 10.0 ** rng.uniform(-3.0, -0.5, mutants), rng))
        if len(elites) >= 4:
            parts.append(near.cross(elites, mutants // 3, rng))
    rows = np.vstack(parts)
    scores = scorer(rows)
    for scale in rounds:
        few = min(climbers, scores.shape[1])
        top = np.unique(np.argpartition(scores, few - 1, axis=1)[:, :few])
        children = near.mutate(
            np.repeat(rows[top], brood, axis=0), scale * rng.uniform(0.3, 1.5, len(top) * brood), rng
        )
        if len(children):
            rows = np.vstack([rows, children])
            scores = np.hstack([scores, scorer(children)])
    return rows, scores
