"""Allocations that carry their search's driver: each asks for the next one in time, and for none that is of no use."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.errors import UnreachableError
from deephyper_balsam.store import allocation_chain
from deephyper_balsam.store.driver_requests import STOP, send_request
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.trial_rows import trial_job
from deephyper_balsam.trial import Resources, Trial

pytest_plugins = ["balsam_fixtures"]

NAME = "digits-1"
DRAIN_S = 150.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def utc(seconds: float) -> str:
    """A time as the site's agent writes it."""
    return str(datetime.fromtimestamp(seconds, timezone.utc).replace(tzinfo=None))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def add_allocation(site: VirtualSite, gateway: Gateway, began_at: float, waited_s: float = 0.0, follow: int = 3) -> int:
    """Add a running BatchJob with the driver; its scheduler's id is its own plus 1000."""
    shape: dict[str, Any] = {"nodes": 8, "wall_time_min": 60, "queue": "prod", "project": "P", "job_mode": "serial"}
    row = gateway.create_batch_job(allocation_chain.batch_job(site.id, NAME, **shape, chain=follow))
    told = {"submit_time": utc(began_at - waited_s), "submit_script": "x"}
    gateway.adopt_batch_job(row["id"], row["id"] + 1000, utc(began_at))
    site.api.batch_jobs[row["id"]]["status_info"] = told
    return int(row["id"])


def link(
    gateway: Gateway, site: VirtualSite, batch_job_id: int, clock: Clock, follow: int = 3
) -> allocation_chain.Link:
    return allocation_chain.Link(gateway, site.id, NAME, batch_job_id + 1000, follow, DRAIN_S, clock, now=clock)


def alive(gateway: Gateway, site: VirtualSite) -> list[dict[str, Any]]:
    return allocation_chain.find(gateway, [site.id], NAME, allocation_chain.ALIVE)


def test_the_next_one_is_asked_for_as_long_before_the_driver_leaves_as_this_one_waited(
    gateway: Gateway, site: VirtualSite, clock: Clock
) -> None:
    first = add_allocation(site, gateway, clock.now, waited_s=600)
    one = link(gateway, site, first, clock)
    one.look(DRAIN_S + 601)
    assert one.next_id is None
    clock.now += 10
    one.look(DRAIN_S + 599)
    assert one.next_id == first + 1
    follower = alive(gateway, site)[-1]
    assert follower["optional_params"] == {"search": NAME, "chain": "2"}
    assert (follower["num_nodes"], follower["wall_time_min"], follower["job_mode"]) == (8, 60, "serial")
    assert (follower["queue"], follower["project"], follower["filter_tags"]) == ("prod", "P", {"search": NAME})
    clock.now += 10
    one.look(1)
    one.ask()
    assert len(alive(gateway, site)) == 2


def test_what_a_person_gave_the_first_one_besides_goes_on_with_the_next(
    api: BalsamApi, gateway: Gateway, site: VirtualSite, clock: Clock
) -> None:
    first = add_allocation(site, gateway, clock.now)
    api.batch_jobs[first]["optional_params"]["reservation"] = "maintenance-free"
    link(gateway, site, first, clock).ask()
    assert alive(gateway, site)[-1]["optional_params"]["reservation"] == "maintenance-free"


def test_the_last_of_a_chain_asks_for_none(gateway: Gateway, site: VirtualSite, clock: Clock) -> None:
    first = add_allocation(site, gateway, clock.now, follow=0)
    one = link(gateway, site, first, clock, follow=0)
    one.look(0)
    one.ask()
    assert [row["id"] for row in alive(gateway, site)] == [first]


def test_a_lost_answer_makes_no_second_one(
    api: BalsamApi, gateway: Gateway, site: VirtualSite, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    first = add_allocation(site, gateway, clock.now)
    one = link(gateway, site, first, clock)
    api.lose_next_answer("POST", "batch-jobs/")
    one.look(1)
    assert "could not be asked for yet" in caplog.text
    clock.now += 10
    one.look(1)
    assert [row["id"] for row in alive(gateway, site)] == [first, first + 1]
    assert one.next_id == first + 1
    api.lose_next_answer("GET", "batch-jobs/")
    with pytest.raises(UnreachableError):
        link(gateway, site, first, clock).ask()


def test_one_that_the_scheduler_refuses_is_asked_for_again(
    api: BalsamApi, gateway: Gateway, site: VirtualSite, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    first = add_allocation(site, gateway, clock.now)
    one = link(gateway, site, first, clock)
    one.look(1)
    site.end_allocation(first + 1, "submit_failed", error="the queue is full")
    clock.now += 10
    one.look(1)
    assert len(allocation_chain.find(gateway, [site.id], NAME)) == 2  # not at once
    clock.now += 60
    one.look(1)
    assert one.next_id == first + 2
    assert "was refused: the queue is full" in caplog.text


def test_one_whose_script_failed_at_once_is_not_asked_for_again(
    gateway: Gateway, site: VirtualSite, clock: Clock
) -> None:
    first = add_allocation(site, gateway, clock.now)
    one = link(gateway, site, first, clock)
    one.look(1)
    site.end_allocation(first + 1, "submit_failed", submit_script="x")
    for _ in range(5):
        clock.now += 100
        one.look(1)
        one.ask()
    assert len(allocation_chain.find(gateway, [site.id], NAME)) == 2


def test_before_the_agent_has_told_which_batchjob_this_is_nothing_is_asked_for(
    gateway: Gateway, site: VirtualSite, clock: Clock
) -> None:
    one = allocation_chain.Link(gateway, site.id, NAME, 4711, 3, DRAIN_S, clock, now=clock)
    one.look(1)
    assert one.next_id is None
    assert alive(gateway, site) == []


def add_result(gateway: Gateway, site: VirtualSite, number: int, at: float) -> None:
    trial = Trial(number, {"x": 0.5})
    app_id = gateway.create_app(
        {"site_id": site.id, "name": f"run{number}", "serialized_class": "", "source_code": "", "description": "",
         "parameters": {}, "transfers": {}}
    )["id"]  # fmt: skip
    [job_id] = gateway.create_jobs([trial_job(trial, NAME, app_id, Resources(), at, None)])
    row = next(iter(gateway.jobs({"search": NAME}, ids=[job_id])))
    gateway.write_data({job_id: {**row["data"], "gathered": {"order": number, "at": at}}})


def test_after_two_allocations_without_a_result_none_follows(
    gateway: Gateway, site: VirtualSite, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.now = time.time()
    add_result(gateway, site, 0, clock.now - 100)
    first = add_allocation(site, gateway, clock.now)
    one = link(gateway, site, first, clock)
    one.ask()  # one without a result may happen
    assert one.next_id == first + 1
    site.end_allocation(first, submit_time=utc(clock.now))
    gateway.end_batch_job(first + 1)
    clock.now += 60
    second = add_allocation(site, gateway, clock.now)
    other = link(gateway, site, second, clock)
    other.ask()
    assert other.next_id is None
    assert "brought no result" in caplog.text
    add_result(gateway, site, 1, clock.now + 30)
    other.ask()
    assert other.next_id is not None


def test_a_search_that_was_stopped_is_not_driven_on(gateway: Gateway, site: VirtualSite, clock: Clock) -> None:
    first = add_allocation(site, gateway, clock.now, waited_s=60)
    one = link(gateway, site, first, clock)
    send_request(gateway, site.id, NAME, STOP, clock.now - 100)  # before it was submitted: submitting it went on
    assert not one.stopped()
    send_request(gateway, site.id, NAME, STOP, clock.now - 10)
    assert one.stopped()
    one.ask()
    assert one.next_id is None


def test_what_is_not_needed_any_more_is_given_back(gateway: Gateway, site: VirtualSite, clock: Clock) -> None:
    first = add_allocation(site, gateway, clock.now)
    one = link(gateway, site, first, clock)
    one.end()
    one.ask()
    one.end()
    states = {row["id"]: row["state"] for row in allocation_chain.find(gateway, [site.id], NAME)}
    assert states == {first: "running", first + 1: "pending_deletion"}


def test_only_waiting_allocations_of_the_search_itself_are_withdrawn(
    gateway: Gateway, site: VirtualSite, clock: Clock
) -> None:
    running = add_allocation(site, gateway, clock.now)
    site.add_allocation(state="queued", filter_tags={"search": NAME})
    link(gateway, site, running, clock).ask()
    assert allocation_chain.withdraw(gateway, [site.id], NAME) == [running + 2]
