"""Where the node-hours of a search went: useful, failed, repeated, and idle by cause. From Balsam's tables alone.

An allocation of N nodes for T hours has N x T node-hours, in `slots` places that each run one trial at a time. A place
that runs a trial is busy until the trial ends. One that does not is idle, and at each moment there is one cause for it:

- ``start-up``: no run of the allocation has begun yet;
- ``between runs``: a result was on its way to the driver, or a trial that waits was on its way to the node;
- ``no configuration``: the driver knew that places were free and had submitted nothing (a slow optimizer, a generation
  that waits for its last member);
- ``no driver``: nobody drove the search;
- ``end of allocation``: trials waited, but none was begun any more;
- ``drained``: the search had submitted its last trial, and waited for stragglers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from deephyper_balsam.store.node_time import AllocationSpan as Allocation
from deephyper_balsam.store.node_time import Run, busy_share

Times = npt.NDArray[np.float64]

CAUSES = ("start-up", "between runs", "no configuration", "no driver", "end of allocation", "drained")
RUNS = ("useful", "failed", "repeated")
KINDS = (*RUNS, *CAUSES)


@dataclass(frozen=True)
class Timeline:
    """What happened in a search, in seconds since the epoch.

    Attributes
    ----------
    allocations, runs
        As above; a run that goes on ends now.
    submitted, left_queue
        When trials began to wait, and when they ceased to: as they began to run, or were withdrawn.
    ended, gathered
        When runs ended, and when the driver took their results in.
    driven
        From when until when a driver was at work.
    complete
        Whether the last trial has been submitted: nothing more is to come.
    """

    allocations: Sequence[Allocation]
    runs: Sequence[Run]
    submitted: Times
    left_queue: Times
    ended: Times
    gathered: Times
    driven: Sequence[tuple[float, float]]
    complete: bool


@dataclass
class NodeHours:
    """Node-hours by kind (`KINDS`).

    Attributes
    ----------
    total
        Nodes times hours of all allocations.
    by_kind
        What became of them.
    by_allocation
        The same for each, with its id, site, nodes and hours.
    waited
        Hours in which a driver was at work and no allocation ran: they cost no node-hours, but time.
    edges, over_time
        The same over time: `over_time[kind]` has node-hours between neighbouring `edges`.
    """

    total: float
    by_kind: dict[str, float]
    by_allocation: list[dict[str, Any]] = field(default_factory=list)
    waited: float = 0.0
    edges: list[float] = field(default_factory=list)
    over_time: dict[str, list[float]] = field(default_factory=dict)

    @property
    def busy(self) -> float | None:
        """The share of node-hours in which a run was on the nodes, whatever became of it (`node_time`)."""
        return busy_share(sum(self.by_kind[kind] for kind in RUNS), self.total)

    @property
    def utilization(self) -> float | None:
        """The share of node-hours in which trials ran that had a result; None without node-hours."""
        return self.by_kind["useful"] / self.total if self.total else None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "total_node_hours": self.total,
            "busy": self.busy,
            "utilization": self.utilization,
            "node_hours": self.by_kind,
            "hours_without_allocation": self.waited,
            "allocations": self.by_allocation,
            "over_time": {"edges": self.edges, "node_hours": self.over_time},
        }


def count_node_hours(timeline: Timeline, bins: int = 60) -> NodeHours:
    """Return where the node-hours of `timeline` went; the parts add up to the whole.

    Parameters
    ----------
    timeline
        What happened in the search.
    bins
        How many pieces the time is cut into for `NodeHours.over_time`.
    """
    if not timeline.allocations:
        return NodeHours(0.0, dict.fromkeys(KINDS, 0.0), waited=_without(timeline.driven, []) / 3600)
    first = min(one.start for one in timeline.allocations)
    last = max(one.end for one in timeline.allocations)
    edges = np.linspace(first, max(last, first + 1e-9), bins + 1)
    over_time = {kind: np.zeros(bins) for kind in KINDS}
    by_allocation: list[dict[str, Any]] = []
    for one in timeline.allocations:
        marks, places = _places(one, timeline, edges)
        hours = np.diff(marks) * one.nodes / one.slots / 3600
        which = np.clip(np.searchsorted(edges, marks[:-1], "right") - 1, 0, bins - 1)
        for kind in KINDS:
            np.add.at(over_time[kind], which, places[kind] * hours)
        by_allocation.append(
            {
                "batch_job": one.id,
                "site": one.site,
                "nodes": one.nodes,
                "start": one.start,
                "hours": (one.end - one.start) / 3600,
                "node_hours": one.nodes * (one.end - one.start) / 3600,
                **{kind: float((places[kind] * hours).sum()) for kind in KINDS},
            }
        )
    return NodeHours(
        sum(one["node_hours"] for one in by_allocation),
        {kind: float(values.sum()) for kind, values in over_time.items()},
        by_allocation,
        _without(timeline.driven, [(one.start, one.end) for one in timeline.allocations]) / 3600,
        edges.tolist(),
        {kind: values.tolist() for kind, values in over_time.items()},
    )


def _without(spans: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """Return the seconds within any of `spans` that lie in none of `others`."""
    marks = np.unique([moment for span in (*spans, *others) for moment in span])
    middles = (marks[:-1] + marks[1:]) / 2
    inside, covered = (
        np.asarray([any(begin <= at < end for begin, end in some) for at in middles], dtype=bool)
        for some in (spans, others)
    )
    return float((np.diff(marks) * (inside & ~covered)).sum()) if len(marks) else 0.0


def _places(one: Allocation, timeline: Timeline, edges: Times) -> tuple[Times, dict[str, Times]]:
    """Return the moments at which anything changes in an allocation, and its places of each kind between them."""
    runs = [run for run in timeline.runs if run.allocation == one.id]
    starts = np.sort([run.start for run in runs])
    moments = [edges, timeline.submitted, timeline.left_queue, timeline.ended, timeline.gathered, starts]
    moments += [np.asarray([run.end for run in runs]), np.asarray(timeline.driven, dtype=float).ravel()]
    marks = np.unique(np.clip(np.concatenate([np.asarray(some, dtype=float) for some in moments]), one.start, one.end))
    marks = np.unique(np.concatenate([[one.start], marks, [one.end]]))
    at = marks[:-1]
    busy = {
        kind: _count(at, [run.start for run in runs if run.outcome == kind])
        - _count(at, [run.end for run in runs if run.outcome == kind])
        for kind in RUNS
    }
    idle = np.maximum(0.0, one.slots - sum(busy.values()))
    waiting = np.maximum(0.0, _count(at, timeline.submitted) - _count(at, timeline.left_queue))
    on_their_way = np.maximum(0.0, _count(at, timeline.ended) - _count(at, timeline.gathered))
    driven = np.zeros(len(at), dtype=bool)
    for begin, end in timeline.driven:
        driven |= (at >= begin) & (at < end)
    before_first = at < (starts[0] if len(starts) else np.inf)
    ended_early = at >= starts[-1] if len(starts) and not one.runs_still else np.zeros(len(at), dtype=bool)
    last_submitted = timeline.submitted.max(initial=-np.inf)
    over = (at >= last_submitted) & (waiting == 0) & timeline.complete

    left = np.where(before_first, 0.0, idle)
    places = {**busy, **{cause: np.zeros(len(at)) for cause in CAUSES}, "start-up": np.where(before_first, idle, 0.0)}
    places["drained"] = np.where(over, left, 0.0)
    left = left - places["drained"]
    places["end of allocation"] = np.where(ended_early & (waiting > 0), left, 0.0)
    left = left - places["end of allocation"]
    places["between runs"] = np.minimum(left, waiting + on_their_way)
    left = left - places["between runs"]
    places["no configuration"] = np.where(driven, left, 0.0)
    places["no driver"] = np.where(driven, 0.0, left)
    return marks, places


def _count(at: Times, events: Iterable[float] | Times) -> Times:
    """Return how many of `events` have happened at each of the moments `at`."""
    return np.searchsorted(np.sort(np.asarray(list(events), dtype=float)), at, "right").astype(float)
