"""How a search stands apart from its trials: who drives it and drove it, its budget, and what people asked of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.common.wording import counted

if TYPE_CHECKING:
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.lease import Lease
    from deephyper_balsam.store.record import SearchRecord


def by_state(states: dict[str, int]) -> str:
    """Return counts as a person reads them."""
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))


def standing(gateway: Gateway, record: SearchRecord, states: Mapping[str, int]) -> dict[str, Any]:
    """Return the driver (or None), its leases, what cut runs, the budget, and the requests, as JSON values.

    `allocations` are those of `search submit` that are alive: each carries the driver, or will. `end` says why the
    search has nothing more to do (None: it has), `next` what a person can do to let it go on.

    Parameters
    ----------
    gateway
        Balsam's API.
    record
        Of the search.
    states
        How many trials are in each state.
    """
    from deephyper_balsam.store.search_state import read_state
    from deephyper_balsam.trial import TrialState

    state = read_state(gateway, record, {TrialState(name): count for name, count in states.items()})
    driver = state.driver
    return {
        "allocations": [{"id": row["id"], "state": row["state"]} for row in state.carriers],
        "driver": None
        if driver is None
        else {
            "host": driver.host,
            "pid": driver.pid,
            "since": driver.driving_since,
            "silent_s": round(max(0.0, gateway.now() - driver.seen_at), 1),
        },
        "leases": [_lease(lease, lease == driver) for lease in state.leases],
        "interruptions": _interruptions(gateway, record.name),
        "driven_s": round(state.driven_s, 1),
        "max_evals": state.budget.max_evals,
        "timeout_s": state.budget.timeout_s,
        "end": None if state.end is None else state.end.value,
        "complete": state.is_over,
        "next": state.next_step,
        "requests": [
            {"id": request.id, "what": request.what, "said": str(request), "by": request.by, "at": request.given_at}
            | {"handled": request.handled}
            for request in state.requests
        ],
    }


def _lease(lease: Lease, drives: bool) -> dict[str, Any]:
    ended = None if drives else lease.why or "lost: it gave no sign of life any more"
    times = {"from": lease.driving_since, "to": lease.left_at or lease.at}
    return {"host": lease.host, "pid": lease.pid, **times, "ended": ended, "outages": list(lease.outages)}


def _interruptions(gateway: Gateway, name: str) -> list[dict[str, Any]]:
    """Return the runs that were cut and began again: by the end of an allocation, or the death of its launcher."""
    from deephyper_balsam.store.cuts import read_cuts
    from deephyper_balsam.store.encoding import parse_time
    from deephyper_balsam.store.trial_rows import trial_number, trial_tags

    events = read_cuts(gateway, tags=[f"search:{name}"])
    if not events:
        return []
    ids = sorted({event["job_id"] for event in events})
    numbers = {row["id"]: trial_number(row) for row in gateway.jobs(trial_tags(name), ids=ids)}
    return [
        {
            "trial": numbers[event["job_id"]],
            "at": parse_time(event["timestamp"]),
            "why": event["data"].get("message") or "the end of its allocation",
        }
        for event in events
        if event["job_id"] in numbers
    ]


def echo_standing(found: dict[str, Any], evaluated: int) -> None:
    """Say what `standing` found."""
    from deephyper_balsam.driver.progress import duration

    driver, leases = found["driver"], found["leases"]
    budget = [counted(found["max_evals"], "evaluation")] if found["max_evals"] is not None else []
    budget += [f"{duration(found['timeout_s'])} of driving"] if found["timeout_s"] is not None else []
    used = f"{evaluated} evaluated in {duration(found['driven_s'])}"
    if driver is not None:
        click.echo(
            f"Driver: {driver['host']}, process {driver['pid']}, last sign of life {driver['silent_s']:.0f} s ago"
        )
    elif found["allocations"]:
        waits = found["allocations"][0]
        click.echo(f"Driver: none yet; BatchJob {waits['id']}, which will drive, is {waits['state']}")
    else:
        click.echo(f"Driver: none ({found['next']})")
    click.echo(f"Budget: {' and '.join(budget)}; {used}")
    for lease in leases if len(leases) > 1 or driver is None else ():
        if lease["ended"] is not None:
            click.echo(
                f"  driven {_clock(lease['from'])} to {_clock(lease['to'])} by process {lease['pid']} on "
                f"{lease['host']}: {lease['ended']}"
            )
    for lease in leases:
        for outage in lease["outages"]:
            click.echo(
                f"  Balsam did not answer from {_clock(outage['from'])} for "
                f"{duration(outage['to'] - outage['from'])}: {outage['why']}"
            )
    for why, count in Counter(cut["why"] for cut in found["interruptions"]).most_common(5):
        trials = ", ".join(str(cut["trial"]) for cut in found["interruptions"] if cut["why"] == why)
        which = f"trial{'s' * (count != 1)} {trials[:60]}"
        click.echo(f"  {counted(count, 'run was', 'runs were')} cut and began again ({which}): {why}")
    for request in found["requests"]:
        if request["handled"] is None:
            click.echo(f"  asked by {request['by']} at {_clock(request['at'])}, not done yet: {request['said']}")


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
