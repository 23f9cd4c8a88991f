"""A ConfigSpace that grows piece by piece in linear time.

ConfigSpace goes through the whole space at each addition. Here each piece is tried with what it names alone, and all
pieces are handed over at once when the space is needed.
"""

from __future__ import annotations

import copy
from typing import Any

import ConfigSpace as cs
import numpy as np
from ConfigSpace.conditions import Condition, ConditionLike, Conjunction
from ConfigSpace.forbidden import ForbiddenLike
from ConfigSpace.hyperparameters import Hyperparameter

from deephyper_balsam.errors import ProblemError
from deephyper_balsam.problem.shorthands import AnyHyperparameter, listed
from deephyper_balsam.problem.space import Encoder
from deephyper_balsam.problem.values import hyperparameters_of, text_of

ENUMERATION_LIMIT = 2**16


class GrowingSpace:
    """Hyperparameters, conditions and forbidden clauses, given to ConfigSpace when somebody asks for `space`.

    Parameters
    ----------
    name
        The space's name.
    """

    def __init__(self, name: str) -> None:
        self._space = cs.ConfigurationSpace(name=name)
        self._pending: list[AnyHyperparameter | ConditionLike | ForbiddenLike] = []
        self._new: dict[str, AnyHyperparameter] = {}
        self._new_conditions: dict[str, list[ConditionLike]] = {}
        self._names: list[str] = []

    @classmethod
    def of(cls, space: cs.ConfigurationSpace, names: list[str]) -> GrowingSpace:
        """Return one that goes on from a space; `names` is the order in which its hyperparameters were added."""
        made = cls(str(space.name))
        made._space, made._names = space, [name for name in names if name in space]
        return made

    @property
    def space(self) -> cs.ConfigurationSpace:
        """All of it, as ConfigSpace has it."""
        if self._pending:
            self._hand_over()
        return self._space

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the order of addition."""
        known = set(self._names)
        return (*self._names, *(name for name in self._space if name not in known))

    def __getitem__(self, name: str) -> AnyHyperparameter:
        return self._new[name] if name in self._new else self._space[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._new or name in self._space)

    def __len__(self) -> int:
        return len(self._space) + len(self._new)

    def add_hyperparameter(self, hyperparameter: AnyHyperparameter) -> None:
        """Add a hyperparameter whose name is new."""
        self._pending.append(hyperparameter)
        self._new[hyperparameter.name] = hyperparameter
        self._names.append(hyperparameter.name)

    def add(self, item: Any, what: str) -> None:
        """Add a condition or a clause that fits what it names; ConfigSpace gets it when the space is needed.

        Parameters
        ----------
        item
            The condition or clause.
        what
            What it is called in a message.

        Raises
        ------
        ProblemError
            When it fits not; the space is then as before.
        """
        for hp in hyperparameters_of(item):
            if hp.name not in self:
                raise ProblemError(
                    f"The {what} ({text_of(item)}) names {hp.name!r}, but there are only: {listed(self.names)}."
                )
            if hp != self[hp.name]:
                raise ProblemError(
                    f"The {what} ({text_of(item)}) was made from another {hp.name!r}; "
                    f'make it from problem["{hp.name}"].'
                )
        try:
            self._part_of(item).add(copy.copy(item))
        except Exception:  # said with the whole space at hand
            self._refuse(item, what)
        self._pending.append(item)
        if isinstance(item, (Condition, Conjunction)):
            self._new_conditions.setdefault(item.child.name, []).append(item)

    def _part_of(self, item: Any) -> cs.ConfigurationSpace:
        """Return a space of what an item names and of all that decides whether this is active."""
        names = list(dict.fromkeys(hp.name for hp in hyperparameters_of(item)))
        conditions: list[ConditionLike] = []
        for name in names:  # grows
            for condition in self._conditions_of(name):
                conditions.append(condition)
                names += [hp.name for hp in hyperparameters_of(condition) if hp.name not in names]
        # Copies, since a space writes its own places into them
        kept = {id(hp): hp for condition in conditions for hp in hyperparameters_of(condition)}
        part = cs.ConfigurationSpace()
        part.add([self[name] for name in names], [copy.deepcopy(condition, dict(kept)) for condition in conditions])
        return part

    def _conditions_of(self, name: str) -> list[ConditionLike]:
        known = list(self._space.parent_conditions_of[name]) if name in self._space else []
        return known + self._new_conditions.get(name, [])

    def _refuse(self, item: Any, what: str) -> None:
        """Raise why an item cannot be added. To a copy, because ConfigSpace keeps what it complains about."""
        trial = copy.deepcopy(self.space)
        try:
            trial.add(copy.copy(item))
        except cs.exceptions.ForbiddenValueError as error:
            raise ProblemError(self._explain_forbidden_default(trial, item)) from error
        except Exception as error:
            raise ProblemError(
                f"The {what} ({text_of(item)}) cannot be added: {error or type(error).__name__}"
            ) from error

    def _hand_over(self) -> None:
        """Give ConfigSpace what was added, all at once."""
        pending = self._pending
        known = [*self._space.values(), *self._space.conditions, *self._space.forbidden_clauses]
        name = self._space.name
        self._pending, self._new, self._new_conditions = [], {}, {}
        try:
            self._space.add(pending)
        except Exception as found:  # each fits what it names, but one not the others
            error = found
            fitting, failing = 0, len(pending)
            while failing - fitting > 1:
                middle = (fitting + failing) // 2
                try:
                    cs.ConfigurationSpace().add(copy.deepcopy([*known, *pending[:middle]]))
                    fitting = middle
                except Exception as earlier:
                    failing, error = middle, earlier
            self._space = cs.ConfigurationSpace(name=name)
            self._space.add(known, pending[:fitting])
            wrong, self._pending = pending[fitting], pending[failing:]
            for item in self._pending:
                if isinstance(item, Hyperparameter):
                    self._new[item.name] = item
                elif isinstance(item, (Condition, Conjunction)):
                    self._new_conditions.setdefault(item.child.name, []).append(item)
            raise ProblemError(
                f"({text_of(wrong)}) does not fit what was added before, and was taken out: "
                f"{error or type(error).__name__}"
            ) from error

    def _explain_forbidden_default(self, space: cs.ConfigurationSpace, item: Any) -> str:
        encoder = Encoder(space, self.names)
        rows = encoder.enumerate(ENUMERATION_LIMIT)
        if rows is None:
            rows = encoder.sample(1, np.random.default_rng(0), partial=True)
        if not len(rows):
            return (
                f"With ({text_of(item)}) the space is contradictory: no configuration is left. "
                "Remove a forbidden clause."
            )
        default = encoder.decode(encoder.snap(np.full((1, encoder.width), np.nan)))[0]
        return (
            f"The default configuration {default} must be legal, but ({text_of(item)}) excludes it. "
            f"Give other defaults with `default_value`; legal would be {encoder.decode(rows[:1])[0]}."
        )
