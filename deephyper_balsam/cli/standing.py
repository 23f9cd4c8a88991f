"""How a search stands apart from its trials: who drives it and drove it, its budget, and what people asked of it."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deephyper_balsam.drivers import Life
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.record import SearchRecord


def by_state(states: dict[str, int]) -> str:
    """Return counts as a person reads them."""
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))


def standing(gateway: Gateway, record: SearchRecord) -> dict[str, Any]:
    """Return the driver (or None), its earlier lives, what cut runs, the budget, and the orders, as JSON values.

    `allocations` are those of `search submit` that are alive: each carries the driver, or will.
    """
    from deephyper_balsam.drivers import at_the_wheel, read_lives
    from deephyper_balsam.orders import effective_budget, read_orders
    from deephyper_balsam.sites import chain

    lives = read_lives(gateway, record.name).get(record.name, [])
    driver = at_the_wheel(lives, gateway.now())
    drove = [life for life in lives if life.driving_since is not None]
    orders = read_orders(gateway, record.name)
    max_evals, timeout_s = effective_budget(record.settings, drove, orders)
    carriers = chain.find(gateway, [site["id"] for site in gateway.sites()], record.name, chain.ALIVE)
    return {
        "allocations": [{"id": row["id"], "state": row["state"]} for row in carriers],
        "driver": None
        if driver is None
        else {
            "host": driver.host,
            "pid": driver.pid,
            "since": driver.driving_since,
            "silent_s": round(max(0.0, gateway.now() - driver.seen_at), 1),
        },
        "lives": [_life(life, life == driver) for life in drove],
        "interruptions": _interruptions(gateway, record.name),
        "driven_s": round(sum(life.drove_s for life in drove), 1),
        "max_evals": max_evals,
        "timeout_s": timeout_s,
        "orders": [
            {"id": order.id, "what": order.what, "said": str(order), "by": order.by, "at": order.given_at}
            | {"handled": order.handled}
            for order in orders
        ],
    }


def _life(life: Life, drives: bool) -> dict[str, Any]:
    ended = None if drives else life.why or "lost: it gave no sign of life any more"
    times = {"from": life.driving_since, "to": life.left_at or life.at}
    return {"host": life.host, "pid": life.pid, **times, "ended": ended, "outages": list(life.outages)}


def _interruptions(gateway: Gateway, name: str) -> list[dict[str, Any]]:
    """Return the runs that were cut and began again: by the end of an allocation, or the death of its launcher."""
    from deephyper_balsam.gateway import parse_time
    from deephyper_balsam.jobs import trial_number, trial_tags

    events = list(gateway.events(tags=[f"search:{name}"], to_state="RUN_TIMEOUT"))
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


def echo_standing(name: str, found: dict[str, Any], evaluated: int) -> None:
    """Say what `standing` found."""
    from deephyper_balsam.cli.screen import duration

    driver, lives = found["driver"], found["lives"]
    budget = [f"{found['max_evals']} evaluations"] if found["max_evals"] is not None else []
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
        complete = found["max_evals"] is not None and evaluated >= found["max_evals"]
        how = f"search extend {name} --max-evals N, then search resume {name}" if complete else f"search resume {name}"
        click.echo(f"Driver: none (deephyper-balsam {how} goes on)")
    click.echo(f"Budget: {' and '.join(budget)}; {used}")
    for life in lives if len(lives) > 1 or driver is None else ():
        if life["ended"] is not None:
            click.echo(
                f"  driven {_clock(life['from'])} to {_clock(life['to'])} by process {life['pid']} on {life['host']}: "
                f"{life['ended']}"
            )
    for life in lives:
        for outage in life["outages"]:
            click.echo(
                f"  Balsam did not answer from {_clock(outage['from'])} for "
                f"{duration(outage['to'] - outage['from'])}: {outage['why']}"
            )
    for why, count in Counter(cut["why"] for cut in found["interruptions"]).most_common(5):
        trials = ", ".join(str(cut["trial"]) for cut in found["interruptions"] if cut["why"] == why)
        click.echo(f"  {count} runs were cut and began again (trials {trials[:60]}): {why}")
    for order in found["orders"]:
        if order["handled"] is None:
            click.echo(f"  asked by {order['by']} at {_clock(order['at'])}, not done yet: {order['said']}")


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
