"""The allocations (Balsam's BatchJobs) that run a search: how many trials they run at once, and asking for more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deephyper_balsam.errors import BalsamError, InputError, UnreachableError
from deephyper_balsam.gateway import Gateway, Row
from deephyper_balsam.jobs import Resources

logger = logging.getLogger(__name__)

_ALIVE = ("pending_submission", "queued", "running")
_MAX_EARLY_DEATHS = 3
_EARLY_S = 60.0


@dataclass(frozen=True)
class AllocationRequest:
    """The allocation that the driver asks for when none is alive.

    Attributes
    ----------
    nodes, wall_time_min, queue, project
        As the site's scheduler knows them.
    job_mode
        ``"mpi"``: each evaluation starts through the machine's MPI launcher; ``"serial"``: single-node evaluations,
        many of them, started by a worker on each node.
    """

    nodes: int
    wall_time_min: int = 60
    queue: str = "local"
    project: str = "local"
    job_mode: str = "mpi"
    optional_params: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.wall_time_min < 1:
            raise InputError(
                "`nodes >= 1` and `wall_time_min >= 1` must hold, but got "
                f"(nodes={self.nodes}, wall_time_min={self.wall_time_min})."
            )
        if self.job_mode not in ("mpi", "serial"):
            raise InputError(f"`job_mode` must be 'mpi' or 'serial', but got {self.job_mode!r}.")


class Allocations:
    """Watches the BatchJobs at the sites of one search, and asks for one when there is work and none is alive."""

    def __init__(
        self,
        gateway: Gateway,
        sites: Mapping[int, Row],
        tags: Mapping[str, str],
        resources: Resources,
        request: AllocationRequest | None,
        *,
        refresh_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway = gateway
        self._sites = dict(sites)
        self._tags = dict(tags)
        self._resources = resources
        self._request = request
        self._refresh_s = refresh_s
        self._clock = clock
        self._refreshed_at = -1e9
        self._alive: list[Row] = []
        self._ours: dict[int, float] = {}  # BatchJob id -> when it was last seen not to run yet
        self._known: set[int] = set()
        # Whether one may have been made for us that we know nothing of: the answer was lost, or a driver was killed
        self._doubtful = request is not None
        self._deaths = 0

    def refresh(self) -> None:
        """Look at the BatchJobs again, if the last look is old enough."""
        if self._clock() - self._refreshed_at < self._refresh_s:
            return
        rows = [row for row in self._gateway.batch_jobs(self._sites) if self._may_run_ours(row)]
        self._alive = [row for row in rows if row["state"] in _ALIVE]
        now = self._refreshed_at = self._clock()
        for row in self._alive:
            made_unanswered = self._doubtful and row["id"] not in self._known and row["filter_tags"] == self._tags
            if made_unanswered or (row["id"] in self._ours and row["state"] != "running"):
                self._ours[row["id"]] = now
        self._known, self._doubtful = {row["id"] for row in rows}, False
        self._notice_deaths({row["id"]: row for row in rows if row["state"] in ("finished", "submit_failed")})

    def _may_run_ours(self, row: Row) -> bool:
        return all(self._tags.get(key) == value for key, value in row["filter_tags"].items())

    @property
    def capacity(self) -> int:
        """How many trials the running allocations can run at once."""
        return sum(self._resources.slots(row["num_nodes"]) for row in self._alive if row["state"] == "running")

    @property
    def planned(self) -> int:
        """How many trials the allocations that wait in the scheduler's queue will run at once."""
        return sum(self._resources.slots(row["num_nodes"]) for row in self._alive if row["state"] != "running")

    @property
    def notice(self) -> str | None:
        """What a person should know, if there is something: no allocation, or one that still waits."""
        names = ", ".join(site["name"] for site in self._sites.values())
        if not self._alive:
            return (
                f"no allocation is alive at {names}: nothing starts until there is one "
                "(give --nodes, or `balsam queue submit`)"
            )
        if not self.capacity:
            return (
                f"waiting for an allocation at {names} (BatchJob {self._alive[0]['id']} is {self._alive[0]['state']})"
            )
        return None

    def ensure(self) -> None:
        """Ask for an allocation if one may be asked for and none is alive.

        Raises
        ------
        BalsamError
            After several allocations in a row that ended within a minute.
        """
        if self._request is None or self._alive or self._refreshed_at < 0:
            return
        site = next(iter(self._sites.values()))
        request = self._request
        try:
            row = self._gateway.create_batch_job(
                {
                    "site_id": site["id"],
                    "num_nodes": request.nodes,
                    "wall_time_min": request.wall_time_min,
                    "queue": request.queue,
                    "project": request.project,
                    "job_mode": request.job_mode,
                    "optional_params": request.optional_params,
                    "filter_tags": self._tags,
                }
            )
        except UnreachableError:
            self._doubtful, self._refreshed_at = True, -1e9  # look again before asking again
            raise
        self._ours[row["id"]] = self._clock()
        self._alive = [row]
        logger.info(
            "Asked %s for %d nodes, %d min (BatchJob %d)", site["name"], request.nodes, request.wall_time_min, row["id"]
        )

    def _notice_deaths(self, ended: Mapping[int, Row]) -> None:
        for job_id in [job_id for job_id in self._ours if job_id in ended]:
            lived_s = self._clock() - self._ours.pop(job_id)
            failed = ended[job_id]["state"] == "submit_failed"
            self._deaths = self._deaths + 1 if failed or lived_s < _EARLY_S else 0
            logger.warning("BatchJob %d ended after %.0f s: %s", job_id, lived_s, _last_words(ended[job_id]))
            if failed or self._deaths >= _MAX_EARLY_DEATHS:
                what = (
                    "The scheduler refused"
                    if failed
                    else f"The last {self._deaths} allocations ended at once; the last,"
                )
                raise BalsamError(f"{what} BatchJob {job_id}: {_last_words(ended[job_id])}")

    @property
    def owned(self) -> bool:
        """Whether one that we asked for is alive."""
        return bool(self._ours)

    def release(self) -> None:
        """End the allocations that we asked for; others' go on."""
        for job_id in list(self._ours):
            self._gateway.end_batch_job(job_id)
            del self._ours[job_id]


def _last_words(row: Mapping[str, Any]) -> str:
    """Return what is known of a BatchJob's end: the scheduler's error, or the tail of its output if it is here."""
    info = row.get("status_info") or {}
    if info.get("error"):
        return str(info["error"])
    script = info.get("submit_script")
    if not script:
        return "nothing is known of it"
    output = Path(script).with_suffix(".output")
    if not output.is_file():
        return f"its script is {script}"
    tail = output.read_text(errors="replace").strip().splitlines()[-15:]
    return f"see {output}; its last lines:\n" + "\n".join(tail)
