"""Allocations: what runs now, what is planned, asking for one, and saying why one died."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.errors import BalsamError, InputError, UnreachableError
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.allocations import Allocations, Work
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.trial import Resources

pytest_plugins = ["balsam_fixtures"]

Make = Callable[..., Allocations]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(gateway: Gateway, site: VirtualSite, clock: Clock) -> Make:
    def allocations(resources: Resources | None = None, **request: Any) -> Allocations:
        return Allocations(
            gateway,
            gateway.site("lab"),
            {"search": "s"},
            (resources or Resources()).slots,
            AllocationRequest(**request) if request else None,
            clock=clock,
        )

    return allocations


def look(allocations: Allocations, clock: Clock) -> None:
    clock.now += 3.0
    allocations.refresh()


# --- what there is ---------------------------------------------------------------------------------------------------


def test_capacity_is_what_running_allocations_run_at_once_and_planned_what_others_will(
    make: Make, site: VirtualSite, clock: Clock
) -> None:
    allocations = make(Resources(evals_per_node=4))
    for nodes, state in ((2, "running"), (1, "running"), (8, "queued"), (1, "pending_submission"), (50, "finished")):
        site.add_allocation(nodes, state)
    for state in ("submit_failed", "pending_deletion"):
        site.add_allocation(50, state)
    look(allocations, clock)
    assert (allocations.capacity, allocations.planned, allocations.notice) == (12, 36, None)


def test_an_evaluation_that_spans_nodes_needs_them_in_one_allocation(
    make: Make, site: VirtualSite, clock: Clock
) -> None:
    allocations = make(Resources(num_nodes=2))
    for _ in range(2):
        site.add_allocation(3)
    look(allocations, clock)
    assert allocations.capacity == 2


def test_allocations_that_cannot_run_this_search_do_not_count(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock
) -> None:
    site.add_allocation(1, filter_tags={"search": "another"})
    site.add_allocation(1, filter_tags={"search": "s", "queue": "mine"})
    VirtualSite(api, "theta").add_allocation(1)
    allocations = make()
    look(allocations, clock)
    assert allocations.capacity == 0
    site.add_allocation(2, filter_tags={"search": "s"})
    site.add_allocation(4)
    look(allocations, clock)
    assert allocations.capacity == 6


def test_without_an_allocation_the_notice_says_what_to_do(make: Make, clock: Clock) -> None:
    allocations = make()
    look(allocations, clock)
    assert allocations.notice is not None
    assert "no allocation is alive at lab" in allocations.notice
    assert "--nodes" in allocations.notice


def test_an_allocation_that_waits_is_named(make: Make, site: VirtualSite, clock: Clock) -> None:
    batch = site.add_allocation(1, "queued")
    allocations = make()
    look(allocations, clock)
    assert allocations.notice == f"waiting for an allocation at lab (BatchJob {batch} is queued)"


def test_balsam_is_asked_again_only_after_a_while(make: Make, api: BalsamApi, clock: Clock) -> None:
    allocations = make()
    look(allocations, clock)
    clock.now += 2.9
    allocations.refresh()
    assert len(api.asked("GET", "batch-jobs/")) == 1
    clock.now += 0.1
    allocations.refresh()
    assert len(api.asked("GET", "batch-jobs/")) == 2


def test_allocations_that_ended_are_read_again_once_a_minute_at_most(
    make: Make, api: BalsamApi, site: VirtualSite, clock: Clock
) -> None:
    ended = [site.add_allocation(1, "finished") for _ in range(40)]
    runs = site.add_allocation(1)
    allocations = make()
    look(allocations, clock)
    for _ in range(9):
        look(allocations, clock)
    assert sum(len(request.rows) for request in api.asked("GET", "batch-jobs/")) == 41 + 9
    site.end_allocation(runs)
    later = site.add_allocation(2)
    look(allocations, clock)
    assert [row["id"] for row in allocations.seen] == [*ended, runs, later]
    assert allocations.seen[-2]["state"] == "finished"
    assert allocations.capacity == 2


def test_the_time_of_an_allocation_is_that_of_the_request_where_it_is_longer(
    make: Make, site: VirtualSite, clock: Clock
) -> None:
    site.add_allocation(1)  # of 60 minutes
    longer, shorter = make(nodes=1, wall_time_min=600), make(nodes=1, wall_time_min=5)
    for allocations in (longer, shorter):
        look(allocations, clock)
    assert (longer.wall_time_s, shorter.wall_time_s) == (36000.0, 3600.0)


# --- asking ----------------------------------------------------------------------------------------------------------


def test_an_allocation_is_asked_for_once_with_the_tags_of_the_search(make: Make, api: BalsamApi, clock: Clock) -> None:
    allocations = make(nodes=3, wall_time_min=30, queue="debug", project="proj", job_mode="serial")
    look(allocations, clock)
    for _ in range(3):
        allocations.ensure()
        look(allocations, clock)
    [batch] = api.batch_jobs.values()
    asked = {key: batch[key] for key in ("num_nodes", "wall_time_min", "queue", "project", "job_mode", "filter_tags")}
    assert asked == {
        "num_nodes": 3,
        "wall_time_min": 30,
        "queue": "debug",
        "project": "proj",
        "job_mode": "serial",
        "filter_tags": {"search": "s"},
    }
    assert allocations.planned == 3


def test_nothing_is_asked_for_while_another_is_alive_or_before_the_first_look_or_without_leave(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock
) -> None:
    make(nodes=1).ensure()
    site.add_allocation(1, "queued")
    for allocations in (make(nodes=1), make()):
        look(allocations, clock)
        allocations.ensure()
    assert len(api.batch_jobs) == 1


def test_a_lost_answer_does_not_ask_twice_and_the_allocation_is_ours(
    make: Make, api: BalsamApi, site: VirtualSite, clock: Clock
) -> None:
    site.add_allocation(1, "finished", filter_tags={"search": "s"})
    allocations = make(nodes=1)
    look(allocations, clock)
    api.lose_next_answer("POST", "batch-jobs/")
    with pytest.raises(UnreachableError):
        allocations.ensure()
    allocations.ensure()  # the driver tries again at once
    allocations.refresh()
    allocations.ensure()
    assert [batch["state"] for batch in api.batch_jobs.values()] == ["finished", "pending_submission"]
    allocations.release()
    assert [batch["state"] for batch in api.batch_jobs.values()] == ["finished", "pending_deletion"]


def test_after_a_refused_connection_it_is_asked_for_once(make: Make, api: BalsamApi, clock: Clock) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)
    api.answer_next(503, method="POST")
    with pytest.raises(UnreachableError):
        allocations.ensure()
    allocations.refresh()
    allocations.ensure()
    assert len(api.batch_jobs) == 1


def test_only_what_was_asked_for_here_is_released(make: Make, site: VirtualSite, api: BalsamApi, clock: Clock) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)
    allocations.ensure()
    others = site.add_allocation(1, filter_tags={"search": "s"})
    site.schedule()
    look(allocations, clock)
    allocations.release()
    allocations.release()
    assert api.batch_jobs[1]["state"] == "pending_deletion"
    assert api.batch_jobs[others]["state"] == "running"
    assert len(api.asked("PATCH", "batch-jobs/")) == 1


# --- keeping as many as are wanted ------------------------------------------------------------------------------------


def run_for(allocations: Allocations, site: VirtualSite, clock: Clock, for_s: float, **work: Any) -> None:
    """Let time pass while the driver looks and asks as it does in its loop, and the scheduler starts at once."""
    until = clock.now + for_s
    while clock.now < until:
        look(allocations, clock)
        allocations.ensure(Work(**work))
        site.schedule()


def alive(api: BalsamApi) -> list[int]:
    return [row["id"] for row in api.batch_jobs.values() if row["state"] in ("pending_submission", "queued", "running")]


def test_as_many_are_kept_as_are_wanted(make: Make, site: VirtualSite, api: BalsamApi, clock: Clock) -> None:
    allocations = make(nodes=1, max_allocations=3)
    run_for(allocations, site, clock, 60)
    assert len(alive(api)) == 3
    site.end_allocation(2)
    run_for(allocations, site, clock, 60)
    assert len(alive(api)) == 3
    assert 2 not in alive(api)


def test_the_next_one_is_asked_for_a_little_before_the_end_and_only_one(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock
) -> None:
    allocations = make(nodes=1, wall_time_min=60)
    run_for(allocations, site, clock, 3500)
    assert len(api.batch_jobs) == 1
    run_for(allocations, site, clock, 110)  # the scheduler's queue took a few seconds the last time
    assert len(api.batch_jobs) == 2


def test_the_longer_the_schedulers_queue_the_earlier_the_next_one_is_asked_for(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock
) -> None:
    allocations = make(nodes=1, wall_time_min=60)
    look(allocations, clock)
    allocations.ensure()
    for _ in range(10):  # it waits for ten minutes
        clock.now += 57
        look(allocations, clock)
        allocations.ensure()
    run_for(allocations, site, clock, 60 * 60 - 15 * 60 - 30)
    assert len(api.batch_jobs) == 1
    for _ in range(40):  # the second waits, however long, and no third is asked for
        look(allocations, clock)
        allocations.ensure()
    assert len(api.batch_jobs) == 2


@pytest.mark.parametrize("work", [{"evaluations": 1}, {"seconds": 5.0}, {"evaluations": 0, "seconds": 900.0}])
def test_none_is_asked_for_ahead_that_the_rest_of_the_work_does_not_need(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock, work: dict[str, Any]
) -> None:
    allocations = make(nodes=1, wall_time_min=60)
    run_for(allocations, site, clock, 3400)
    run_for(allocations, site, clock, 190, **work)
    assert len(api.batch_jobs) == 1


def test_small_work_does_not_ask_for_all_the_allocations_it_might(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock
) -> None:
    allocations = make(nodes=4, max_allocations=3)
    run_for(allocations, site, clock, 60, evaluations=7)
    assert len(api.batch_jobs) == 2


def test_what_is_left_of_one_that_ran_before_we_looked_is_what_the_agent_says(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock
) -> None:
    batch = site.add_allocation(1)
    api.batch_jobs[batch]["scheduler_id"] = 77
    api.sites[site.id]["queued_jobs"] = {"77": {"time_remaining_min": 9}}
    allocations = make()
    look(allocations, clock)
    [row] = allocations._alive
    assert allocations.left_s(row) == 600.0
    clock.now += 100
    assert allocations.left_s(row) == 500.0


def test_slots_that_end_too_soon_for_another_run_are_closing_unless_an_allocation_follows(
    make: Make, site: VirtualSite, clock: Clock
) -> None:
    allocations, asking = make(), make(nodes=1)
    site.add_allocation(2)
    for one in (allocations, asking):
        look(one, clock)
    clock.now += 3300
    assert [allocations.closing(needed_s) for needed_s in (0.0, 200.0, 400.0)] == [0, 0, 2]
    assert asking.closing(400.0) == 0
    site.add_allocation(2, "queued")
    look(allocations, clock)
    assert allocations.closing(400.0) == 0


def test_nodes_to_avoid_are_excluded_where_the_sites_template_can(
    gateway: Gateway, site: VirtualSite, api: BalsamApi, clock: Clock, make: Make
) -> None:
    plain = make(nodes=1)
    plain.avoid = ["nid7"]
    look(plain, clock)
    plain.ensure()
    assert api.batch_jobs[1]["optional_params"] == {}
    site.end_allocation(1)
    api.sites[site.id]["optional_batch_job_params"] = {"exclude": ""}
    able = make(nodes=1, optional_params={"a": "b"})
    able.avoid = ["nid7", "nid9"]
    look(able, clock)
    able.ensure()
    assert api.batch_jobs[2]["optional_params"] == {"a": "b", "exclude": "nid7,nid9"}


def test_that_nothing_is_alive_is_logged_at_once_and_every_few_minutes(
    make: Make, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    allocations = make()
    for _ in range(205):
        look(allocations, clock)
    said = [record for record in caplog.records if "No allocation is alive at lab" in record.getMessage()]
    assert len(said) == 3  # in ten minutes


def test_allocations_that_are_left_go_on(make: Make, site: VirtualSite, api: BalsamApi, clock: Clock) -> None:
    allocations = make(nodes=1)
    run_for(allocations, site, clock, 10)
    allocations.leave()
    allocations.release()
    assert api.batch_jobs[1]["state"] == "running"


# --- launchers that died ---------------------------------------------------------------------------------------------


def job_of(gateway: Gateway, site: VirtualSite) -> int:
    app = gateway.create_app({"site_id": site.id, "name": "a", "serialized_class": "", "source_code": ""})
    gateway.create_jobs([{"app_id": app["id"], "workdir": "w", "tags": {"search": "s", "trial": "0"}}])
    [job_id] = site.acquire(1)
    return job_id


def test_what_a_dead_launcher_held_is_freed_at_the_second_look(
    make: Make, gateway: Gateway, site: VirtualSite, api: BalsamApi, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = job_of(gateway, site)
    batch, other = site.add_allocation(1), site.add_allocation(1)
    api.add_session(batch, [job_id])
    living = api.add_session(other)
    allocations = make()
    look(allocations, clock)
    site.end_allocation(batch)
    look(allocations, clock)
    assert api.jobs[job_id]["state"] == "RUNNING"
    look(allocations, clock)
    assert (api.jobs[job_id]["state"], api.jobs[job_id]["session_id"]) == ("RUN_TIMEOUT", None)
    assert list(api.sessions) == [living]
    assert f"The launcher of BatchJob {batch} died" in caplog.text
    before = len(api.asked("GET", "sessions/"))
    look(allocations, clock)
    assert len(api.asked("GET", "sessions/")) == before


def test_a_launcher_that_still_gives_signs_of_life_keeps_its_session(
    make: Make, gateway: Gateway, site: VirtualSite, api: BalsamApi, clock: Clock
) -> None:
    job_id = job_of(gateway, site)
    batch = site.add_allocation(1, "finished")  # as the site's agent thinks
    session = api.add_session(batch, [job_id])
    allocations = make()
    for _ in range(4):
        look(allocations, clock)
        api.let_pass(1)
        api.sessions[session]["heartbeat"] = api.now()
    assert api.jobs[job_id]["state"] == "RUNNING"
    look(allocations, clock)
    look(allocations, clock)
    assert api.jobs[job_id]["state"] == "RUN_TIMEOUT"


def test_a_session_that_is_gone_already_is_no_error(gateway: Gateway, api: BalsamApi, site: VirtualSite) -> None:
    gateway.end_session(5)


# --- deaths ----------------------------------------------------------------------------------------------------------


def live_and_die(allocations: Allocations, site: VirtualSite, clock: Clock, lived_s: float, **info: str) -> None:
    allocations.ensure()
    look(allocations, clock)
    [batch] = site.schedule()
    look(allocations, clock)
    clock.now += lived_s
    allocations.note_work()
    site.end_allocation(batch, **info)
    look(allocations, clock)


def test_an_allocation_that_ended_is_followed_by_another(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock
) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)
    for _ in range(5):
        live_and_die(allocations, site, clock, lived_s=3600)
    assert len(api.batch_jobs) == 5


def test_three_early_deaths_in_a_row_end_the_search_and_the_last_log_is_quoted(
    make: Make, site: VirtualSite, clock: Clock, tmp_path: Path
) -> None:
    script = tmp_path / "qlaunch 1.sh"
    script.with_suffix(".output").write_text("\n".join(f"line {n}" for n in range(30)) + "\nmpirun: not found\n")
    allocations = make(nodes=1)
    look(allocations, clock)
    for _ in range(2):
        live_and_die(allocations, site, clock, lived_s=5, submit_script=str(script))
    with pytest.raises(BalsamError) as caught:
        live_and_die(allocations, site, clock, lived_s=5, submit_script=str(script))
    said = str(caught.value)
    assert said.startswith("The last 3 allocations ended at once or ran nothing; the last, BatchJob 3: see ")
    assert str(script.with_suffix(".output")) in said
    assert said.endswith("mpirun: not found")
    assert "line 16" in said
    assert "line 15" not in said


def test_deaths_in_between_long_allocations_are_forgiven(make: Make, site: VirtualSite, clock: Clock) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)
    for lived_s in (5, 5, 3600, 5, 5, 3600):
        live_and_die(allocations, site, clock, lived_s)


def test_the_time_in_the_schedulers_queue_does_not_count(make: Make, site: VirtualSite, clock: Clock) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)

    def wait_long_and_die_at_once() -> None:
        allocations.ensure()
        for _ in range(5):
            clock.now += 600
            look(allocations, clock)
        [batch] = site.schedule()
        site.end_allocation(batch)
        look(allocations, clock)

    wait_long_and_die_at_once()
    wait_long_and_die_at_once()
    with pytest.raises(BalsamError, match="The last 3 allocations ended at once"):
        wait_long_and_die_at_once()


def test_a_submission_that_the_scheduler_refuses_ends_the_search_with_its_words(
    make: Make, site: VirtualSite, clock: Clock
) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)
    allocations.ensure()
    site.end_allocation(1, "submit_failed", error="Invalid account: proj")
    with pytest.raises(BalsamError, match="The scheduler refused BatchJob 1: Invalid account: proj"):
        look(allocations, clock)


def test_the_launchers_own_log_is_quoted_too(
    make: Make, site: VirtualSite, api: BalsamApi, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api.sites[site.id]["path"] = str(tmp_path)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "mpi_mode_1.log").write_text("an older one\n")
    (tmp_path / "log" / "mpi_mode_2.log").write_text("KeyError: no such node\n")
    os.utime(tmp_path / "log" / "mpi_mode_1.log", (1e9, 1e9))
    allocations = make(nodes=1)
    look(allocations, clock)
    live_and_die(allocations, site, clock, 5, submit_script=str(tmp_path / "q.sh"), submit_time="2020-01-01 00:00:00")
    assert "mpi_mode_2.log; its last lines:\nKeyError: no such node" in caplog.text
    assert "older" not in caplog.text


def test_a_launcher_that_was_killed_at_once_is_a_death_and_no_refusal(
    make: Make, site: VirtualSite, clock: Clock
) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)
    for _ in range(2):
        allocations.ensure()
        look(allocations, clock)
        [batch] = site.schedule()
        site.end_allocation(batch, "submit_failed", submit_script="/elsewhere/q.sh")
        look(allocations, clock)


def test_allocations_that_live_long_and_run_nothing_end_the_search_too(
    make: Make, site: VirtualSite, clock: Clock
) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)

    def live_for_nothing() -> None:
        allocations.ensure()
        look(allocations, clock)
        [batch] = site.schedule()
        look(allocations, clock)
        clock.now += 3600
        site.end_allocation(batch)
        look(allocations, clock)

    live_for_nothing()
    live_for_nothing()
    with pytest.raises(BalsamError, match="The last 3 allocations ended at once or ran nothing"):
        live_for_nothing()


def test_short_allocations_that_live_their_time_are_no_early_deaths(
    make: Make, site: VirtualSite, clock: Clock
) -> None:
    allocations = make(nodes=1, wall_time_min=1)
    look(allocations, clock)
    for _ in range(5):
        live_and_die(allocations, site, clock, lived_s=50)


@pytest.mark.parametrize(
    ("info", "words"),
    [({}, "nothing is known of it"), ({"submit_script": "/elsewhere/q.sh"}, "its script is /elsewhere/q.sh")],
)
def test_where_no_log_can_be_read_it_says_what_is_known(
    make: Make, site: VirtualSite, clock: Clock, info: dict[str, str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    allocations = make(nodes=1)
    look(allocations, clock)
    live_and_die(allocations, site, clock, 5, **info)
    assert words in caplog.text


def test_the_end_of_others_allocations_is_not_ours_to_judge(make: Make, site: VirtualSite, clock: Clock) -> None:
    allocations = make(nodes=1)
    for _ in range(4):
        site.end_allocation(site.add_allocation(1), "submit_failed", error="no")
        look(allocations, clock)
    assert allocations.notice is not None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"nodes": 0}, r"`nodes >= 1` and `wall_time_min >= 1` must hold, but got \(nodes=0, wall_time_min=60\)"),
        ({"nodes": 1, "wall_time_min": 0}, "wall_time_min=0"),
        ({"nodes": 1, "max_allocations": 0}, "`max_allocations >= 1` must hold, but got 0"),
        ({"nodes": 1, "job_mode": "hybrid"}, "`job_mode` must be 'mpi' or 'serial', but got 'hybrid'"),
    ],
)
def test_an_impossible_request_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AllocationRequest(**request_)
