"""What happened in a search, read from Balsam: its BatchJobs, its jobs, and where runs were cut, its event log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from deephyper_balsam import jobs
from deephyper_balsam.archive import read_rows
from deephyper_balsam.drivers import Life, at_the_wheel, read_lives
from deephyper_balsam.gateway import Gateway, Row, parse_time
from deephyper_balsam.ledger import Allocation, Run, Trace
from deephyper_balsam.orders import effective_budget, read_orders
from deephyper_balsam.record import SearchRecord
from deephyper_balsam.trial import TrialState

_ALIVE = ("running", "pending_deletion")


def read_trace(gateway: Gateway, record: SearchRecord) -> Trace:
    """Return what happened in a search until now.

    The time of a run is that of the run function by the node's clock; that of an allocation is what the site's agent
    said of it. A run that goes on began when Balsam says so, which for some launchers is late.
    """
    now = gateway.now()
    rows = read_rows(gateway, record.name)
    events = _events_of_cut_and_open_runs(gateway, record.name, rows)
    lives = [life for life in read_lives(gateway, record.name).get(record.name, []) if life.driving_since is not None]
    allocations = _allocations(gateway, record, rows, now)
    runs = [run for row in rows for run in _runs(row, events.get(row["id"], ()), allocations, now)]
    begun = [row for row in rows if "start" in row["data"].get("result", {})]
    running = {row["id"] for row in rows if jobs.read_state(row) is TrialState.RUNNING}
    submitted = [row["data"]["asked"]["at"] for row in rows]
    left_queue = [row["data"]["result"]["start"] for row in begun]
    left_queue += [
        row["data"]["cancelled"]
        for row in rows
        if "cancelled" in row["data"] and "start" not in row["data"].get("result", {})
    ]
    left_queue += [run.start for run in runs if run.end == now and run.outcome == "useful"]
    ended = [row["data"]["result"]["end"] for row in begun if row["id"] not in running]
    gathered = [row["data"]["gathered"]["at"] for row in begun if "gathered" in row["data"]]
    driver = at_the_wheel(lives, now)
    return Trace(
        allocations=allocations,
        runs=runs,
        submitted=np.asarray(submitted, dtype=float),
        left_queue=np.asarray(left_queue, dtype=float),
        ended=np.asarray(ended, dtype=float),
        gathered=np.asarray(gathered, dtype=float),
        driven=[_driven(life, life == driver, now) for life in lives],
        complete=_is_complete(gateway, record, lives, rows),
    )


def _driven(life: Life, drives: bool, now: float) -> tuple[float, float]:
    assert life.driving_since is not None
    return life.driving_since, now if drives else life.left_at or life.at


def _is_complete(gateway: Gateway, record: SearchRecord, lives: list[Life], rows: list[Row]) -> bool:
    """Return whether the search has submitted all that its budget allows, or has ended."""
    max_evals, _ = effective_budget(record.settings, lives, read_orders(gateway, record.name))
    submitted = sum(jobs.read_state(row) is not TrialState.CANCELLED for row in rows)
    over = max_evals is not None and submitted >= max_evals
    return over or any((life.why or "").startswith(("complete", "the time is over", "every conf")) for life in lives)


def _allocations(gateway: Gateway, record: SearchRecord, rows: list[Row], now: float) -> list[Allocation]:
    """Return the BatchJobs that ran this search: those that held a job of it, or are for it alone.

    Agents say when one began as it ends; until then it counts from its first run.
    """
    held: dict[int | None, list[Row]] = {}
    for row in rows:
        held.setdefault(row.get("batch_job_id"), []).append(row)
    sites = {site["id"]: site["name"] for site in gateway.sites() if site["name"] in record.sites}
    found = []
    for row in gateway.batch_jobs(sites):
        if row["id"] not in held and row["filter_tags"] != jobs.trial_tags(record.name):
            continue
        its_jobs = held.get(row["id"], [])
        begun = [job["data"]["result"]["start"] for job in its_jobs if "start" in job["data"].get("result", {})]
        if not row["start_time"] and (row["state"] not in _ALIVE or not begun):
            continue
        start = parse_time(row["start_time"]) if row["start_time"] else min(begun)
        end = parse_time(row["end_time"]) if row["end_time"] else now
        shapes = {(job["num_nodes"], job["node_packing_count"]) for job in its_jobs}
        most = [jobs.Resources(num_nodes=n, evals_per_node=k).slots(row["num_nodes"]) for n, k in shapes]
        found.append(
            Allocation(
                id=row["id"],
                site=sites[row["site_id"]],
                nodes=row["num_nodes"],
                slots=max(most, default=row["num_nodes"]) or 1,
                start=start,
                end=max(start, end),
                runs_still=not row["end_time"],
            )
        )
    return found


def _events_of_cut_and_open_runs(gateway: Gateway, name: str, rows: list[Row]) -> dict[int, list[Row]]:
    """Return the events of jobs whose runs were cut, began again, or go on; a search has many jobs and few of these."""
    ids = {row["id"] for row in rows if jobs.earlier_tries(row) or jobs.read_state(row) is TrialState.RUNNING}
    ids |= {event["job_id"] for event in gateway.events(tags=[f"search:{name}"], to_state="RUN_TIMEOUT")}
    found: dict[int, list[Row]] = {}
    for event in gateway.events(job_ids=sorted(ids & {row["id"] for row in rows})):
        found.setdefault(event["job_id"], []).append(event)
    return found


def _runs(row: Row, events: Iterable[Row], allocations: list[Allocation], now: float) -> list[Run]:
    """Return the runs of a trial: those that ended early, by the event log, and the one whose result counts."""
    found = []
    result: Mapping[str, Any] = row["data"].get("result", {})
    began: float | None = None
    for event in events:
        at = parse_time(event["timestamp"])
        if event["to_state"] == "RUNNING":
            began = at
        elif began is not None and event["from_state"] == "RUNNING":
            counts = "start" in result and began <= result["end"] and at >= result["start"]
            if not counts:
                found.append(Run(_allocation_at(allocations, began, at), began, at, "repeated"))
            began = None
    if result.get("start") is not None:
        outcome = "failed" if result.get("objective") is None else "useful"
        found.append(
            Run(_of(row, allocations, result["start"], result["end"]), result["start"], result["end"], outcome)
        )
    elif began is not None and jobs.read_state(row) is TrialState.RUNNING:
        found.append(Run(_of(row, allocations, began, now), began, now, "useful"))
    return found


def _of(row: Row, allocations: list[Allocation], start: float, end: float) -> int:
    """Return the allocation of a job's last run: as Balsam has it, if it was alive then."""
    for one in allocations:
        if one.id == row.get("batch_job_id") and one.start - 5 <= end and start <= one.end + 5:
            return one.id
    return _allocation_at(allocations, start, end)


def _allocation_at(allocations: list[Allocation], start: float, end: float) -> int:
    """Return the allocation that overlaps most with a run."""
    overlaps = {one.id: min(end, one.end) - max(start, one.start) for one in allocations}
    return max(overlaps, key=lambda one: overlaps[one], default=-1)
