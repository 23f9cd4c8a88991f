"""How a search stands as a whole: its budget, who drives it, what people asked of it, and what to do next.

There is one `SearchState`, and whoever needs to know whether a search is complete asks it: the driver, `status`,
`watch`, `add`, `submit` and `utilization`. It is worked out from counts of trials and from the search's notes
(`store.notes`); nothing in it is read twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import SettingsError
from deephyper_balsam.store.driver_requests import ADD, DriverRequest, effective_budget
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.lease import Lease, current_lease
from deephyper_balsam.store.notes import read_notes
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.trial import TrialState


class EndReason(str, Enum):
    """Why a search has nothing more to do. The values are the words that a driver leaves in its note."""

    EVALUATIONS = "complete"
    TIME = "the time is over"
    SPACE = "every configuration of the space has been evaluated"

    @classmethod
    def of(cls, why: str | None) -> EndReason | None:
        """Return the reason that a driver left for; None: it left for another one, or has not left."""
        return next((reason for reason in cls if reason.value == why), None)


@dataclass(frozen=True)
class Budget:
    """What the whole search may take; None: no limit.

    Attributes
    ----------
    max_evals
        Evaluations, failed ones included.
    timeout_s
        Seconds in which a driver was at work.
    """

    max_evals: int | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_evals is not None and self.max_evals < 1:
            raise SettingsError(f"`max_evals >= 1` must hold, but got {self.max_evals}.")
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise SettingsError(f"`timeout > 0` (seconds) must hold, but got {self.timeout_s}.")

    def extended(self, request: DriverRequest) -> Budget:
        """Return the budget after a request to extend it; it never shrinks, and what has no limit gets none."""
        pairs = ((self.max_evals, request.max_evals), (self.timeout_s, request.timeout_s))
        return Budget(*(now if now is None or new is None else max(now, new) for now, new in pairs))  # type: ignore[arg-type]

    def used(self, evaluated: int, driven_s: float) -> EndReason | None:
        """Return why nothing more may be done, after so many evaluations and seconds; None: something may."""
        if self.timeout_s is not None and driven_s >= self.timeout_s:
            return EndReason.TIME
        if self.max_evals is not None and evaluated >= self.max_evals:
            return EndReason.EVALUATIONS
        return None

    def __str__(self) -> str:
        parts = [counted(self.max_evals, "evaluation")] if self.max_evals is not None else []
        parts += [f"{self.timeout_s:g} s"] if self.timeout_s is not None else []
        return " and ".join(parts)


@dataclass(frozen=True)
class SearchState:
    """A search at one moment, apart from what its trials found.

    Attributes
    ----------
    name
        The search's name.
    budget
        What it may take now: as planned, given, and extended.
    evaluated, waiting, running
        How many trials have ended with a result or a failure, wait, and run.
    driven_s
        Seconds that drivers have driven it, over all its leases.
    driver
        Who drives it; None: nobody.
    leases
        The drivers that drove it, the oldest first.
    requests
        What people asked of it, the oldest first.
    carriers
        BatchJobs of `search submit` that are alive: each carries a driver, or will.
    """

    name: str
    budget: Budget
    evaluated: int
    waiting: int
    running: int
    driven_s: float
    driver: Lease | None
    leases: tuple[Lease, ...]
    requests: tuple[DriverRequest, ...]
    carriers: tuple[Row, ...] = ()

    @property
    def end(self) -> EndReason | None:
        """Why the search has nothing more to do; None: there is something left.

        That a space is used up only the driver that asked for the next configuration knows; it says so as it leaves.
        """
        used = self.budget.used(self.evaluated, self.driven_s)
        if used is None and self.driver is None and self.leases:
            left_for = EndReason.of(self.leases[-1].why)
            used = left_for if left_for is EndReason.SPACE else None
        return used

    @property
    def is_over(self) -> bool:
        """Whether nothing more is done unless somebody asks for it: it has ended, and no driver is there or to come."""
        return self.end is not None and self.driver is None and not self.carriers

    @property
    def all_submitted(self) -> bool:
        """Whether every trial that the budget allows has been submitted: those that run and wait are the last."""
        under_way = self.evaluated + self.waiting + self.running
        return self.is_over or (self.budget.max_evals is not None and under_way >= self.budget.max_evals)

    @property
    def additions(self) -> tuple[DriverRequest, ...]:
        """Configurations that people added and that have not been submitted yet."""
        return tuple(request for request in self.requests if request.what == ADD and request.handled is None)

    @property
    def extension(self) -> str | None:
        """The command that gives the search what it has used up; None: it has not, or nothing would help."""
        if self.end in (None, EndReason.SPACE) and not (self.additions and self.all_submitted):
            return None
        options = []
        if self.budget.max_evals is not None and self.all_submitted and self.evaluated >= self.budget.max_evals:
            options.append("--max-evals N")
        if self.additions and self.budget.max_evals is not None and self.all_submitted:
            needed = self.evaluated + self.waiting + self.running + len(self.additions)
            options = [f"--max-evals {max(needed, self.budget.max_evals + 1)}"]
        if self.budget.timeout_s is not None and self.driven_s >= self.budget.timeout_s:
            options.append("--timeout S")
        return f"search extend {self.name} {' '.join(options)}" if options else None

    @property
    def next_step(self) -> str:
        """What a person can do to let the search go on, in words; where it goes on by itself, that it does."""
        name = self.name
        if self.driver is not None:
            return "its driver goes on with it"
        if self.carriers:
            return f"BatchJob {self.carriers[0]['id']}, which will drive it, is {self.carriers[0]['state']}"
        if self.end is EndReason.SPACE:
            return f"{EndReason.SPACE.value}: nothing is left to go on with"
        if self.extension is not None:
            return f"deephyper-balsam {self.extension}, then search resume {name} goes on"
        return f"deephyper-balsam search resume {name} goes on"


def make_state(
    name: str,
    planned: Mapping[str, object],
    notes: Iterable[Row],
    counts: Mapping[TrialState, int],
    now: float,
    carriers: Iterable[Row] = (),
) -> SearchState:
    """Return how a search stands.

    Parameters
    ----------
    name
        The search's name.
    planned
        The settings of its record.
    notes
        All notes of the search, the oldest first.
    counts
        How many of its trials are in each state.
    now
        The server's clock.
    carriers
        BatchJobs of `search submit` that are alive.
    """
    notes = list(notes)
    leases = [Lease.read(row) for row in notes if row["tags"]["kind"] == "driver"]
    requests = tuple(DriverRequest.read(row) for row in notes if row["tags"]["kind"] == "request")
    drove = tuple(lease for lease in leases if lease.driving_since is not None)
    return SearchState(
        name=name,
        budget=Budget(*effective_budget(planned, drove, requests)),
        evaluated=counts.get(TrialState.DONE, 0) + counts.get(TrialState.FAILED, 0),
        waiting=counts.get(TrialState.READY, 0),
        running=counts.get(TrialState.RUNNING, 0),
        driven_s=sum(lease.drove_s for lease in drove),
        driver=current_lease(leases, now),
        leases=drove,
        requests=requests,
        carriers=tuple(carriers),
    )


def read_state(gateway: Gateway, record: SearchRecord, counts: Mapping[TrialState, int]) -> SearchState:
    """Return how a search stands; `counts` says how many of its trials are in each state."""
    from deephyper_balsam.store import allocation_chain

    carriers = allocation_chain.find(
        gateway, [site["id"] for site in gateway.sites()], record.name, allocation_chain.ALIVE
    )
    notes = list(read_notes(gateway, record.name))
    return make_state(record.name, record.settings, notes, counts, gateway.now(), carriers)
