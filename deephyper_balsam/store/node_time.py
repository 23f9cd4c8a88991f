"""How busy nodes are, by one rule for all that say so: the views of a search, `utilization` and the report.

It is the share of the node-time of a search's allocations, since each began, in which a run was on them: a run that
had a result, one that failed, one that was cut, and one that goes on. An allocation is split into places that each
run one trial at a time. It begins when its site's agent says; agents say so as it ends, and until then it counts from
its first run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Row

_ALIVE = ("running", "pending_deletion")


@dataclass(frozen=True)
class Run:
    """A run on a node: `outcome` is ``"useful"``, ``"failed"`` or ``"repeated"``; times in seconds since the epoch."""

    allocation: int
    start: float
    end: float
    outcome: str


@dataclass(frozen=True)
class AllocationSpan:
    """A BatchJob that ran: its nodes, how many trials they run at once, and from when until when."""

    id: int
    site: str
    nodes: int
    slots: int
    start: float
    end: float
    runs_still: bool = False


@dataclass
class Use:
    """What a search did in one BatchJob.

    Attributes
    ----------
    first
        When its first run began (epoch); None: none has begun.
    run_s
        Seconds of the runs that ended.
    shapes
        Nodes of a trial, and how many trials share a node: of each kind of trial that it ran.
    """

    first: float | None = None
    run_s: float = 0.0
    shapes: set[tuple[int, int]] = field(default_factory=set)

    def began(self, at: float) -> None:
        """Say that a run began."""
        self.first = at if self.first is None else min(self.first, at)


def span(batch_job: Row, tags: Mapping[str, str], use: Use | None, now: float) -> tuple[float, float] | None:
    """Return from when until when a BatchJob was there for a search; None: it was not, or nobody knows since when.

    It was when it ran a trial of the search, or is for it alone.

    Parameters
    ----------
    batch_job
        The BatchJob's row.
    tags
        Those that all trials of the search share.
    use
        What the search did in it; None: nothing is known.
    now
        Seconds since the epoch, by the server's clock.
    """
    if use is None and batch_job["filter_tags"] != tags:
        return None
    first = None if use is None else use.first
    if batch_job["start_time"]:
        start = parse_time(batch_job["start_time"])
    elif batch_job["state"] in _ALIVE and first is not None:
        start = first
    else:
        return None
    return start, max(start, parse_time(batch_job["end_time"]) if batch_job["end_time"] else now)


def left_s(batch_job: Row, site: Row, now: float, began: float | None) -> float | None:
    """Return the seconds of its wall time that a running BatchJob has left; None: nobody has said since when it runs.

    By its start, else by what the agent of its site last said of it, which is in whole minutes.

    Parameters
    ----------
    batch_job
        The BatchJob's row.
    site
        Its site's row.
    now
        By the server's clock (epoch).
    began
        When it was seen to begin, by the same clock; None: it ran before anybody looked.
    """
    wall_s = 60.0 * float(batch_job["wall_time_min"])
    if batch_job["start_time"]:
        began = parse_time(str(batch_job["start_time"]))
    if began is not None:
        return min(wall_s, max(0.0, began + wall_s - now))
    told = (site.get("queued_jobs") or {}).get(str(batch_job["scheduler_id"]), {}).get("time_remaining_min")
    return None if told is None else min(wall_s, 60.0 * (int(told) + 1))


def places(nodes: int, shapes: Collection[tuple[int, int]]) -> int:
    """Return how many trials of these shapes run at once on so many nodes, 1 at least."""
    return max((nodes // each * shared for each, shared in shapes), default=nodes) or 1


def busy_share(used: float, there: float) -> float | None:
    """Return the share of the node-time `there` in which runs were on the nodes; None: no node was there yet."""
    return min(1.0, used / there) if there > 0 else None


def busy(allocations: Iterable[AllocationSpan], runs: Iterable[Run]) -> float | None:
    """Return the share of the node-time of `allocations` in which `runs` were on their nodes."""
    by_id = {one.id: one for one in allocations}
    used = 0.0
    for run in runs:
        one = by_id.get(run.allocation)
        if one is not None:
            used += one.nodes / one.slots * max(0.0, min(run.end, one.end) - max(run.start, one.start))
    return busy_share(used, sum(one.nodes * (one.end - one.start) for one in by_id.values()))
