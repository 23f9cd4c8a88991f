"""The snapshot of a search for those who watch it: told job by job, and read from Balsam by `Follower`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.errors import UnreachableError
from deephyper_balsam.monitor.follower import Follower
from deephyper_balsam.monitor.search_snapshot import Tally
from deephyper_balsam.store.driver_requests import EXTEND, send_request
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import LeaseKeeper
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.trial import TrialState

pytest_plugins = ["balsam_fixtures", "watched_search"]


@pytest.fixture
def follower(gateway: Gateway, record: SearchRecord) -> Follower:
    return Follower(gateway, record)


def test_a_follower_sees_what_runs_ends_fails_and_waits(
    follower: Follower, site: VirtualSite, ids: list[int], api: BalsamApi
) -> None:
    allocation = site.add_allocation(nodes=1)
    site.acquire(3)
    for job_id in ids[:3]:
        api.jobs[job_id]["batch_job_id"] = allocation
    before = follower.look()
    assert [run.number for run in before.running] == [0, 1, 2]
    assert {run.host for run in before.running} == {None}  # no run there has told its node yet
    assert before.best is None
    site.finish(ids[0], 0.5)
    site.finish(ids[1], None, "diverged")
    seen = follower.look()
    states = {state.value: count for state, count in seen.states.items() if count}
    assert states == {"DONE": 1, "FAILED": 1, "RUNNING": 1, "READY": 2}
    assert seen.best is not None
    assert (seen.best.objective, seen.best.number, seen.best.config) == (0.5, 0, {"layers": 1})
    assert seen.failures == [("diverged", 1)]
    assert [(run.number, run.batch_job_id, run.host) for run in seen.running] == [(2, allocation, "node-1")]
    assert {(one.number, one.objective, one.failure) for one in seen.last} == {(0, 0.5, None), (1, None, "diverged")}
    assert [(one.id, one.nodes, one.state) for one in seen.allocations] == [(allocation, 1, "running")]
    assert seen.about == "random on net at lab"
    assert seen.evaluations_per_min > 0


def test_a_follower_writes_nothing_and_asks_again_only_for_what_changed(
    follower: Follower, site: VirtualSite, ids: list[int], api: BalsamApi
) -> None:
    follower.look()
    api.let_pass(60.0)
    site.acquire(1)
    api.requests.clear()
    follower.look()
    api.requests.clear()
    assert follower.look().states[TrialState.RUNNING] == 1
    assert {request.method for request in api.requests} == {"GET"}
    trials = [request for request in api.requests if "search:s" in request.query.get("tags", [])]
    assert [[row["id"] for row in request.rows] for request in trials] == [[ids[0]]]  # the overlap of the looks


def test_a_look_that_failed_loses_nothing(
    follower: Follower, site: VirtualSite, ids: list[int], api: BalsamApi
) -> None:
    follower.look()
    site.acquire(1)
    site.finish(ids[0], 2.0)
    api.answer_next(503, path="batch-jobs/")
    with pytest.raises(UnreachableError):
        follower.look()
    seen = follower.look()
    assert seen.states[TrialState.DONE] == 1
    assert seen.best is not None
    assert seen.best.objective == 2.0


def test_a_search_is_complete_when_its_budget_is_used_and_nobody_drives_it(
    follower: Follower, gateway: Gateway, site: VirtualSite, ids: list[int]
) -> None:
    keeper = LeaseKeeper.claim(gateway, "s", site.id)
    site.acquire(4)
    for job_id in ids[:4]:
        site.finish(job_id, 1.0)
    driven = follower.look()
    assert (driven.complete, driven.evaluated) == (False, 4)
    assert driven.driver is not None
    keeper.leave("complete")
    left = follower.look()
    assert (left.complete, left.driver, left.notice) == (True, None, None)
    send_request(gateway, site.id, "s", EXTEND, gateway.now(), max_evals=10)
    extended = follower.look()
    assert (extended.complete, extended.max_evals) == (False, 10)
    assert extended.notice == ("nobody drives it; the last driver: complete. deephyper-balsam search resume s goes on")


def test_the_time_left_of_an_allocation_is_what_is_known(
    follower: Follower, site: VirtualSite, ids: list[int], api: BalsamApi
) -> None:
    running, waiting = site.add_allocation(2), site.add_allocation(2, state="queued")
    other = site.add_allocation(2, filter_tags={"search": "another"})

    def left() -> dict[int, Any]:
        return {one.id: one.left_s for one in follower.look().allocations}

    assert left() == {running: None, waiting: 3600.0}
    assert other not in left()
    api.batch_jobs[running]["scheduler_id"] = 77
    api.sites[site.id]["queued_jobs"] = {"77": {"time_remaining_min": 21}}
    api.batch_jobs[waiting]["state"] = "running"
    first = left()
    assert first[running] == 22 * 60.0  # of the minute that goes on, the agent says nothing
    assert first[waiting] == 3600.0  # it was seen to begin
    api.let_pass(120.0)
    assert left()[waiting] == pytest.approx(3480.0, abs=5.0)


# --- the tally -------------------------------------------------------------------------------------------------------


def row(number: int, state: str = "RUNNING", job_id: int | None = None, **data: Any) -> dict[str, Any]:
    from deephyper_balsam.store.encoding import pack

    return {
        "id": number if job_id is None else job_id,
        "tags": {"trial": str(number)},
        "state": state,
        "data": data,
        "last_update": "2026-01-01T00:00:00",
        "serialized_parameters": pack({"x": number}),
        "num_nodes": 1,
        "node_packing_count": 1,
        "batch_job_id": 5,
        "workdir": "s/000000",
    }


def done(number: int, at: float, objective: float | None, failure: str | None = None) -> dict[str, Any]:
    result = {"objective": objective, "failure": failure, "start": at - 10, "end": at, "host": "n1"}
    return row(number, "JOB_FINISHED", result=result, gathered={"at": at})


def test_the_best_over_time_is_the_same_in_whatever_order_results_are_told() -> None:
    results = [(10.0, 1.0), (20.0, 0.5), (30.0, 3.0), (40.0, 2.0), (50.0, 3.0), (60.0, 4.0)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]):
        tally = Tally()
        for number in order:
            tally.take(done(number, *results[number]), "lab")
        assert tally.steps == [(10.0, 1.0), (30.0, 3.0), (60.0, 4.0)]
        assert [one.number for one in tally.last] == [5, 4, 3, 2, 1, 0]


def test_what_is_told_twice_or_again_in_other_words_counts_once() -> None:
    tally = Tally()
    for failure in ("Killed", "Killed", "exit status 9"):
        tally.take(done(0, 10.0, None, failure), "lab")
    tally.take(row(1), "lab")
    tally.take(row(1), "lab")
    assert tally.failures == [("exit status 9", 1)]
    assert [one.failure for one in tally.last] == ["exit status 9"]
    assert (tally.states[TrialState.FAILED], tally.states[TrialState.RUNNING]) == (1, 1)


def test_a_trial_that_was_taken_to_another_site_counts_once() -> None:
    tally = Tally()
    tally.take(row(0, "READY", job_id=1), "a")
    tally.take(row(0, "READY", job_id=2), "b")
    tally.take(row(0, "FAILED", job_id=1, moved={"at": 1.0, "from": "a"}), "a")
    tally.take(row(0, "RUNNING", job_id=2), "b")
    assert [run.site for run in tally.running([])] == ["b"]
    assert tally.states[TrialState.READY] == 0


def test_busy_is_the_share_of_the_nodes_time_that_was_in_runs() -> None:
    tally = Tally()
    now = 1000.0
    tally.take(done(0, now - 50, 1.0), "lab")  # 10 s
    tally.take(done(1, now - 20, 1.0), "lab")  # 10 s
    tally.take(done(2, now - 500, 1.0), "lab")
    tags = {"search": "s"}
    batch_job = {"id": 5, "num_nodes": 2, "state": "running", "filter_tags": tags, "end_time": None}
    assert tally.busy(now, [{**batch_job, "start_time": "1970-01-01T00:06:40"}], tags) == pytest.approx(30 / 1200)
    assert tally.busy(now, [{**batch_job, "start_time": None}], tags) == pytest.approx(30 / (2 * 510))  # its first run
    assert tally.busy(now, [], tags) is None
    assert tally.busy(now, [{**batch_job, "id": 6, "start_time": None}], tags) is None


def test_a_tally_of_many_trials_keeps_little_beside_their_states() -> None:
    tally = Tally()
    for number in range(3000):
        tally.take(done(number, 10.0 * number, float(number % 100)), "lab")
    assert len(tally.last) == 100
    assert len(tally._recent) < 100
    assert len(tally.steps) == 100


@pytest.mark.parametrize("seconds", [0.0, 1.0, 5.0])
def test_the_first_results_after_a_resume_make_no_great_rate_and_no_short_time_left(seconds: float) -> None:
    """Once it said "60/min, about 5 s left": one result in the first second, and those of before the pause."""
    from dataclasses import replace

    from test_cli_watch import snapshot

    from deephyper_balsam.cli.screen import left

    tally, resumed = Tally(), 10_000.0
    for number in range(50):  # before a pause of an hour
        tally.take(done(number, resumed - 3600.0 - number, 1.0), "lab")
    now = resumed + seconds
    assert tally.per_min(now, resumed) == 0.0
    begun = replace(snapshot(), max_evals=905, evaluations_per_min=0.0)  # 900 have ended
    assert left(begun) == "5 evaluations"
    tally.take(done(50, now, 1.0), "lab")
    assert tally.per_min(now, resumed) == pytest.approx(2.0)
    assert left(replace(begun, evaluations_per_min=tally.per_min(now, resumed))) == "5 evaluations (about 2m30s)"
    for number in range(51, 60):
        tally.take(done(number, resumed + 30.0 * (number - 49), 1.0), "lab")
    assert tally.per_min(resumed + 300.0, resumed) == pytest.approx(2.0, abs=0.2)
