"""The values that travel between optimizer, evaluator and driver: `Trial`, `Result`, `TrialState`."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from deephyper_balsam.common.objective import objective_of
from deephyper_balsam.errors import InputError

Config = dict[str, Any]
"""One configuration: hyperparameter name -> plain Python value; inactive hyperparameters are absent."""


def whole_number(name: str, value: Any, least: int | None = None, error: type[InputError] = InputError) -> int:
    """Return `value` as an int if it is a whole number, numpy's too, but no bool, and at least `least`; else raise."""
    rule = f"`{name} >= {least}` must hold" if least is not None else f"`{name}` must be a whole number"
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{rule}, but got ({name}={value!r}); it must be a whole number.") from None
    if isinstance(value, bool) or (least is not None and number < least):
        raise error(f"{rule}, but got ({name}={value!r}).")
    return number


class TrialState(str, Enum):
    """Where a trial stands. The names are those of `job_status` in `results.csv`."""

    READY = "READY"  # waits in Balsam's queue
    RUNNING = "RUNNING"  # a node evaluates it
    DONE = "DONE"  # it has an objective
    FAILED = "FAILED"  # it has a reason and no objective
    CANCELLED = "CANCELLED"  # withdrawn before it ran

    @property
    def is_final(self) -> bool:
        """Whether nothing more can happen to a trial in this state."""
        return self in (TrialState.DONE, TrialState.FAILED, TrialState.CANCELLED)


@dataclass(frozen=True)
class Origin:
    """What a trial was asked from, kept with the trial so that a search can be replayed.

    Attributes
    ----------
    kind
        ``"start"`` (a starting point of the problem), ``"initial"`` (initial design), ``"model"`` (the surrogate),
        ``"random"``, ``"genetic"`` or ``"user"`` (added by hand).
    told
        How many results the optimizer had been told when it answered.
    model
        How many of those, in the order told, the surrogate behind this suggestion had learnt; 0 without one.
    """

    kind: str
    told: int = 0
    model: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.model <= self.told:
            raise InputError(f"`0 <= model <= told` must hold, but got (model={self.model}, told={self.told}).")


@dataclass(frozen=True)
class Trial:
    """One configuration to evaluate. `number` counts from 0 over the whole search and is never reused."""

    number: int
    config: Config
    origin: Origin = Origin("random")

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", whole_number("number", self.number, 0))


@dataclass(frozen=True)
class Result:
    """How one trial ended: with an objective, or with a reason why it has none.

    Attributes
    ----------
    number
        The trial's number, or None for a point from elsewhere (a warm start), which brings its `config`.
    objective
        A finite number, or None for a failure. Optimizers maximise it, whatever the search does: for a loss it is
        minus that.
    failure
        Why there is no objective, in one line; None when there is one.
    config
        The configuration; needed only when `number` is None.
    traceback
        The full text behind `failure`, if there is more to say than one line.
    started_at, ended_at
        Seconds since the epoch (UTC) on the node's clock, if known.
    host
        The node that ran it.
    metadata
        What the run function returned beside the objective; JSON values.
    curve
        What the run recorded on its way: pairs of a budget and an objective, by budget.
    stopped
        Whether it was told to stop before its end: the objective is then that of the last budget in `curve`.
    """

    number: int | None
    objective: float | None
    failure: str | None = None
    config: Config | None = None
    traceback: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    host: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    curve: Sequence[tuple[float, float]] = ()
    stopped: bool = False

    def __post_init__(self) -> None:
        if (self.objective is None) == (self.failure is None):
            raise InputError(
                "Exactly one of `objective` and `failure` must be given, but got "
                f"(objective={self.objective!r}, failure={self.failure!r})."
            )
        if self.objective is not None:
            try:
                objective = objective_of(self.objective)
            except ValueError as error:
                raise InputError(
                    f"`objective` must be a finite number, but got {error}; "
                    'a run without one is a failure: Result(number, None, failure="why").'
                ) from None
            object.__setattr__(self, "objective", objective)
        if self.number is not None:
            object.__setattr__(self, "number", whole_number("number", self.number))
        if self.number is None and self.config is None:
            raise InputError(
                "A result without a trial number must bring its configuration: Result(None, y, config={...})."
            )

    @property
    def state(self) -> TrialState:
        """DONE with an objective, FAILED without."""
        return TrialState.FAILED if self.objective is None else TrialState.DONE


@dataclass(frozen=True)
class Resources:
    """What one evaluation gets on a machine.

    Attributes
    ----------
    num_nodes, ranks_per_node, threads_per_rank, threads_per_core
        Nodes of one evaluation, MPI processes on each, threads of each, and threads that share a core.
    gpus_per_rank
        GPUs of each process.
    evals_per_node
        How many evaluations share a node (Balsam's `node_packing_count`); only 1 with several nodes.
    wall_time_min
        A launcher with fewer minutes left does not start an evaluation; 0: it always does.
    launch_params
        Passed on to the machine's MPI launcher.
    """

    num_nodes: int = 1
    ranks_per_node: int = 1
    threads_per_rank: int = 1
    threads_per_core: int = 1
    gpus_per_rank: float = 0
    evals_per_node: int = 1
    wall_time_min: int = 0
    launch_params: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_nodes", "ranks_per_node", "threads_per_rank", "threads_per_core", "evals_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name} >= 1` must hold, but got ({name}={getattr(self, name)}).")
        if self.gpus_per_rank < 0 or self.wall_time_min < 0:
            raise InputError(
                "`gpus_per_rank >= 0` and `wall_time_min >= 0` must hold, but got "
                f"(gpus_per_rank={self.gpus_per_rank}, wall_time_min={self.wall_time_min})."
            )
        if self.num_nodes > 1 and self.evals_per_node > 1:
            raise InputError(
                "An evaluation either spans nodes or shares one, but got "
                f"(num_nodes={self.num_nodes}, evals_per_node={self.evals_per_node})."
            )

    def slots(self, nodes: int) -> int:
        """Return how many evaluations `nodes` nodes run at once."""
        return nodes // self.num_nodes * self.evals_per_node
