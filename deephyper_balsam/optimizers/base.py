"""The seam between the driver and whatever suggests configurations: ask and tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import ProblemError, SettingsError, TellError
from deephyper_balsam.optimizers.history import History
from deephyper_balsam.optimizers.leftover import Leftover
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.problem.space import FloatArray
from deephyper_balsam.trial import Config, Origin, Result, Trial, whole_number

if TYPE_CHECKING:
    import skopt

Suggestion = tuple["FloatArray | Config", Origin]
"""A row of the unit matrix, shape (d,), or a configuration; and what it was suggested from."""

_ENUMERATION_LIMIT = 2**18
_FIRST_TRIES = 256
_LAST_TRIES = 16384


@runtime_checkable
class Optimizer(Protocol):
    """Suggests configurations and learns from their results, in any order and without waiting.

    Contract
    --------
    - `ask(n)` returns exactly `n` trials with distinct legal configurations while the space has `n` left, and fewer (at
      last none, with `exhausted` true) when it has not. It never gives a configuration that was asked or told before.
      A method that works in generations may return fewer while its generation is complete but not evaluated.
    - Trial numbers count from 0 and are never reused. The problem's starting points come first, then what was given to
      `add`, before anything of the optimizer's own.
    - `tell` takes results of any subset of what was asked, in any order, interleaved with `ask`. Each number is told
      once: again with the same value is harmless, with another value an error; a number never asked is an error. A
      point from elsewhere is ``Result(None, y, config={...})``.
    - A result of a run that was stopped early teaches less than a final one; a final one may follow it, and takes its
      place.
    - `tell` is atomic: after an error nothing was learnt.
    - The objective is maximised. A failure teaches, and never breaks anything.
    - The same problem, seed and order of asks and tells give the same suggestions, in another process too; and after
      `restore` the optimizer goes on as the uninterrupted one would.
    """

    @property
    def method(self) -> str:
        """The name under which `make_optimizer` makes it."""
        ...

    @property
    def problem(self) -> HpProblem:
        """The space that is searched."""
        ...

    @property
    def seed(self) -> int:
        """The seed; one was drawn if none was given."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether the last `ask` found the space used up."""
        ...

    @property
    def num_asked(self) -> int:
        """How many trial numbers were given out; the next trial has this number."""
        ...

    @property
    def num_told(self) -> int:
        """How many results were learnt, warm starts included."""
        ...

    def ask(self, n: int = 1) -> list[Trial]:
        """The next `n` trials."""
        ...

    def add(self, config: Mapping[str, Any]) -> bool:
        """Put a configuration first in line, as a trial of the kind ``"user"``; False if it is known already."""
        ...

    def tell(self, results: Iterable[Result] | Result) -> None:
        """Learn results."""
        ...

    def withdraw(self, numbers: Iterable[int]) -> None:
        """Forget pending trials that will never be evaluated; their configurations may be asked again."""
        ...

    def restore(self, trials: Sequence[Trial], results: Sequence[Result], withdrawn: Iterable[int] = ()) -> None:
        """Take over what an earlier driver asked, and was told, in that order."""
        ...

    def to_skopt(self) -> skopt.OptimizeResult:
        """The evaluated configurations as scikit-optimize's own result, minimising."""
        ...

    def close(self) -> None:
        """Let go of threads and memory; the history can still be read."""
        ...


class HistoryOptimizer:
    """All bookkeeping of an optimizer, done once: numbers, pending trials, results in order, exact de-duplication.

    A subclass sets `method` and implements `_suggest`; it may implement `_learn`. Whatever it suggests is checked here:
    an illegal or known configuration is dropped, and random new ones fill the gap.

    Parameters
    ----------
    problem
        What to search; `HpProblem.check` is called.
    seed
        A whole number of at least 0. Without one it is drawn, and kept in `seed`.
    num_workers
        How many trials are expected to run at a time.

    Raises
    ------
    ProblemError
        If the problem cannot be searched.
    SettingsError
        If an option has a value that is not allowed.
    """

    method: ClassVar[str] = ""
    _waits: ClassVar[bool] = False
    """Whether `_suggest` may return fewer than asked for because it waits for results."""

    def __init__(self, problem: HpProblem, *, seed: int | None = None, num_workers: int = 1) -> None:
        self._seed = _checked_seed(seed)
        num_workers = whole_number("num_workers", num_workers, 1, SettingsError)
        problem.check()
        self._problem = problem
        self._encoder = problem.encoder
        self.num_workers = num_workers
        self._history = History(self._encoder.width)
        self._known: dict[bytes, int] = {}  # key -> how many trials and warm starts have it
        self._first_in_line = [(point, "start") for point in problem.starting_points]
        self._exhausted = False
        self._leftover: Leftover | None = None

    # -- what it knows -------------------------------------------------------------------------------------------------

    @property
    def problem(self) -> HpProblem:
        """The space that is searched."""
        return self._problem

    @property
    def seed(self) -> int:
        """The seed; one was drawn if none was given."""
        return self._seed

    @property
    def exhausted(self) -> bool:
        """Whether the last `ask` found the space used up."""
        return self._exhausted

    @property
    def num_asked(self) -> int:
        """How many trial numbers were given out; the next trial has this number."""
        return self._history.num_asked

    @property
    def num_told(self) -> int:
        """How many results were learnt, warm starts included."""
        return len(self._history)

    def rng_for(self, number: int, stream: int = 0) -> np.random.Generator:
        """The random generator of one trial number: the same under every driver of the search.

        `stream` separates uses of randomness that must not see the same numbers; 0 is the trial itself.
        """
        key = (number,) if stream == 0 else (number, stream)
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))

    # -- ask -----------------------------------------------------------------------------------------------------------

    def ask(self, n: int = 1) -> list[Trial]:
        """The next `n` trials; see `Optimizer`.

        Raises
        ------
        SettingsError
            If `n` is not a whole number of at least 0.
        """
        n = whole_number("n", n, 0, SettingsError)
        trials = self._ask_first_in_line(n)
        if len(trials) < n:
            trials += self._admit(self._suggest(n - len(trials)))
        if len(trials) < n and not self._waits:
            trials += self._ask_random(n - len(trials))
            self._exhausted = len(trials) < n
        return trials

    def _suggest(self, n: int) -> Sequence[Suggestion]:
        """Up to `n` suggestions for the numbers from `num_asked` on; fewer are filled up with random ones."""
        raise NotImplementedError

    def _learn(self, new: slice) -> None:
        """Called after results were recorded; `new` says which rows of `self._history` they are."""

    def _relearn(self) -> None:
        """Called when final results took the place of stopped ones, before `_learn`."""

    def _ask_first_in_line(self, n: int) -> list[Trial]:
        trials: list[Trial] = []
        while self._first_in_line and len(trials) < n:
            config, kind = self._first_in_line.pop(0)
            trials += self._admit([(config, Origin(kind, told=self.num_told))])
        return trials

    def add(self, config: Mapping[str, Any]) -> bool:
        """Put a configuration first in line, as a trial of the kind ``"user"``.

        Returns
        -------
        bool
            False, and nothing is changed, if it was asked or told before or is in line already.

        Raises
        ------
        ProblemError
            If it is not in the space.
        """
        checked = self._problem.check_configuration(config)
        key = self._encoder.key(checked)
        if key in self._known or any(self._encoder.key(other) == key for other, _ in self._first_in_line):
            return False
        self._first_in_line.append((checked, "user"))
        self._exhausted = False
        return True

    def _ask_random(self, n: int) -> list[Trial]:
        rows, keys = self._new_random_rows(n)
        return self._record(rows, keys, [Origin("random", told=self.num_told)] * len(keys))

    def _admit(self, suggestions: Sequence[Suggestion]) -> list[Trial]:
        """Record the suggestions that are legal and new."""
        if not suggestions:
            return []
        rows = self._encoder.snap(np.stack([self._as_row(what) for what, _ in suggestions]))
        keys, legal = self._encoder.keys(rows), self._encoder.legal(rows)
        new: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if legal[index] and key not in self._known:
                new.setdefault(key, index)
        kept = list(new.values())
        return self._record(rows[kept], list(new), [suggestions[index][1] for index in kept])

    def _record(self, rows: FloatArray, keys: Sequence[bytes], origins: Sequence[Origin]) -> list[Trial]:
        """Give numbers to these rows, which must be snapped, legal and new, and keep them as pending."""
        trials: list[Trial] = []
        for row, key, config, origin in zip(rows, keys, self._encoder.decode(rows), origins, strict=True):
            self._known[key] = 1
            trials.append(Trial(self._history.ask(row), config, origin))
        return trials

    def _as_row(self, what: FloatArray | Config) -> FloatArray:
        row: FloatArray = self._encoder.encode([what])[0] if isinstance(what, dict) else np.asarray(what)
        return row

    def _new_random_rows(self, n: int, stream: int = 0) -> tuple[FloatArray, list[bytes]]:
        """Random new legal rows and their keys, for the numbers from `num_asked` on; fewer when there are no more.

        The row of a number depends on the seed, the number and what was known before it, not on how many are asked at a
        time: the first draw of all numbers is made at once, and only those that collide draw again, one by one.
        """
        encoder, first = self._encoder, self.num_asked
        rngs = [self.rng_for(first + i, stream) for i in range(n)]
        if not rngs:
            return np.empty((0, encoder.width)), []
        rows = encoder.snap(encoder.from_unit_cube(np.stack([rng.random(encoder.width) for rng in rngs])))
        keys, legal = encoder.keys(rows), encoder.legal(rows)
        taken: dict[bytes, None] = {}
        for i, rng in enumerate(rngs):
            if not legal[i] or keys[i] in self._known or keys[i] in taken:
                other = self._redraw(rng, taken)
                if other is None:
                    break
                rows[i], keys[i] = other
            taken[keys[i]] = None
        return rows[: len(taken)], keys[: len(taken)]

    def _redraw(self, rng: np.random.Generator, taken: Mapping[bytes, None]) -> tuple[FloatArray, bytes] | None:
        """A random new legal row and its key, or None if there is no more.

        A few draws first; then a space of up to 2**18 configurations is gone through completely, and of a larger one
        16384 draws in vain count as its end.
        """
        encoder = self._encoder
        for tries in (_FIRST_TRIES, _LAST_TRIES):
            if tries == _LAST_TRIES:
                if self._leftover is None:
                    universe = encoder.enumerate(_ENUMERATION_LIMIT)
                    self._leftover = Leftover(universe, [] if universe is None else encoder.keys(universe))
                if self._leftover.rows is not None:
                    return self._leftover.pick(rng, self._known, taken)
            rows = encoder.snap(encoder.from_unit_cube(rng.random((tries, encoder.width))))
            keys, legal = encoder.keys(rows), encoder.legal(rows)
            for row, key, ok in zip(rows, keys, legal, strict=True):
                if ok and key not in self._known and key not in taken:
                    return row, key
        return None

    # -- tell ----------------------------------------------------------------------------------------------------------

    def tell(self, results: Iterable[Result] | Result) -> None:
        """Learn results, or a single one; see `Optimizer`.

        Raises
        ------
        TellError
            If a number was never asked, was withdrawn, or was told with another value. Nothing was learnt then.
        ProblemError
            If the configuration of a warm start is not in the space. Nothing was learnt then.
        """
        results = [results] if isinstance(results, Result) else list(results)
        for result in results:
            if not isinstance(result, Result):
                raise TellError(
                    "tell takes Results, such as Result(0, 0.93) or Result(None, 0.9, config={...}), "
                    f"but got {result!r}."
                )
        warm_rows = iter(self._warm_rows([result.config or {} for result in results if result.number is None]))
        accepted: list[tuple[Result, FloatArray | None]] = []
        before: dict[int, Result] = {}
        for result in results:
            if result.number is None:
                accepted.append((result, next(warm_rows)))
            elif self._is_new(result, before):
                before[result.number] = result
                accepted.append((result, None))
        if not accepted:
            return
        start, amended = len(self._history), self._history.amended
        for result, row in accepted:
            if row is not None:
                key = self._encoder.keys(row[None, :])[0]
                self._known[key] = self._known.get(key, 0) + 1
            if result.number is not None and self._history.state(result.number) == "told":
                self._history.amend(result.number, result.objective, result.curve)
            else:
                self._history.tell(result.number, row, result.objective, result.curve, result.stopped)
        if self._history.amended > amended:
            self._relearn()
        if len(self._history) > start:
            self._learn(slice(start, len(self._history)))

    def _is_new(self, result: Result, told_with_it: Mapping[int, Result]) -> bool:
        number = result.number
        assert number is not None
        state = self._history.state(number)
        if state == "unknown":
            raise TellError(
                f"Trial {number} was never asked: {counted(self.num_asked, 'trial was', 'trials were')} asked, "
                "numbered from 0. A point from elsewhere is told as Result(None, objective, config={...})."
            )
        if state == "withdrawn":
            raise TellError(
                f"Trial {number} was withdrawn; tell its result as Result(None, objective, config={{...}})."
            )
        if number in told_with_it:
            before, stopped = told_with_it[number].objective, told_with_it[number].stopped
        elif state == "told":
            before, stopped = self._history.objective_of(number), self._history.was_stopped(number)
        else:
            return True
        if stopped and not result.stopped:  # it went on
            return True
        if before != result.objective:
            raise TellError(
                f"Trial {number} was told {_said(before)} and cannot be told {_said(result.objective)}: "
                "each number has one result."
            )
        return False

    def _warm_rows(self, configs: Sequence[Config]) -> FloatArray:
        try:
            return self._encoder.encode(self._problem.check_configurations(configs))
        except ProblemError as error:
            raise ProblemError(f"A warm start is not in the space: {error}") from error

    def withdraw(self, numbers: Iterable[int]) -> None:
        """Forget pending trials that will never be evaluated; their configurations may be asked again.

        Raises
        ------
        TellError
            If a trial was never asked or has a result. Nothing was changed then.
        """
        numbers = list(dict.fromkeys(numbers))
        for number in numbers:
            state = self._history.state(number)
            if state in ("unknown", "told"):
                why = "was never asked" if state == "unknown" else "has a result"
                raise TellError(f"Trial {number} cannot be withdrawn: it {why}.")
        for number in numbers:
            if self._history.state(number) == "pending":
                key = self._encoder.keys(self._history.withdraw(number)[None, :])[0]
                self._known[key] -= 1
                if not self._known[key]:
                    del self._known[key]
                self._exhausted = False
                if self._leftover is not None:
                    self._leftover.reset()

    # -- restore -------------------------------------------------------------------------------------------------------

    def restore(self, trials: Sequence[Trial], results: Sequence[Result], withdrawn: Iterable[int] = ()) -> None:
        """Take over from an earlier driver: all its trials, and its results in the order in which they were told.

        Parameters
        ----------
        trials
            Every trial that was asked, also those with a result and those withdrawn.
        results
            What was told, warm starts included.
        withdrawn
            Numbers of the trials that were withdrawn.

        Raises
        ------
        TellError
            If something was asked or told before, a number comes twice, or a result belongs to no trial.
        ProblemError
            If a configuration is not in the space. After either error the optimizer is of no more use.
        """
        if self.num_asked or self.num_told:
            raise TellError(
                f"`restore` needs a fresh optimizer, but {counted(self.num_asked, 'trial was', 'trials were')} asked "
                "already."
            )
        ordered = sorted(trials, key=lambda trial: trial.number)
        for one, other in pairwise(ordered):
            if one.number == other.number:
                raise TellError(f"Trial {one.number} comes twice in `trials`.")
        configs = self._problem.check_configurations([trial.config for trial in ordered])
        rows = self._encoder.encode(configs)
        for trial, row, key in zip(ordered, rows, self._encoder.keys(rows), strict=True):
            self._history.ask(row, trial.number)
            self._known[key] = self._known.get(key, 0) + 1
        self._remember(ordered)
        self.tell(results)
        self.withdraw(withdrawn)
        # A starting point that was withdrawn is known no more, and is asked again
        self._first_in_line = [entry for entry in self._first_in_line if self._encoder.key(entry[0]) not in self._known]
        self._resume(ordered)

    def _remember(self, trials: Sequence[Trial]) -> None:
        """Called by `restore` with the trials in order of their numbers, before their results are told."""

    def _resume(self, trials: Sequence[Trial]) -> None:
        """Called at the end of `restore` with the trials in order of their numbers, their results known by then."""

    # -- export --------------------------------------------------------------------------------------------------------

    def to_skopt(self) -> skopt.OptimizeResult:
        """The evaluated configurations as scikit-optimize's own result: minimising, failures left out."""
        from deephyper_balsam.optimizers.surrogates import to_optimize_result

        done = ~self._history.failed
        configs = self._encoder.decode(self._history.X[done])
        return to_optimize_result(self._problem, configs, self._history.y[done].tolist())

    def close(self) -> None:
        """Let go of threads and memory; the history can still be read."""

    def __repr__(self) -> str:
        counts = f"asked={self.num_asked}, told={self.num_told}"
        return f"{type(self).__name__}({self._problem.name!r}, seed={self._seed}, {counts})"


def _checked_seed(seed: int | None) -> int:
    if seed is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    return whole_number("seed", seed, 0, SettingsError)


def _said(objective: Any) -> str:
    return "a failure" if objective is None else f"the objective {objective!r}"
