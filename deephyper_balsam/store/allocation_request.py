"""What a search asks of a site's scheduler: the shape of its allocations, for each of its sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deephyper_balsam.errors import InputError


@dataclass(frozen=True)
class AllocationRequest:
    """The allocations that the driver asks for while there is work.

    Attributes
    ----------
    nodes, wall_time_min, queue, project
        Of each, as the site's scheduler knows them.
    job_mode
        ``"mpi"``: each evaluation starts through the machine's MPI launcher; ``"serial"``: single-node evaluations,
        many of them, started by a worker on each node.
    optional_params
        What the site's job template takes besides.
    max_allocations
        How many are kept at the same time; one more may wait in the scheduler's queue for one that is about to end.
    """

    nodes: int
    wall_time_min: int = 60
    queue: str = "local"
    project: str = "local"
    job_mode: str = "mpi"
    optional_params: dict[str, str] = field(default_factory=dict)
    max_allocations: int = 1

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.wall_time_min < 1:
            raise InputError(
                "`nodes >= 1` and `wall_time_min >= 1` must hold, but got "
                f"(nodes={self.nodes}, wall_time_min={self.wall_time_min})."
            )
        if self.max_allocations < 1:
            raise InputError(f"`max_allocations >= 1` must hold, but got {self.max_allocations}.")
        if self.job_mode not in ("mpi", "serial"):
            raise InputError(f"`job_mode` must be 'mpi' or 'serial', but got {self.job_mode!r}.")

    @property
    def most_nodes(self) -> int:
        """How many nodes one evaluation can get in it."""
        return 1 if self.job_mode == "serial" else self.nodes

    @property
    def most_ranks(self) -> int | None:
        """How many ranks on a node one evaluation can get in it; None: as many as it wants."""
        return 1 if self.job_mode == "serial" else None


Requests = AllocationRequest | Mapping[str, AllocationRequest | None] | None
"""What to ask for: the same at every site, or for each site by its name; None: nothing."""


def by_site(asked: Requests, sites: Sequence[str]) -> dict[str, AllocationRequest | None]:
    """Return what to ask for at each of `sites`; a site that is not named asks for nothing.

    Raises
    ------
    InputError
        A name is no site of the search.
    """
    if not isinstance(asked, Mapping):
        return dict.fromkeys(sites, asked)
    check_sites(asked, sites, "`allocation`")
    return {site: asked.get(site) for site in sites}


def check_sites(named: Iterable[str], sites: Sequence[str], what: str) -> None:
    """Refuse names that are no sites of the search; `what` gave them."""
    unknown = [name for name in named if name not in sites]
    if unknown:
        raise InputError(
            f"{what} names {', '.join(map(repr, unknown))}, which is no site of this search; its sites are "
            f"{', '.join(sites)}."
        )


def to_record(requests: Mapping[str, AllocationRequest | None]) -> dict[str, Any] | None:
    """Return what the record of a search keeps of its requests: one for its only site, else by the site's name."""
    plain = {site: None if one is None else asdict(one) for site, one in requests.items()}
    if len(plain) == 1:
        return next(iter(plain.values()))
    return plain if any(plain.values()) else None


def from_record(recorded: Mapping[str, Any] | None, sites: Sequence[str]) -> dict[str, AllocationRequest | None]:
    """Return the requests of a search from what its record keeps."""
    plain = dict.fromkeys(sites, recorded) if len(sites) == 1 else recorded or {}
    return {site: AllocationRequest(**one) if (one := plain.get(site)) else None for site in sites}
