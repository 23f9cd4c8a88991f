"""`HpProblem`: a ConfigSpace search space behind DeepHyper's `add_hyperparameter`."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ConfigSpace as cs
import numpy as np
from ConfigSpace.conditions import Condition, ConditionLike, Conjunction
from ConfigSpace.forbidden import ForbiddenClause, ForbiddenConjunction, ForbiddenLike, ForbiddenRelation
from ConfigSpace.hyperparameters import Hyperparameter

from deephyper_balsam.common.objective import command_minimises
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import ProblemError
from deephyper_balsam.problem.growing_space import ENUMERATION_LIMIT, GrowingSpace
from deephyper_balsam.problem.shorthands import (
    AnyHyperparameter,
    check_hyperparameter,
    check_text,
    from_shorthand,
    listed,
)
from deephyper_balsam.problem.space import REAL, Encoder, plain
from deephyper_balsam.problem.values import (
    allowed,
    check_value,
    condition_text,
    domain,
    text_of,
)
from deephyper_balsam.trial import Config

_FORMAT = 1
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:\-]*")


class HpProblem:
    """A search space, its default, its starting points, and which way its objective is better.

    Parameters
    ----------
    name
        What the problem is called in reports.
    minimize
        The run function returns a loss, as it is: the search looks for the smallest. By default for the largest.

    Examples
    --------
    >>> problem = HpProblem("digits")
    >>> layers = problem.add_hyperparameter((1, 8), "num_layers")
    >>> rate = problem.add_hyperparameter((1e-5, 1e-1, "log-uniform"), "learning_rate", default_value=1e-3)
    >>> activation = problem.add_hyperparameter(["relu", "tanh"], "activation")
    >>> problem.add_starting_point(num_layers=2, learning_rate=1e-3, activation="relu")
    >>> problem.default_configuration["learning_rate"]
    0.001

    Notes
    -----
    Configurations hold plain Python values, in the order in which the hyperparameters were added. Reals are kept to 12
    significant digits, so that a configuration is the same after any way through a file, a database or the unit matrix.
    """

    def __init__(self, name: str = "problem", *, minimize: bool = False) -> None:
        if not isinstance(name, str) or not name:
            raise ProblemError(f"The problem's name must be a non-empty str, but got {name!r}.")
        check_text("The problem's name", name)
        if not isinstance(minimize, bool):
            raise ProblemError(f"`minimize` must be True (for a loss) or False, but got {minimize!r}.")
        self._name = name
        self._minimize = minimize
        self._growing = GrowingSpace(name)
        self._starting_points: list[Config] = []
        self._encoder: tuple[tuple[int, ...], Encoder] | None = None
        self._size: tuple[Encoder, int | float] | None = None

    # -- what it holds -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What the problem is called."""
        return self._name

    @property
    def minimize(self) -> bool:
        """Whether the objective is minimised."""
        return self._minimize

    def minimized(self) -> HpProblem:
        """Return the same problem, with an objective that is minimised."""
        return HpProblem.from_dict({**self.to_dict(), "minimize": True})

    def as_run_by(self, spec: Any) -> HpProblem:
        """Return the problem as it is searched with this spec of what is run: a shell command may return a loss."""
        return self.minimized() if command_minimises(spec) and not self.minimize else self

    @property
    def space(self) -> cs.ConfigurationSpace:
        """The ConfigSpace behind it; ``problem["x"]`` is the hyperparameter to build conditions from."""
        return self._growing.space

    @property
    def hyperparameter_names(self) -> tuple[str, ...]:
        """The names in the order of addition, which is the order of the columns."""
        return self._growing.names

    @property
    def default_configuration(self) -> Config:
        """The defaults of all hyperparameters that are active by default."""
        encoder = self.encoder
        return encoder.decode(encoder.snap(np.full((1, encoder.width), np.nan)))[0]

    @property
    def starting_points(self) -> tuple[Config, ...]:
        """The configurations to evaluate first, as copies."""
        return tuple(dict(point) for point in self._starting_points)

    @property
    def encoder(self) -> Encoder:
        """Configurations to and from a float matrix; a snapshot of the space as it is now."""
        space = self.space
        stamp = (len(space), len(space.conditions), len(space.forbidden_clauses))
        if self._encoder is None or self._encoder[0] != stamp:
            self._encoder = (stamp, Encoder(space, self.hyperparameter_names))
        return self._encoder[1]

    @property
    def size(self) -> int | float:
        """How many distinct configurations there are; ``math.inf`` with an active real.

        Exact up to 65,536 configurations; above, an upper bound that leaves conditions and forbidden clauses out.
        """
        encoder = self.encoder
        if self._size is None or self._size[0] is not encoder:
            rows = encoder.enumerate(ENUMERATION_LIMIT)
            if rows is not None:
                size: int | float = len(rows)
            elif any(column.kind == REAL for column in encoder.columns):
                size = math.inf
            else:
                size = math.prod(column.size for column in encoder.columns)
            self._size = (encoder, size)
        return self._size[1]

    def __getitem__(self, name: str) -> AnyHyperparameter:
        if name not in self:
            raise KeyError(f"There is no hyperparameter {name!r}; there are: {listed(self.hyperparameter_names)}.")
        return self._growing[name]

    def __contains__(self, name: object) -> bool:
        return name in self._growing

    def __iter__(self) -> Iterator[str]:
        return iter(self.hyperparameter_names)

    def __len__(self) -> int:
        return len(self._growing)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, HpProblem) else NotImplemented

    __hash__ = object.__hash__

    # -- building ------------------------------------------------------------------------------------------------------

    def add_hyperparameter(self, value: Any, name: str | None = None, default_value: Any = None) -> AnyHyperparameter:
        """Add one hyperparameter and return it as a ConfigSpace object, to build conditions from.

        Parameters
        ----------
        value
            ``(int, int)``: an integer range, both ends included. ``(float, float)``: a real range. Either with
            ``"uniform"`` or ``"log-uniform"`` as a third entry. A list: the choices; numbers make an ordinal in the
            order given, anything else a categorical. A single str, bool or number: a constant. A mapping with ``mu``,
            ``sigma``, ``lower`` and ``upper``: a truncated normal. Or a ConfigSpace hyperparameter.
        name
            Letters, digits and ``_ . : -``, beginning with a letter or ``_``. A template of a shell command
            (``{{ name }}``) can only use names without ``. : -``.
        default_value
            By default ConfigSpace's choice: the middle of a range, the first of a list.

        Raises
        ------
        ProblemError
            If the shorthand, the name or the default cannot be used; the problem is then as before.
        """
        if isinstance(value, Hyperparameter):
            if name is not None and name != value.name:
                raise ProblemError(
                    f"The hyperparameter is called {value.name!r}, but got name={name!r}; leave `name` out."
                )
            if default_value is not None:
                raise ProblemError(f"Give `default_value` to the ConfigSpace object {value.name!r} itself.")
            name = value.name
        self._check_name(name)
        assert name is not None
        hyperparameter = value if isinstance(value, Hyperparameter) else from_shorthand(value, name, default_value)
        check_hyperparameter(hyperparameter)
        self._growing.add_hyperparameter(hyperparameter)
        return hyperparameter

    def add_hyperparameters(self, hyperparameters: Iterable[Any]) -> list[AnyHyperparameter]:
        """Add several, all or none: ConfigSpace hyperparameters, or tuples ``(value, name[, default_value])``."""
        items = list(hyperparameters)
        trial = copy.deepcopy(self)
        for target in (trial, self):
            added = [
                target.add_hyperparameter(item)
                if isinstance(item, Hyperparameter)
                else target.add_hyperparameter(*_arguments(item))
                for item in items
            ]
        return added if items else []

    def add_condition(self, condition: ConditionLike) -> ConditionLike:
        """Make a hyperparameter active only under a ConfigSpace condition or conjunction of conditions.

        Raises
        ------
        ProblemError
            If it is no condition, names an unknown hyperparameter, makes a cycle, or the child has a condition already.
        """
        if not isinstance(condition, (Condition, Conjunction)):
            raise ProblemError(
                "A condition must be a ConfigSpace condition, such as "
                f'EqualsCondition(problem["child"], problem["parent"], value), but got {condition!r}.'
            )
        self._growing.add(copy.copy(condition), "condition")
        return condition

    def add_conditions(self, conditions: Iterable[ConditionLike]) -> list[ConditionLike]:
        """Add several conditions."""
        return [self.add_condition(condition) for condition in conditions]

    def add_forbidden_clause(self, clause: ForbiddenLike) -> ForbiddenLike:
        """Forbid the configurations that a ConfigSpace clause, conjunction or relation describes.

        Raises
        ------
        ProblemError
            If it is no clause, names an unknown hyperparameter, or forbids the default configuration or everything.
        """
        if not isinstance(clause, (ForbiddenClause, ForbiddenConjunction, ForbiddenRelation)):
            raise ProblemError(
                "A forbidden clause must be a ConfigSpace clause, such as "
                f'ForbiddenEqualsClause(problem["x"], value), but got {clause!r}.'
            )
        self._growing.add(copy.copy(clause), "forbidden clause")
        return clause

    def add_forbidden_clauses(self, clauses: Iterable[ForbiddenLike]) -> list[ForbiddenLike]:
        """Add several forbidden clauses."""
        return [self.add_forbidden_clause(clause) for clause in clauses]

    def add_starting_point(self, config: Mapping[str, Any] | None = None, /, **values: Any) -> None:
        """Evaluate this configuration before any other. The same point twice is one point.

        Raises
        ------
        ProblemError
            If it lies outside the space, or lacks or has a hyperparameter too many.
        """
        try:
            point = self.check_configuration({**(config or {}), **values})
        except ProblemError as error:
            raise ProblemError(f"The starting point cannot be used: {error}") from error
        if point not in self._starting_points:
            self._starting_points.append(point)

    # -- checking ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `ProblemError` unless the problem can be searched.

        It needs at least one hyperparameter, at least one legal configuration that random draws can find (finite spaces
        of up to 65,536 configurations are gone through completely), and starting points inside the space.
        """
        if not len(self):
            raise ProblemError(
                f'The problem "{self.name}" has no hyperparameters. Add one: '
                'problem.add_hyperparameter((1, 8), "num_layers").'
            )
        encoder = self.encoder
        rows = encoder.enumerate(ENUMERATION_LIMIT)
        if rows is None:
            rows = encoder.sample(1, np.random.default_rng(0), partial=True)
        if not len(rows):
            raise ProblemError(
                f'The problem "{self.name}" is contradictory: its forbidden clauses leave no configuration that could '
                f"be found. Remove one of: {listed(map(text_of, self.space.forbidden_clauses))}."
            )
        for point in self._starting_points:
            try:
                self.check_configuration(point)
            except ProblemError as error:
                raise ProblemError(f"The starting point {point} no longer fits the space: {error}") from error

    def check_configuration(self, config: Mapping[str, Any]) -> Config:
        """Return `config` in its normal form: plain values on the grid, in column order.

        Raises
        ------
        ProblemError
            If a name is unknown, a value is outside its range or choices, an active hyperparameter has no value, an
            inactive one has a value, or a forbidden clause excludes it.
        """
        return self.check_configurations([config])[0]

    def check_configurations(self, configs: Sequence[Mapping[str, Any]]) -> list[Config]:
        """`check_configuration` of many at once, in a fraction of the time.

        Raises
        ------
        ProblemError
            For the first that cannot be used.
        """
        encoder = self.encoder
        given = [self._check_values(config, encoder) for config in configs]
        rows = encoder.encode(given)
        legal = encoder.snap(rows)
        wrong = np.argwhere(np.isnan(rows) != np.isnan(legal))
        if len(wrong):
            index, j = wrong[0].tolist()
            column = encoder.columns[j]
            if column.name not in given[index]:
                raise ProblemError(f"`{column.name}` has no value: {allowed(column)}.")
            why = listed(map(str, self.space.parent_conditions_of[column.name]))
            raise ProblemError(
                f"`{column.name}` is inactive here and must be left out, but got {given[index][column.name]!r} ({why})."
            )
        forbidden = np.flatnonzero(~encoder.legal(legal))
        if len(forbidden):
            index = int(forbidden[0])
            clause = encoder.forbidding_clause(legal[index])
            raise ProblemError(f"The configuration {given[index]} is excluded by a forbidden clause: {clause}.")
        return encoder.decode(legal)

    def inactive(self, config: Mapping[str, Any]) -> frozenset[str]:
        """Return which hyperparameters the conditions leave out, given these values and else the defaults.

        Raises
        ------
        ProblemError
            If a name is unknown, or a value is outside its range or choices.
        """
        encoder = self.encoder
        legal = encoder.snap(encoder.encode([self._check_values(config, encoder)]))[0]
        return frozenset(name for name, off in zip(encoder.names, np.isnan(legal).tolist(), strict=True) if off)

    def fill_in(self, config: Mapping[str, Any]) -> Config:
        """Return `config` with the defaults of the active hyperparameters that it lacks, checked as a whole.

        Raises
        ------
        ProblemError
            As `check_configuration`.
        """
        encoder = self.encoder
        given = self._check_values(config, encoder)
        filled = encoder.decode(encoder.snap(encoder.encode([given])))[0]
        return self.check_configuration({**filled, **given})

    @staticmethod
    def _check_values(config: Mapping[str, Any], encoder: Encoder) -> Config:
        if not isinstance(config, Mapping):
            raise ProblemError(f"A configuration must be a dict of name -> value, but got {config!r}.")
        given = {c.name: check_value(c, config[c.name]) for c in encoder.columns if c.name in config}
        if len(given) < len(config):
            unknown = next(name for name in config if name not in given)
            raise ProblemError(f"There is no hyperparameter {unknown!r}; there are: {listed(encoder.names)}.")
        return given

    # -- to and from JSON ----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The whole problem as JSON values; `from_dict` gives back an equal one.

        Raises
        ------
        ProblemError
            If ConfigSpace cannot write one of its objects.
        """
        try:
            space = plain(self.space.to_serialized_dict())
        except Exception as error:
            raise ProblemError(f'The problem "{self.name}" cannot be written as JSON: {error}') from error
        # The version of ConfigSpace says nothing about the problem, and two equal problems must read equal.
        space.pop("python_module_version", None)
        return {
            "format": _FORMAT,
            "name": self.name,
            **({"minimize": True} if self.minimize else {}),  # absent: as in the records of before
            "hyperparameters": list(self.hyperparameter_names),
            "space": space,
            "starting_points": [dict(point) for point in self._starting_points],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HpProblem:
        """Rebuild a problem from `to_dict`.

        Raises
        ------
        ProblemError
            If the data is of another format or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            got = data.get("format") if isinstance(data, Mapping) else data
            raise ProblemError(f"A problem must be a dict with format {_FORMAT}, but got {got!r}.")
        if missing := [key for key in ("name", "hyperparameters", "space", "starting_points") if key not in data]:
            raise ProblemError(f"The problem cannot be read: {listed(missing)} is missing.")
        problem = cls(data["name"], minimize=data.get("minimize", False))
        try:
            serialized = {**copy.deepcopy(data["space"]), "python_module_version": cs.__version__}
            space = cs.ConfigurationSpace.from_serialized_dict(serialized)
        except Exception as error:
            raise ProblemError(f"The problem's space cannot be read: {error}") from error
        problem._growing = GrowingSpace.of(space, data["hyperparameters"])
        for point in data["starting_points"]:
            problem.add_starting_point(point)
        return problem

    # -- for the eye ---------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """A readable table of the space, as several lines of text."""
        rows = [("hyperparameter", "kind", "values", "default", "active if")]
        for column in self.encoder.columns:
            default = plain(self.space[column.name].default_value)
            conditions = " and ".join(condition_text(c) for c in self.space.parent_conditions_of[column.name])
            rows.append((column.name, column.kind, domain(column), f"{default!r}", conditions or "always"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        size = self.size
        count = "infinitely many configurations" if math.isinf(size) else f"{size:,} configuration{'s' * (size != 1)}"
        way = "minimised" if self.minimize else "maximised"
        lines = [f'Problem "{self.name}": {counted(len(self), "hyperparameter")}, {count}, objective {way}', ""]
        lines += [table[0], "-" * max(map(len, table)), *table[1:]]
        if self.space.forbidden_clauses:
            lines += [
                "",
                "Forbidden:",
                *(f"  {text_of(c)}" for c in self.space.forbidden_clauses),
            ]
        if self._starting_points:
            lines += ["", "Starting points:", *(f"  {point}" for point in self._starting_points)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.describe() if len(self) else f'Problem "{self.name}": no hyperparameters yet'

    # -- inside --------------------------------------------------------------------------------------------------------

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str):
            raise ProblemError(f"A hyperparameter's name must be a str, but got {name!r}.")
        if not _NAME.fullmatch(name) or name == "self":
            raise ProblemError(
                "A hyperparameter's name must begin with a letter or _, go on with letters, digits and _ . : -, and "
                f'not be "self", but got {name!r}.'
            )
        if name in self:
            raise ProblemError(f"There is a hyperparameter {name!r} already. Choose another name.")


def _arguments(item: Any) -> tuple[Any, ...]:
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) in (2, 3) and isinstance(item[1], str):
        return tuple(item)
    raise ProblemError(
        f"Each hyperparameter must be a ConfigSpace object or (value, name[, default_value]), but got {item!r}."
    )
