"""The values that travel between optimizer, evaluator and driver: `Trial`, `Result`, `TrialState`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from deephyper_balsam.errors import InputError

Config = dict[str, Any]
"""One configuration: hyperparameter name -> plain Python value; inactive hyperparameters are absent."""


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
        if self.number < 0:
            raise InputError(f"`number >= 0` must hold, but got (number={self.number}).")


@dataclass(frozen=True)
class Result:
    """How one trial ended: with an objective (maximised), or with a reason why it has none.

    Attributes
    ----------
    number
        The trial's number, or None for a point from elsewhere (a warm start), which brings its `config`.
    objective
        A finite number, or None for a failure.
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

    def __post_init__(self) -> None:
        if (self.objective is None) == (self.failure is None):
            raise InputError(
                "Exactly one of `objective` and `failure` must be given, but got "
                f"(objective={self.objective!r}, failure={self.failure!r})."
            )
        if self.objective is not None:
            if isinstance(self.objective, bool) or not math.isfinite(self.objective):
                raise InputError(
                    f"`objective` must be a finite number, but got {self.objective!r}; "
                    'a run without one is a failure: Result(number, None, failure="why").'
                )
            object.__setattr__(self, "objective", float(self.objective))
        if self.number is None and self.config is None:
            raise InputError(
                "A result without a trial number must bring its configuration: Result(None, y, config={...})."
            )

    @property
    def state(self) -> TrialState:
        """DONE with an objective, FAILED without."""
        return TrialState.FAILED if self.objective is None else TrialState.DONE
