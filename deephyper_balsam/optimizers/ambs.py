"""AMBS: asynchronous model-based search."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.optimizers.acquisition import (
    ACQUISITIONS,
    HEDGED,
    INITIAL_DESIGNS,
    Criterion,
    Neighbourhood,
    unit_design,
)
from deephyper_balsam.optimizers.background import Learner, Lesson, Taught, make_model, one_thread
from deephyper_balsam.optimizers.base import HistoryOptimizer, Suggestion
from deephyper_balsam.optimizers.hedge import Hedge
from deephyper_balsam.optimizers.model import Losses, Model, Teacher
from deephyper_balsam.optimizers.surrogates import SURROGATES
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.problem.shorthands import is_number
from deephyper_balsam.problem.space import FloatArray
from deephyper_balsam.trial import Origin, Trial, whole_number

log = logging.getLogger(__name__)

LIAR_STRATEGIES = ("believer", "cl_min", "cl_mean", "cl_max", "none")

_KAPPA_STREAM, _HEDGE_STREAM, _DESIGN_STREAM = 2, 3, 4
_RADIUS = 0.2
_CYCLE = ((2.0, math.inf), (2.0, _RADIUS), (0.5, math.inf), (0.25, math.inf))
"""What a single worker does in turn: factor of `kappa`, and distance allowed from the best configuration."""
_LOCAL_SHARE = 0.25
"""Share of the trials of several workers that explore around the best configuration."""
_FAIR, _FAIR_TURN, _FAIR_KAPPA = 1.5, 6, 0.25
"""While a branch of the space was tried fewer than 1.5 sqrt(n) times, every sixth trial goes there, to its best place.

A branch is a choice on which other hyperparameters depend. A refined branch looks better than the others because it is
refined, and what the model carries over from it says little of one with hyperparameters of its own: on a
three-branched test function half of the searches had ended in the second-best branch, with this none.
"""
_STEPS_A_WAVE = 16
"""How many models are made while every worker ends one trial."""
_ASKED_A_BLOCK = 64
"""After so many trials of one `ask`, two are chosen at a time, after twice as many three, and so on.

What is chosen together differs by the criterion that each trial draws; only the lies about one another are missing.
"""


class AMBS(HistoryOptimizer):
    """Asynchronous model-based search (Balaprakash et al. 2018, DeepHyper, HiPC): a surrogate, a criterion, a pool.

    A model update fits the surrogate to everything told and gathers a pool of scored candidates; `ask` only chooses
    from the pool. Each trial of a parallel search draws its own `kappa` from an exponential distribution (Egele et al.
    2023, arXiv:2207.00479), and trials that still run are told to the pool as lies.

    Parameters
    ----------
    problem, seed, num_workers
        As in `HistoryOptimizer`.
    surrogate
        ``"RF"``, ``"ET"``, ``"GBRT"``, ``"GP"`` or ``"auto"``: GP, in turn with RF where the losses turn out rough.
    acq_func
        ``"LCB"``, ``"EI"``, ``"PI"`` or ``"gp_hedge"``, which draws one of the three by how well each did so far.
    kappa
        Standard deviations that LCB subtracts: the mean of the exponential distribution from which each trial of
        several workers draws its own, and about the mean of the cycle of a single worker.
    xi
        Improvement, in standard deviations of the warped losses, that EI and PI ask for.
    liar_strategy
        The value that a running trial is taken to have until its result is told, in scikit-optimize's minimised
        terms: ``"cl_min"`` the best so far, ``"cl_mean"`` the mean, ``"cl_max"`` the worst, ``"believer"`` the model's
        own mean; ``"none"`` tells no lies.
    initial_design
        ``"sobol"``, ``"lhs"``, ``"halton"`` or ``"random"``.
    num_initial
        How many trials, starting points included, come before the model; by default from the dimension and the workers.
    max_evals
        The budget if it is known: exploration then fades as it is used up.
    background
        If false, `tell` updates the model before it returns. It does so when something was asked since the last update,
        and when no trial is left running; further results told between two asks wait for the next of these, or for
        `ask`. A list told at once is one update. If true, a thread updates the model and `ask` answers from the newest
        that is ready.

    Notes
    -----
    Without a thread every suggestion depends on the problem, the options, the seed, the results in the order told and
    the trials that ran, and on nothing else.

    Raises
    ------
    SettingsError
        If an option has a value that is not allowed.
    """

    method: ClassVar[str] = "ambs"

    def __init__(
        self,
        problem: HpProblem,
        *,
        seed: int | None = None,
        num_workers: int = 1,
        surrogate: str = "auto",
        acq_func: str = "LCB",
        kappa: float = 1.0,
        xi: float = 0.01,
        liar_strategy: str = "believer",
        initial_design: str = "sobol",
        num_initial: int | None = None,
        max_evals: int | None = None,
        background: bool = False,
    ) -> None:
        _check_choice("surrogate", surrogate, (*SURROGATES, "auto"))
        _check_choice("acq_func", acq_func, ACQUISITIONS)
        _check_choice("liar_strategy", liar_strategy, LIAR_STRATEGIES)
        _check_choice("initial_design", initial_design, INITIAL_DESIGNS)
        _check_number("kappa", kappa)
        _check_number("xi", xi)
        num_initial = _count("num_initial", num_initial)
        max_evals = _count("max_evals", max_evals)
        if not isinstance(background, bool):
            raise SettingsError(f"`background` must be true or false, but got {background!r}.")
        super().__init__(problem, seed=seed, num_workers=num_workers)
        self._acq_func = acq_func
        self._kappa = float(kappa)
        self._xi = float(xi)
        self._liar_strategy = liar_strategy
        self._initial_design = initial_design
        self._max_evals = max_evals
        self._background = background
        near = Neighbourhood(self._encoder)
        self.num_initial = num_initial or _default_initial(near.free, num_workers, max_evals)
        pool_size = 512 if num_workers == 1 else 1024
        self._teacher = Teacher(near, surrogate, pool_size, self._seed)
        self._hedge = Hedge() if acq_func == "gp_hedge" else None
        self._branching = [int(j) for j in np.flatnonzero(near.categorical) if j in self._encoder.parents]
        self._neglected: tuple[int, tuple[Criterion, ...]] | None = None
        self._design: FloatArray | None = None
        self._told_at: dict[int, int] = {}
        self._made_at: dict[int, int] = {}  # results that a model learnt -> results told when it was made
        self._model: Model | None = None
        self._model_used = True
        self._thread: Learner | None = None

    # -- ask -----------------------------------------------------------------------------------------------------------

    def ask(self, n: int = 1) -> list[Trial]:
        """The next `n` trials; see `Optimizer`. Scores a pool; fits nothing that `tell` could have fitted."""
        with one_thread():
            trials = super().ask(n)
            self._pend_new(trials)
        self._told_at.update((trial.number, trial.origin.told) for trial in trials)
        return trials

    def _suggest(self, n: int) -> Sequence[Suggestion]:
        suggestions: list[Suggestion] = []
        first = self.num_asked
        for number in range(first, min(first + n, self.num_initial)):
            suggestions.append((self._design_rows()[number], Origin("initial", told=self.num_told)))
        model = self._current_model() if len(suggestions) < n else None
        if model is None:
            return suggestions
        origin = Origin("model", told=self.num_told, model=model.learnt)
        number = first + len(suggestions)
        while number < first + n:
            together = min(1 + (number - first) // _ASKED_A_BLOCK, first + n - number)
            criteria = [self._criterion(k, model.learnt) for k in range(number, number + together)]
            indices = model.choose(criteria, self._known)
            if not indices:
                break
            suggestions += [(model.rows[index], origin) for index in indices]
            model.pend(indices, self._liar_strategy)
            number += len(indices)
        return suggestions

    def _design_rows(self) -> FloatArray:
        if self._design is None:
            rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(0, _DESIGN_STREAM)))
            name = self._initial_design
            self._design = self._encoder.sample(
                self.num_initial, rng, lambda k, g: unit_design(name, k, self._encoder.width, g), partial=True
            )
            if len(self._design) < self.num_initial:
                # Known rows are dropped when they are asked, and random ones take their place.
                filler = self._encoder.sample(1, rng)
                self._design = np.vstack(
                    [self._design, np.repeat(filler, self.num_initial - len(self._design), axis=0)]
                )
        return self._design

    def _criterion(self, number: int, learnt: int) -> Criterion:
        """What trial `number` is to be best at: alone a worker goes through a cycle, many workers draw.

        Both mix exploring everywhere, exploring around the best, and refining.
        """
        name = self._acq_func
        if self._hedge is not None:
            name = HEDGED[self._hedge.arm(self.num_told, float(self.rng_for(number, _HEDGE_STREAM).random()))]
        kappa = self._kappa_at(learnt)
        if name != "LCB":
            return Criterion(name, kappa, self._xi)
        if self.num_workers == 1:
            factor, radius = _CYCLE[learnt % len(_CYCLE)]
            turn = learnt % _FAIR_TURN == 0
        else:
            rng = self.rng_for(number, _KAPPA_STREAM)
            factor, radius = float(rng.exponential()), math.inf
            share = rng.random()
            if share < _LOCAL_SHARE:
                factor, radius = max(factor, 1.0), _RADIUS
            turn = share > 1.0 - 1.0 / _FAIR_TURN
        if turn:
            for neglected in self._neglected_branch(learnt):
                return neglected
        return Criterion(name, factor * kappa, self._xi, radius)

    def _neglected_branch(self, learnt: int) -> tuple[Criterion, ...]:
        """What looks at the branch that was tried least, if that is seldom; a function of the first results."""
        if self._neglected is None or self._neglected[0] != learnt:
            least, branch = 1.0, None
            for column in self._branching:
                values = self._history.X[:learnt, column]
                size = self._encoder.columns[column].size
                counts = np.bincount(values[~np.isnan(values)].astype(np.int64), minlength=size)
                tried = float(counts.min()) / (_FAIR * math.sqrt(max(1, counts.sum())))
                if tried < least:
                    least, branch = tried, (column, int(counts.argmin()))
            there = Criterion("LCB", _FAIR_KAPPA * self._kappa_at(learnt), choice=branch)
            self._neglected = (learnt, () if branch is None else (there,))
        return self._neglected[1]

    def _criteria(self, learnt: int) -> tuple[Criterion, ...]:
        """Under which criteria a model of `learnt` results searches its candidates."""
        kappa, xi = self._kappa_at(learnt), self._xi
        factor, radius = _CYCLE[learnt % len(_CYCLE)]
        fair = self._neglected_branch(learnt)
        if self._acq_func in ("EI", "PI"):
            return (*fair, Criterion("LCB"), Criterion("LCB", kappa), Criterion(self._acq_func, kappa, xi))
        if self._acq_func == "LCB" and self.num_workers == 1:
            return (
                *fair,
                Criterion("LCB"),
                Criterion("LCB", 0.5 * factor * kappa),
                Criterion("LCB", factor * kappa, xi, radius),
            )
        spread = tuple(Criterion("LCB", share * kappa) for share in (0.0, 0.5, 1.0, 2.5))
        if self._acq_func == "LCB":
            return (*fair, *spread, Criterion("LCB", kappa, xi, _RADIUS))
        return (*fair, *spread, Criterion("EI", kappa, xi), Criterion("PI", kappa, xi))

    def _kappa_at(self, learnt: int) -> float:
        """The scale of exploration after so many results: it fades over the second half of the budget, if known."""
        if self._max_evals is None:
            return self._kappa
        return self._kappa * min(1.0, 0.2 + 1.6 * max(0.0, 1.0 - learnt / self._max_evals))

    # -- models --------------------------------------------------------------------------------------------------------

    def _current_model(self) -> Model | None:
        if self._thread is not None:
            fresh = self._thread.take()
            if fresh is not None:
                self._install(fresh)
        elif not self._background and self.num_told and self._is_stale:
            self._update()
        self._model_used = True
        return self._model

    def _learn(self, new: slice) -> None:
        if self._hedge is not None:
            self._learn_hedge(new)
        if self._background:
            if self._thread is None:
                self._thread = Learner(self._teacher, self._liar_strategy)
            self._thread.learn(self._lesson())
            return
        complete = self._history.num_pending == 0 and self._history.numbers[-1] >= 0
        if self.num_asked >= self.num_initial and self._is_stale and (self._model_used or complete):
            try:
                self._update()
            except Exception:
                # The results are recorded and `tell` is atomic; `ask` tries again, and raises if it fails again.
                log.exception("No model could be made of %d results; the next ask tries again.", self.num_told)
                self._model = None

    def _relearn(self) -> None:
        if self._background and self._thread is not None:
            self._thread.learn(self._lesson())
        elif not self._background:
            self._model = None

    @property
    def _to_learn(self) -> int:
        """How many of the results told the model should know.

        With many workers, a result more or less among the many that still run changes little: the model then learns
        in steps of a sixteenth of the workers. The steps are counted from the first result, so that they are the same
        after a restore.
        """
        step = 1 if self._background else max(1, self.num_workers // _STEPS_A_WAVE)
        return self.num_told if self.num_told < 4 * step else self.num_told - self.num_told % step

    @property
    def _is_stale(self) -> bool:
        return self._model is None or self._model.learnt < self._to_learn

    def _learn_hedge(self, new: slice) -> None:
        assert self._hedge is not None
        for number, objective in zip(self._history.numbers[new], self._history.y[new], strict=True):
            told = self._told_at.get(int(number))
            draw = None if told is None else float(self.rng_for(int(number), _HEDGE_STREAM).random())
            self._hedge.learn(told, draw, float(objective))

    def _lesson(self) -> Lesson:
        # The arrays only grow and told rows never change, so a view is a safe snapshot for another thread.
        count = self._to_learn
        losses = -self._history.y[:count]  # the one place where the objective's sign is turned
        # What was told but is not learnt yet is a running trial to the model, as it was when the model was made
        numbers = np.concatenate([self._history.pending_numbers(), self._history.numbers[count:]])
        rows = np.vstack([self._history.pending_rows(), self._history.X[count:]])
        order = np.argsort(numbers, kind="stable")
        numbers, rows = numbers[order], rows[order]
        made_at = self._made_at.setdefault(count, self.num_told)
        early = np.array([self._told_at.get(int(k), 0) < made_at for k in numbers], dtype=bool)
        curves, amended = self._history.curves(count), self._history.amended
        history = Losses(self._history.X[:count], losses, curves, amended)
        return Lesson(history, self._criteria(count), numbers, rows, early)

    def _update(self) -> None:
        self._install(make_model(self._teacher, self._lesson(), self._liar_strategy))
        self._model_used = False

    def _install(self, taught: Taught) -> None:
        self._model = taught.model
        if self._thread is not None:
            # Trials asked while the thread was learning are not in its lesson.
            rows = self._history.pending_rows()[~np.isin(self._history.pending_numbers(), taught.numbers)]
            self._pend_rows(self._model, rows)

    def _pend_new(self, trials: Sequence[Trial]) -> None:
        """Tell the model about trials that did not come from its pool."""
        others = [trial.config for trial in trials if trial.origin.kind != "model"]
        if self._model is not None and others:
            self._pend_rows(self._model, self._encoder.encode(others))

    def _pend_rows(self, model: Model, rows: FloatArray) -> None:
        model.pend_rows(rows, self._encoder.keys(rows), self._liar_strategy)

    def withdraw(self, numbers: Iterable[int]) -> None:
        """Forget pending trials; see `HistoryOptimizer.withdraw`. The next model does not know them."""
        numbers = list(numbers)
        super().withdraw(numbers)
        if numbers and not self._background:
            self._model = None

    def _remember(self, trials: Sequence[Trial]) -> None:
        self._told_at.update((trial.number, trial.origin.told) for trial in trials)
        for trial in trials:
            if trial.origin.kind == "model":
                before = self._made_at.get(trial.origin.model, trial.origin.told)
                self._made_at[trial.origin.model] = min(before, trial.origin.told)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the model has learnt everything told; whether it has within `timeout_s` seconds."""
        return self._thread is None or self._thread.wait(timeout_s)

    def close(self) -> None:
        """End the thread after the fit that it is in; the history can still be read."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None


def _default_initial(free: int, num_workers: int, max_evals: int | None) -> int:
    """Twice the dimension, between 5 and 20, one a worker at least, and at most a third of the budget."""
    count = max(min(max(2 * free, 5), 20), num_workers)
    return count if max_evals is None else max(1, min(count, max(num_workers, max_evals // 3)))


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"`{name}` must be one of {', '.join(allowed)}, but got {value!r}.")


def _check_number(name: str, value: Any) -> None:
    if not is_number(value) or not 0 <= value < math.inf:
        raise SettingsError(f"`{name}` must be a finite number of at least 0, but got {value!r}.")


def _count(name: str, value: int | None) -> int | None:
    return None if value is None else whole_number(name, value, 1, SettingsError)
