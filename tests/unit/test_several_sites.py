"""One search at several sites: where trials go, and what becomes of them when a site goes away."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.placement import SearchSite
from deephyper_balsam.errors import BalsamError, InputError, UnreachableError
from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.trial import Resources, Trial, TrialState

pytest_plugins = ["balsam_fixtures"]

SETTINGS: dict[str, Any] = {"problem": {"name": "p"}, "method": "random", "options": {}, "seed": 1}


def run(job: Any) -> float:
    """Stand in for the user's function."""
    return float(job["x"])


class TwoSites:
    """A search at "lab" and "theta" on the fake API; allocations and runs are moved by hand."""

    def __init__(self, folder: Path) -> None:
        self.api = BalsamApi()
        self.lab, self.theta = VirtualSite(self.api, "lab"), VirtualSite(self.api, "theta")
        self.client_yml = self.api.write_client_yml(folder / "client.yml")
        self.evaluator = self.another()

    def another(self, **options: Any) -> BalsamEvaluator:
        """Return the search's evaluator as the next driver makes it."""
        made = BalsamEvaluator(run, options.pop("site", "lab,theta"), client_path=self.client_yml, **options)
        made.open("s", dict(SETTINGS), max_evals=100)
        self.evaluator = made
        assert made.sites is not None
        for site in made.sites:
            site.allocations._look_s = 0
        return made

    def site(self, name: str) -> SearchSite:
        assert self.evaluator.sites is not None
        return self.evaluator.sites.named(name)

    def submit(self, *numbers: int) -> None:
        self.evaluator.submit([Trial(n, {"x": float(n)}) for n in numbers])

    def fill(self) -> int:
        """Submit as many as there is room for, as the driver does; how many."""
        first, room = len(self.evaluator.lines), self.evaluator.room
        self.submit(*range(first, first + room))
        return room

    def look(self, times: int = 1) -> list[int]:
        found: list[int] = []
        for _ in range(times):
            found += [result.number or 0 for result in self.evaluator.collect()]
        return found

    def where(self) -> Counter[str]:
        """Count the trials that have not ended, by the site of their job in Balsam."""
        open_rows = [row for row in self.api.trials("s").values() if not trial_rows.read_state(row).is_final]
        names = {app_id: self.api.sites[app["site_id"]]["name"] for app_id, app in self.api.apps.items()}
        return Counter(names[row["app_id"]] for row in open_rows)

    def silence(self, site: VirtualSite) -> None:
        """Let a site's agent die, and so much time pass that its silence is sure."""
        for _ in range(3):
            self.api.let_pass(6)
            self.look()
        self.api.silent_sites.add(site.id)
        for _ in range(7):
            self.api.let_pass(6)
            self.look()

    def close(self) -> None:
        self.evaluator.gateway._client.session.close()
        self.api.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[TwoSites]:
    made = TwoSites(tmp_path)
    yield made
    made.close()


# --- where trials go -------------------------------------------------------------------------------------------------


def test_the_application_is_registered_at_each_site(two: TwoSites) -> None:
    trial_apps = [app for app in two.api.apps.values() if app["name"] != "deephyper_search"]
    assert sorted(app["site_id"] for app in trial_apps) == [two.lab.id, two.theta.id]


def test_trials_go_where_allocations_run_and_fill_free_places_first(two: TwoSites) -> None:
    two.lab.add_allocation(2)
    two.theta.add_allocation(6)
    two.look()
    assert two.evaluator.capacity == 8
    two.submit(*range(8))
    assert two.where() == {"lab": 2, "theta": 6}
    assert two.fill() == 8  # before anything has ended, one wave waits
    assert two.where() == {"lab": 4, "theta": 12}
    assert two.fill() == 0


def test_what_waits_follows_the_pace_of_each_site(two: TwoSites) -> None:
    two.lab.add_allocation(4)
    two.theta.add_allocation(4)
    two.look()
    two.site("lab").durations_s.append(6000.0)
    two.site("theta").durations_s.append(1.0)
    two.fill()
    assert two.where() == {"lab": 5, "theta": 8}


def test_while_nothing_runs_trials_wait_for_the_queues(two: TwoSites) -> None:
    two.theta.add_allocation(5, "queued")
    two.look()
    two.fill()
    assert two.where() == {"lab": 1, "theta": 5}
    two.lab.add_allocation(1)
    two.look()
    assert two.where()["lab"] == 1


def test_the_table_says_where_a_trial_runs(two: TwoSites) -> None:
    two.lab.add_allocation(1)
    two.theta.add_allocation(1)
    two.look()
    two.submit(0, 1)
    assert {line["m:site"] for line in two.evaluator.lines} == {"lab", "theta"}
    for site in (two.lab, two.theta):
        [job_id] = site.acquire(5)
        site.finish(job_id, 1.0)
    assert sorted(two.look()) == [0, 1]
    names = {line["job_id"]: line["m:site"] for line in two.evaluator.lines}
    assert sorted(names.values()) == ["lab", "theta"]
    assert {line["job_id"]: line["m:site"] for line in two.another().lines} == names


# --- a site at which nothing runs ------------------------------------------------------------------------------------


def moved(two: TwoSites) -> int:
    """Let four trials wait at the lab, and its allocation end; theta has room for two. The lab's allocation's id."""
    batch = two.lab.add_allocation(4)
    two.look()
    two.submit(0, 1, 2, 3)
    two.theta.add_allocation(1)
    two.lab.end_allocation(batch)
    return batch


def test_trials_that_wait_where_nothing_runs_go_where_there_is_room(two: TwoSites) -> None:
    moved(two)
    two.look(4)
    assert two.where() == {"lab": 2, "theta": 2}  # a place, and one that waits
    assert sorted(two.api.trials("s")) == [0, 1, 2, 3]
    assert two.evaluator.counts[TrialState.READY] == 4
    assert two.evaluator.line(0)["m:moved_from"] == "lab"
    assert two.evaluator.room == 0
    for _ in range(4):
        for job_id in two.theta.acquire(1):
            two.theta.finish(job_id, 1.0)
        two.look(4)
    assert two.evaluator.counts[TrialState.DONE] == 4
    assert two.lab.acquire(10) == []


def test_a_trial_that_moved_keeps_what_it_was(two: TwoSites) -> None:
    moved(two)
    before = dict(two.api.trials("s")[0])
    two.look(4)
    after = two.api.trials("s")[0]
    assert after["id"] != before["id"]
    assert after["data"] == {**before["data"], "moved_from": ["lab"]}
    same = ("serialized_parameters", "tags", "workdir", "num_nodes", "node_packing_count")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    aside = two.api.jobs[before["id"]]
    assert (aside["state"], aside["tags"]) == ("FAILED", {"set_aside": "s", "trial": "0"})


def test_what_began_meanwhile_or_is_held_stays(two: TwoSites) -> None:
    moved(two)
    running, held = two.lab.acquire(2)
    two.api.jobs[held]["state"] = "PREPROCESSED"  # a launcher has it, and is about to start it
    two.look(4)
    assert two.where() == {"lab": 2, "theta": 2}
    two.lab.finish(running, 1.0)
    assert two.look() == [0]


def test_nothing_moves_where_allocations_run_or_nobody_has_room(two: TwoSites) -> None:
    two.lab.add_allocation(1)
    two.look()
    two.submit(*range(10))
    two.look(4)
    assert two.where() == {"lab": 10}
    two.theta.add_allocation(1, "queued")
    two.look(4)
    assert two.where() == {"lab": 10}


@pytest.mark.parametrize("request_number", range(7))
def test_a_driver_that_dies_in_the_middle_of_a_move_loses_and_repeats_nothing(
    two: TwoSites, request_number: int
) -> None:
    moved(two)
    writes = {"left": request_number}
    call = two.evaluator.gateway._call

    def dying(method: str, *arguments: Any, **options: Any) -> Any:
        if method != "GET":
            if not writes["left"]:
                raise UnreachableError("killed here")
            writes["left"] -= 1
        return call(method, *arguments, **options)

    two.evaluator.gateway._call = dying  # type: ignore[method-assign]
    try:
        two.look(5)
    except UnreachableError:
        two.evaluator.gateway._call = call  # type: ignore[method-assign]
        two.evaluator.abandon("killed")
        two.another()
    two.look(5)
    assert sorted(two.api.trials("s")) == [0, 1, 2, 3]  # one job each
    assert two.where() == {"lab": 2, "theta": 2}


@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT"])
def test_a_lost_answer_in_the_middle_of_a_move_loses_and_repeats_nothing(two: TwoSites, method: str) -> None:
    moved(two)
    two.api.lose_next_answer(method, "jobs/")
    failures = 0
    for _ in range(8):
        try:
            two.look()
        except UnreachableError:
            failures += 1
    assert failures == 1
    assert sorted(two.api.trials("s")) == [0, 1, 2, 3]
    assert two.where() == {"lab": 2, "theta": 2}


def test_a_trial_on_its_way_is_withdrawn_like_one_that_waits(two: TwoSites) -> None:
    moved(two)
    two.look()
    assert [number for number, row in two.api.trials("s").items() if trial_rows.has_left(row)] == [0, 1]
    assert two.evaluator.room == 0  # theirs
    assert sorted(two.evaluator.cancel()) == [0, 1, 2, 3]
    two.look(3)
    assert two.evaluator.counts[TrialState.CANCELLED] == 4
    assert two.lab.acquire(9) == two.theta.acquire(9) == []


def test_a_moved_trials_second_try_is_not_granted_again(two: TwoSites) -> None:
    batch = two.lab.add_allocation(1)
    two.look()
    two.submit(0)
    [job_id] = two.lab.acquire(1)
    two.lab.crash(job_id)
    two.look()
    two.theta.add_allocation(1)
    two.lab.end_allocation(batch)
    two.look(4)
    [job_id] = two.theta.acquire(1)
    two.theta.crash(job_id)
    assert two.look() == [0]
    assert two.evaluator.line(0)["job_status"] == "FAILED"


# --- a site that goes away -------------------------------------------------------------------------------------------


def test_a_site_whose_agent_died_is_named_and_its_trials_run_elsewhere(two: TwoSites) -> None:
    batch = two.lab.add_allocation(2)
    two.theta.add_allocation(2)
    two.look()
    two.submit(0, 1, 2, 3)
    running = two.lab.acquire(1)
    two.api.add_session(batch, running)
    two.silence(two.lab)
    assert "agent of site lab has given no sign" in (two.evaluator.notice or "")
    assert two.evaluator.capacity == 2
    two.look(4)
    assert two.where() == {"lab": 1, "theta": 3}  # its launcher may be alive
    two.api.let_pass(200)
    two.site("lab")
    assert two.evaluator.sites is not None
    two.evaluator.sites._looked_at = -1e9
    two.look(4)
    assert two.where() == {"theta": 4}
    while ids := two.theta.acquire(4):
        for job_id in ids:
            two.theta.finish(job_id, 1.0)
        two.look()
    assert two.evaluator.counts[TrialState.DONE] == 4
    assert {line["m:site"] for line in two.evaluator.lines} == {"theta"}


def test_what_hangs_at_a_site_that_is_gone_does_not_starve_another(two: TwoSites) -> None:
    two.lab.add_allocation(8)
    two.theta.add_allocation(1)
    two.look()
    two.submit(*range(8))
    two.lab.acquire(8)
    two.silence(two.lab)
    assert two.evaluator.room == 2 - two.where()["theta"]


def test_an_agent_that_died_everywhere_makes_no_site_gone(two: TwoSites) -> None:
    two.lab.add_allocation(2)
    two.silence(two.lab)
    two.silence(two.theta)
    assert two.evaluator.capacity == 2


def test_a_scheduler_that_refuses_does_not_stop_the_others(two: TwoSites) -> None:
    two.evaluator.close()
    two.another(allocation=AllocationRequest(1))
    two.look()
    two.evaluator.ensure_allocation()
    at_lab, at_theta = (next(r for r in two.api.batch_jobs.values() if r["site_id"] == n) for n in (1, 2))
    two.theta.schedule()
    two.lab.end_allocation(at_lab["id"], "submit_failed", error="no such queue")
    two.look()
    two.evaluator.ensure_allocation()
    assert "no allocation is asked for at lab any more: The scheduler refused" in (two.evaluator.notice or "")
    assert len([row for row in two.api.batch_jobs.values() if row["site_id"] == two.lab.id]) == 1
    two.theta.end_allocation(at_theta["id"], "submit_failed", error="no such project")
    with pytest.raises(BalsamError, match="no such project"):
        two.look()


# --- what each site asks for -----------------------------------------------------------------------------------------


def test_each_site_asks_for_its_own_allocation_and_the_next_driver_knows(two: TwoSites) -> None:
    two.evaluator.close()
    two.api.jobs.clear()
    asked = {
        "lab": AllocationRequest(1, queue="debug"),
        "theta": AllocationRequest(4, 30, "regular", job_mode="serial"),
    }
    two.another(allocation=asked)
    for evaluator in (two.evaluator, BalsamEvaluator.recorded("s", client_path=two.client_yml)[0]):
        assert evaluator._requests == asked
        assert evaluator.settings["site"] == "lab,theta"
        assert evaluator.workers == 5
    two.look()
    two.evaluator.ensure_allocation()
    batches = {row["site_id"]: (row["num_nodes"], row["queue"], row["job_mode"]) for row in two.api.batch_jobs.values()}
    assert batches == {two.lab.id: (1, "debug", "mpi"), two.theta.id: (4, "regular", "serial")}


def test_a_site_without_a_request_asks_for_nothing(two: TwoSites) -> None:
    two.evaluator.close()
    two.api.jobs.clear()
    two.another(allocation={"theta": AllocationRequest(1)})
    two.look()
    two.evaluator.ensure_allocation()
    assert [row["site_id"] for row in two.api.batch_jobs.values()] == [two.theta.id]
    assert BalsamEvaluator.recorded("s", client_path=two.client_yml)[0]._requests["lab"] is None


def test_no_site_asks_for_what_others_do_already(two: TwoSites) -> None:
    two.evaluator.close()
    two.another(allocation=AllocationRequest(4))
    two.lab.add_allocation(4)
    two.look()
    two.evaluator.ensure_allocation(evaluations=4)
    assert [row["site_id"] for row in two.api.batch_jobs.values()] == [two.lab.id]
    two.evaluator.ensure_allocation(evaluations=40)
    assert {row["site_id"] for row in two.api.batch_jobs.values()} == {two.lab.id, two.theta.id}


def test_the_minutes_to_start_follow_the_wall_time_of_each_site(two: TwoSites) -> None:
    two.evaluator.close()
    asked = {"lab": AllocationRequest(1, wall_time_min=12), "theta": AllocationRequest(1, wall_time_min=600)}
    two.another(allocation=asked, eval_timeout=500)
    two.evaluator.ensure_allocation()
    two.look()
    two.evaluator.ensure_allocation()
    two.lab.schedule()
    two.theta.schedule()
    two.look()
    two.submit(0, 1)
    rows = two.api.trials("s")
    minutes = {two.api.apps[row["app_id"]]["site_id"]: row["wall_time_min"] for row in rows.values()}
    assert minutes == {two.lab.id: 9, two.theta.id: 12}  # an allocation of 12 min has no room for the margin


@pytest.mark.parametrize(
    ("site", "allocation", "words"),
    [
        ("lab,lab", None, "several different ones"),
        ("", None, "Sites are one name"),
        ("lab,", None, "Sites are one name"),
        (
            "lab,theta",
            {"cori": AllocationRequest(1)},
            r"'cori', which is no site of this search; its sites are lab, theta",
        ),
        ("lab,nowhere", None, "no Balsam site 'nowhere'"),
    ],
)
def test_wrong_sites_are_refused_before_anything_begins(two: TwoSites, site: str, allocation: Any, words: str) -> None:
    before = len(two.api.jobs)
    with pytest.raises(InputError, match=words):
        BalsamEvaluator(run, site, allocation=allocation, client_path=two.client_yml)
    assert len(two.api.jobs) == before


def test_a_list_of_names_will_do(two: TwoSites) -> None:
    made = BalsamEvaluator(run, ["theta", "lab"], client_path=two.client_yml)
    assert made.settings["site"] == "theta,lab"


def test_a_cut_at_the_site_that_was_left_is_not_forgotten(two: TwoSites) -> None:
    batch = two.lab.add_allocation(1)
    two.look()
    two.submit(0)
    [job_id] = two.lab.acquire(1)
    two.lab.time_out(job_id)
    two.api.jobs[job_id]["session_id"] = None
    two.look()
    two.theta.add_allocation(1)
    two.lab.end_allocation(batch)
    two.look(4)
    [job_id] = two.theta.acquire(1)
    two.theta.finish(job_id, 1.0)
    assert two.look() == [0]
    assert two.evaluator.line(0)["m:cut_by_allocations"] == 1
    assert two.evaluator.line(0)["m:moved_from"] == "lab"


def test_a_trial_does_not_move_to_a_site_that_is_too_small_for_it(two: TwoSites) -> None:
    two.evaluator.close()
    two.another(resources=lambda config: Resources(num_nodes=int(config["x"])))
    batch = two.lab.add_allocation(8)
    two.theta.add_allocation(2)
    two.look()
    two.submit(1, 2, 4, 8, 9)
    two.lab.end_allocation(batch)
    two.look(6)
    names = {app_id: two.api.sites[app["site_id"]]["name"] for app_id, app in two.api.apps.items()}
    where = {number: names[row["app_id"]] for number, row in two.api.trials("s").items()}
    assert (where[4], where[8]) == ("lab", "lab")
    assert where[1] == "theta"
    assert "9 nodes, and no allocation gives an evaluation more than 8" in two.evaluator.line(9)["m:failure"]


def test_what_waits_where_nothing_runs_comes_before_anything_new(two: TwoSites) -> None:
    batch = two.lab.add_allocation(2)
    two.theta.add_allocation(2)
    two.look()
    while two.fill():
        pass
    assert two.where() == {"lab": 4, "theta": 4}
    two.site("theta").durations_s.extend([6.5] * 199)  # as long as the pipeline: one wave waits
    two.lab.end_allocation(batch)
    two.look(2)
    for expected in ({"lab": 3, "theta": 4}, {"lab": 2, "theta": 4}):
        [job_id] = two.theta.acquire(1)
        two.theta.finish(job_id, 1.0)
        for _ in range(4):
            two.look()
            assert two.fill() == 0
        assert two.where() == expected
