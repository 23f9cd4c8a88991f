"""A batch-synchronous genetic algorithm on DEAP, after the one of the 2018 DeepHyper.

DEAP gives the structures: fitness, individuals, the toolbox that names the operators, and the selection of the best.
Its own random operators draw from Python's global generator, which a library must not seed, so tournament, crossover
and mutation are written here on a numpy generator.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import ClassVar

import numpy as np
from deap import base, tools

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.optimizers.base import HistoryOptimizer, Suggestion
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.problem.shorthands import is_number
from deephyper_balsam.problem.space import CATEGORICAL, CONSTANT, Encoder, FloatArray
from deephyper_balsam.trial import Origin, Trial, whole_number

_BREED, _REPLACE = 1, 2
"""Streams of randomness: one for a generation, one for a member that was overtaken by a warm start."""

_ROUNDS = 20
_FLOOR = 20


class Fitness(base.Fitness):  # type: ignore[misc]
    """One objective, maximised. Without values (a failure, or not evaluated) it is worse than any with."""

    weights = (1.0,)


class Individual(list[float]):
    """A row of the unit matrix with its fitness, as DEAP's operators expect it."""

    def __init__(self, row: FloatArray, objective: float | None = None) -> None:
        super().__init__(row.tolist())
        self.fitness = Fitness(() if objective is None else (objective,))


class GeneticAlgorithm(HistoryOptimizer):
    """Generations of equal size: tournament, two-point crossover, Gaussian mutation, elitism.

    A generation is asked at once or piece by piece, and the next one is bred when every member has a result or was
    withdrawn; until then `ask` returns what is left of the generation, at last nothing. The parents are the best
    `population` results of all generations and warm starts (so an elite is never lost); failed members have no fitness
    and are no parents. While there are fewer parents than half a population, random configurations make up
    the difference. What is bred depends only on the results told by then, so a search is rebuilt from its history.

    Parameters
    ----------
    problem, seed, num_workers
        See `HistoryOptimizer`.
    population
        Members of a generation; by default `num_workers`, but at least 20.
    cx_prob, mut_prob
        Probability that a pair is crossed, and that a child is mutated (2018 DeepHyper: 0.5 and 0.2). A child that
        came out as a configuration already known is mutated in any case.
    tournament_size
        How many individuals compete to become a parent.

    Raises
    ------
    SettingsError
        If an option has a value that is not allowed.

    Notes
    -----
    A Gaussian step has its own scale for each child, drawn log-uniformly from [0.003, 0.3] of the range, and takes each
    column with probability 1 / d or 0.2, whichever is larger; integers and ordinals move by a whole step or so at
    least, and a categorical is drawn anew among its other choices.
    """

    method: ClassVar[str] = "ga"
    _waits: ClassVar[bool] = True

    def __init__(
        self,
        problem: HpProblem,
        *,
        seed: int | None = None,
        num_workers: int = 1,
        population: int | None = None,
        cx_prob: float = 0.5,
        mut_prob: float = 0.2,
        tournament_size: int = 3,
    ) -> None:
        super().__init__(problem, seed=seed, num_workers=num_workers)
        if population is None:
            population = max(self.num_workers, _FLOOR)
        self.population = whole_number("population", population, 2, SettingsError)
        tournament_size = whole_number("tournament_size", tournament_size, 1, SettingsError)
        for name, value in (("cx_prob", cx_prob), ("mut_prob", mut_prob)):
            if not is_number(value) or not 0.0 <= value <= 1.0:
                raise SettingsError(f"`0 <= {name} <= 1` must hold, but got ({name}={value!r}).")
        self.cx_prob, self.mut_prob, self.tournament_size = cx_prob, mut_prob, tournament_size
        # All starting points belong to the first generation, however many they are.
        self._first_generation = max(self.population, len(problem.starting_points))
        self._bred_from = -1  # the first number of the generation that the plan belongs to
        self._plan: FloatArray = np.empty((0, self._encoder.width))
        self._plan_keys: list[bytes] = []
        self._plan_offset = 0  # the position of the plan's first row in its generation: starting points come before
        self._mutation = _Mutation(self._encoder)

    # -- ask -----------------------------------------------------------------------------------------------------------

    def _suggest(self, n: int) -> Sequence[Suggestion]:
        start, size = self._generation_of(self.num_asked)
        position = self.num_asked - start
        if self._bred_from != start:
            # What was added by hand may have taken the first places while the generation before was not complete
            if start > 0 and (self._history.pending_numbers() < start).any():
                return ()
            self._breed(start, position, self.num_told, self._known)
        rows = self._take(position, min(n, size - position))
        self._exhausted = len(rows) < min(n, size - position)
        origin = Origin("genetic", told=self.num_told)
        return [(row, origin) for row in rows]

    def _take(self, position: int, n: int) -> list[FloatArray]:
        """The members at these positions of the generation; random ones where none was bred or it is known by now."""
        first = position - self._plan_offset
        rows: list[FloatArray] = []
        taken: dict[bytes, None] = {}
        for i in range(first, first + n):
            if i < len(self._plan) and self._plan_keys[i] not in self._known and self._plan_keys[i] not in taken:
                row, key = self._plan[i], self._plan_keys[i]
            else:
                number = self.num_asked + i - first
                to_come = {**taken, **dict.fromkeys(self._plan_keys[i + 1 :])}
                drawn = self._redraw(self.rng_for(number, _REPLACE), to_come)
                drawn = drawn or self._redraw(self.rng_for(number, _REPLACE), taken)
                if drawn is None:
                    break
                row, key = drawn
            rows.append(row)
            taken[key] = None
        return rows

    def _generation_of(self, number: int) -> tuple[int, int]:
        """The first number of the generation of a trial number, and the generation's size."""
        if number < self._first_generation:
            return 0, self._first_generation
        index = (number - self._first_generation) // self.population
        return self._first_generation + index * self.population, self.population

    # -- restore -------------------------------------------------------------------------------------------------------

    def _resume(self, trials: Sequence[Trial]) -> None:
        """Breed the rest of a generation that was asked in part, as it was bred then."""
        if not trials:
            return
        start, _ = self._generation_of(self.num_asked - 1)
        members = [trial for trial in trials if trial.number >= start]
        bred = [trial for trial in members if trial.origin.kind not in ("start", "user")]
        if bred:
            given = [trial for trial in members if trial.number < bred[0].number]
            told = bred[0].origin.told
            known = set(self._encoder.keys(self._history.X[:told]))
            known |= {self._encoder.key(trial.config) for trial in given}
            self._breed(start, bred[0].number - start, told, known)

    # -- breeding ------------------------------------------------------------------------------------------------------

    def _breed(self, start: int, position: int, told: int, known: Container[bytes]) -> None:
        """Plan the members of the generation that begins with number `start`, from `position` on.

        A function of the seed, the first `told` results, and the configurations known before.
        """
        rng = self.rng_for(start, _BREED)
        _, size = self._generation_of(start)
        parents = self._parents(told)
        children = min(size - position, 2 * len(parents)) if len(parents) > 1 else 0
        new: dict[bytes, FloatArray] = {}
        if children:
            self._collect(new, self._offspring(parents, children, rng), known, size - position, rng)
        rows = self._encoder.from_unit_cube(rng.random((size - position, self._encoder.width)))
        self._collect(new, rows, known, size - position, rng)
        self._bred_from, self._plan_offset = start, position
        self._plan = np.array(list(new.values())).reshape(-1, self._encoder.width)
        self._plan_keys = list(new)

    def _parents(self, told: int) -> list[Individual]:
        objectives = self._history.finals(told)
        done = np.flatnonzero(~np.isnan(objectives))
        # Of equals the newest first: on a plateau the population drifts on instead of standing still.
        best = done[np.lexsort((-done, -objectives[done]))[: self.population]]
        individuals = [Individual(self._history.X[i], float(objectives[i])) for i in best]
        selected: list[Individual] = tools.selBest(individuals, self.population)
        return selected

    def _offspring(self, parents: list[Individual], n: int, rng: np.random.Generator) -> FloatArray:
        toolbox = base.Toolbox()
        toolbox.register("select", select_by_tournament, tournament_size=self.tournament_size, rng=rng)
        toolbox.register("mate", cross_at_two_points, rng=rng)
        toolbox.register("mutate", self._mutation, rng=rng)
        chosen = toolbox.select(parents, n + n % 2)
        rows: list[FloatArray] = []
        for one, other in zip(chosen[::2], chosen[1::2], strict=True):
            pair = (np.array(one), np.array(other))
            if rng.random() < self.cx_prob:
                pair = toolbox.mate(*pair)
            rows += [toolbox.mutate(row) if rng.random() < self.mut_prob else row for row in pair]
        return np.array(rows[:n])

    def _collect(
        self,
        new: dict[bytes, FloatArray],
        rows: FloatArray,
        known: Container[bytes],
        size: int,
        rng: np.random.Generator,
    ) -> None:
        """Add the rows that are legal and new; mutate the others until they are, for a bounded number of rounds."""
        for _ in range(_ROUNDS):
            snapped = self._encoder.snap(self._mutation.fill(rows, rng))
            legal = self._encoder.legal(snapped)
            again: list[FloatArray] = []
            for row, child, key, ok in zip(rows, snapped, self._encoder.keys(snapped), legal, strict=True):
                if len(new) >= size:
                    return
                if ok and key not in known and key not in new:
                    new[key] = child
                else:
                    again.append(self._mutation(row, rng=rng))
            if not again:
                return
            rows = np.array(again)


def select_by_tournament(
    individuals: Sequence[Individual], k: int, *, tournament_size: int, rng: np.random.Generator
) -> list[Individual]:
    """The fittest of each of `k` random groups of `tournament_size`; DEAP's `selTournament` on a numpy generator."""
    groups = rng.integers(len(individuals), size=(k, tournament_size)).tolist()
    return [max((individuals[i] for i in group), key=lambda individual: individual.fitness) for group in groups]


def cross_at_two_points(
    one: FloatArray, other: FloatArray, *, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Swap what lies between two random cuts; DEAP's `cxTwoPoint` on rows of shape (d,)."""
    low, high = np.sort(rng.choice(len(one) + 1, size=2, replace=False))
    one, other = one.copy(), other.copy()
    one[low:high], other[low:high] = other[low:high].copy(), one[low:high].copy()
    return one, other


class _Mutation:
    """Gaussian steps in the unit matrix; categoricals are drawn anew."""

    def __init__(self, encoder: Encoder) -> None:
        columns = encoder.columns
        self._sizes = np.array([column.size for column in columns])
        self._categorical = np.array([column.kind == CATEGORICAL for column in columns])
        self._movable = np.flatnonzero([column.kind != CONSTANT for column in columns])
        self._step = [1.0 / (c.size - 1) if c.size > 1 and not c.log else 0.0 for c in columns]

    def __call__(self, row: FloatArray, *, rng: np.random.Generator) -> FloatArray:
        """A mutated copy of the row, shape (d,)."""
        row = np.array(row, dtype=np.float64)
        if not len(self._movable):
            return row
        count = len(self._movable)
        genes = self._movable[rng.random(count) < max(1.0 / count, 0.2)]
        if not len(genes):
            genes = self._movable[[rng.integers(count)]]
        sigma = 10.0 ** rng.uniform(np.log10(0.003), np.log10(0.3))
        for j in genes.tolist():
            if np.isnan(row[j]):
                continue
            if self._categorical[j]:
                row[j] = (row[j] + rng.integers(1, self._sizes[j])) % self._sizes[j]
            else:
                row[j] = _reflected(row[j] + rng.normal(0.0, max(sigma, self._step[j])))
        return row

    def fill(self, rows: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Random values where a row has none, for hyperparameters that its new values make active."""
        drawn = rng.random(rows.shape)
        drawn = np.where(self._categorical, np.floor(drawn * self._sizes), drawn)
        return np.where(np.isnan(rows), drawn, rows)


def _reflected(value: float) -> float:
    """Bounce off the bounds of [0, 1], so that mutation does not pile up on them."""
    value = abs(value) % 2.0
    return 2.0 - value if value > 1.0 else value
