"""What `search status` says of second tries, cuts, nodes and runs that are too long: read from Balsam alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.cli.search import _health_said
from deephyper_balsam.cli.standing import _interruptions
from deephyper_balsam.driver.health import Health, read_health
from deephyper_balsam.node import failure_policy
from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.cuts import cut_after_s
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.snapshots import read_rows
from deephyper_balsam.trial import Resources, Trial

pytest_plugins = ["balsam_fixtures"]


@pytest.fixture
def running(gateway: Gateway, site: VirtualSite, api: BalsamApi) -> list[int]:
    """Six trials that run."""
    app = gateway.create_app({"site_id": site.id, "name": "a", "serialized_class": "", "source_code": ""})
    trials = [Trial(n, {"x": n}) for n in range(6)]
    gateway.create_jobs([trial_rows.trial_job(trial, "s", app["id"], Resources(), 1.0, None) for trial in trials])
    return site.acquire(6)


def tried(api: BalsamApi, job_id: int, *hosts: str) -> None:
    data = api.jobs[job_id]["data"]
    tries = [{"failure": "killed by SIGBUS", "host": host, "start": 1.0, "end": 2.0} for host in hosts]
    api.change_job(job_id, data={**data, "tries": tries})


def test_a_healthy_search_has_nothing_to_say(gateway: Gateway, site: VirtualSite, running: list[int]) -> None:
    site.finish(running[0], 1.0)
    health = read_health(gateway, read_rows(gateway, "s"))
    assert health == {"retried": 0, "retried_after": {}, "failing_nodes": {}, "cut": {}, "too_long": {}}
    assert _health_said(health) == []


def test_second_tries_and_nodes_that_fail_all_are_said(
    gateway: Gateway, site: VirtualSite, api: BalsamApi, running: list[int]
) -> None:
    for job_id in running[:3]:
        tried(api, job_id, "nid7")
    site.finish(running[0], 1.0, host="nid8")
    health = read_health(gateway, read_rows(gateway, "s"))
    assert (health["retried"], health["failing_nodes"]) == (3, {"nid7": 3})
    assert _health_said(health) == [
        "  run once more 3x after: killed by SIGBUS",
        "Node nid7 failed all of 3 runs",
    ]


def test_cuts_count_once_each_and_runs_longer_than_the_allocations_are_named(
    gateway: Gateway, site: VirtualSite, api: BalsamApi, running: list[int]
) -> None:
    batch = site.add_allocation(1, "finished")  # of 60 minutes
    long, short = running[4:]
    for _ in range(3):
        for job_id in (long, short):
            api.jobs[job_id]["batch_job_id"] = batch
        api.let_pass(3300)
        site.time_out(long)
        api.change_job(long, state="RUN_TIMEOUT")  # Balsam's launcher says it once more
        api.change_job(long, state="RESTART_READY")
        api.change_job(long, state="RUNNING")
    site.time_out(short)
    health = read_health(gateway, read_rows(gateway, "s"))
    assert health["cut"] == {4: 3, 5: 1}
    assert list(health["too_long"]) == [4]
    said = _health_said(health)
    assert said[0] == "Cut by the end of an allocation, and still to be run: trial 4 (3x), trial 5 (1x)"
    assert "trial 4 (55 min the last time); its runs are longer than the allocations" in said[1]


def test_a_run_that_was_given_back_is_not_cut(
    gateway: Gateway, site: VirtualSite, api: BalsamApi, running: list[int]
) -> None:
    for _ in range(3):
        api.let_pass(3500)
        api.change_job(running[0], state="RUN_TIMEOUT", state_data={"message": failure_policy.GIVEN_BACK})
        api.change_job(running[0], state="RESTART_READY")
        api.change_job(running[0], state="RUNNING")
    site.time_out(running[1])
    assert read_health(gateway, read_rows(gateway, "s"))["cut"] == {1: 1}
    assert cut_after_s(gateway.events(job_id=running[0])) == []
    assert [cut["trial"] for cut in _interruptions(gateway, "s")] == [1]


def test_what_a_search_knows_of_its_nodes_is_judged_once_when_it_is_taken_up(
    gateway: Gateway, site: VirtualSite, api: BalsamApi, running: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for job_id in running:
        site.finish(job_id, 1.0)
        api.change_job(job_id, data={**api.jobs[job_id]["data"], "gathered": {"order": job_id, "at": 1.0}})
    judged: list[int] = []
    monkeypatch.setattr(failure_policy.Nodes, "suspects", lambda nodes: judged.append(1) or {})
    Health(gateway, "s", lambda rows: {}).restore(read_rows(gateway, "s"))
    assert len(judged) == 1
