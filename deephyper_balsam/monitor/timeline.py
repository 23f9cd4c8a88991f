"""What happened in a search, read from Balsam: its BatchJobs, its jobs, and where runs were cut, its event log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.lease import Lease, current_lease, read_leases
from deephyper_balsam.store.node_time import AllocationSpan, Run, Use, busy, places, span
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.store.search_state import read_state
from deephyper_balsam.store.snapshots import read_rows
from deephyper_balsam.trial import TrialState

if TYPE_CHECKING:
    from deephyper_balsam.monitor.node_hours import Timeline


def read_busy(gateway: Gateway, record: SearchRecord, rows: list[Row]) -> float | None:
    """Return how busy the nodes of a search are, by the rule of `node_time`, without numpy.

    Parameters
    ----------
    gateway
        Balsam's API.
    record
        The record of the search.
    rows
        The jobs of all its trials.
    """
    now = gateway.now()
    allocations, runs = _allocations_and_runs(gateway, record, rows, now)
    return busy(allocations, runs)


def _allocations_and_runs(
    gateway: Gateway, record: SearchRecord, rows: list[Row], now: float
) -> tuple[list[AllocationSpan], list[Run]]:
    events = _events_of_cut_and_open_runs(gateway, record.name, rows)
    allocations = _allocations(gateway, record, rows, now)
    return allocations, [run for row in rows for run in _runs(row, events.get(row["id"], ()), allocations, now)]


def read_timeline(gateway: Gateway, record: SearchRecord) -> Timeline:
    """Return what happened in a search until now.

    The time of a run is that of the run function by the node's clock; that of an allocation is what the site's agent
    said of it. A run that goes on began when Balsam says so, which for some launchers is late.
    """
    import numpy as np

    from deephyper_balsam.monitor.node_hours import Timeline

    now = gateway.now()
    rows = read_rows(gateway, record.name)
    leases = [
        lease for lease in read_leases(gateway, record.name).get(record.name, []) if lease.driving_since is not None
    ]
    allocations, runs = _allocations_and_runs(gateway, record, rows, now)
    spans = {row["id"]: times for row in rows if (times := trial_data.run_span(row)) is not None}
    running = {row["id"] for row in rows if trial_rows.read_state(row) is TrialState.RUNNING}
    submitted = [at for row in rows if (at := trial_data.asked_at(row)) is not None]
    left_queue = [start for start, _ in spans.values()]
    cancelled = [trial_data.cancelled_at(row) for row in rows if row["id"] not in spans]
    left_queue += [at for at in cancelled if at is not None]
    left_queue += [run.start for run in runs if run.end == now and run.outcome == "useful"]
    ended = [end for job_id, (_, end) in spans.items() if job_id not in running]
    collected = [trial_data.gathered_at(row) for row in rows if row["id"] in spans]
    driver = current_lease(leases, now)
    return Timeline(
        allocations=allocations,
        runs=runs,
        submitted=np.asarray(submitted, dtype=float),
        left_queue=np.asarray(left_queue, dtype=float),
        ended=np.asarray(ended, dtype=float),
        gathered=np.asarray([at for at in collected if at is not None], dtype=float),
        driven=[_driven(lease, lease == driver, now) for lease in leases],
        complete=read_state(gateway, record, Counter(map(trial_rows.read_state, rows))).all_submitted,
    )


def _driven(lease: Lease, drives: bool, now: float) -> tuple[float, float]:
    assert lease.driving_since is not None
    return lease.driving_since, now if drives else lease.left_at or lease.at


def _allocations(gateway: Gateway, record: SearchRecord, rows: list[Row], now: float) -> list[AllocationSpan]:
    """Return the BatchJobs that ran this search: those that held a job of it, or are for it alone."""
    uses: dict[int | None, Use] = {}
    for row in rows:
        use = uses.setdefault(row.get("batch_job_id"), Use())
        use.shapes.add((row["num_nodes"], row["node_packing_count"]))
        times = trial_data.run_span(row)
        if trial_rows.read_state(row) is TrialState.RUNNING:
            use.began(trial_rows.updated_at(row))
        elif times is not None:
            use.began(times[0])
    sites = {site["id"]: site["name"] for site in gateway.sites() if site["name"] in record.sites}
    found = []
    for row in gateway.batch_jobs(sites):
        its = uses.get(row["id"])
        when = span(row, trial_rows.trial_tags(record.name), its, now)
        if when is None:
            continue
        found.append(
            AllocationSpan(
                id=row["id"],
                site=sites[row["site_id"]],
                nodes=row["num_nodes"],
                slots=places(row["num_nodes"], its.shapes if its is not None else ()),
                start=when[0],
                end=when[1],
                runs_still=not row["end_time"],
            )
        )
    return found


def _events_of_cut_and_open_runs(gateway: Gateway, name: str, rows: list[Row]) -> dict[int, list[Row]]:
    """Return the events of jobs whose runs were cut, began again, or go on; a search has many jobs and few of these."""
    ids = {
        row["id"] for row in rows if trial_data.earlier_tries(row) or trial_rows.read_state(row) is TrialState.RUNNING
    }
    ids |= {event["job_id"] for event in gateway.events(tags=[f"search:{name}"], to_state="RUN_TIMEOUT")}
    found: dict[int, list[Row]] = {}
    for event in gateway.events(job_ids=sorted(ids & {row["id"] for row in rows})):
        found.setdefault(event["job_id"], []).append(event)
    return found


def _runs(row: Row, events: Iterable[Row], allocations: list[AllocationSpan], now: float) -> list[Run]:
    """Return the runs of a trial: those that ended early, by the event log, and the one whose result counts."""
    found = []
    times = trial_data.run_span(row)
    began: float | None = None
    for event in events:
        at = parse_time(event["timestamp"])
        if event["to_state"] == "RUNNING":
            began = at
        elif began is not None and event["from_state"] == "RUNNING":
            counts = times is not None and began <= times[1] and at >= times[0]
            if not counts:
                found.append(Run(_allocation_at(allocations, began, at), began, at, "repeated"))
            began = None
    if times is not None:
        outcome = "failed" if trial_rows.read_outcome(row).get("objective") is None else "useful"
        found.append(Run(_of(row, allocations, *times), *times, outcome))
    elif began is not None and trial_rows.read_state(row) is TrialState.RUNNING:
        found.append(Run(_of(row, allocations, began, now), began, now, "useful"))
    return found


def _of(row: Row, allocations: list[AllocationSpan], start: float, end: float) -> int:
    """Return the allocation of a job's last run: as Balsam has it, if it was alive then."""
    for one in allocations:
        if one.id == row.get("batch_job_id") and one.start - 5 <= end and start <= one.end + 5:
            return one.id
    return _allocation_at(allocations, start, end)


def _allocation_at(allocations: list[AllocationSpan], start: float, end: float) -> int:
    """Return the allocation that overlaps most with a run."""
    overlaps = {one.id: min(end, one.end) - max(start, one.start) for one in allocations}
    return max(overlaps, key=lambda one: overlaps[one], default=-1)
