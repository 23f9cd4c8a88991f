"""Runs that are longer than their allocations: their trials fail in the end, and the search with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import RandomSearch, Search
from deephyper_balsam.errors import BrokenApplicationError
from deephyper_balsam.node.failure_policy import had_the_whole
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.allocation_request import AllocationRequest

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.0)
"""The site of these tests is a fast one."""

WALL_MIN = 60
Make = Callable[..., Search]


@pytest.fixture
def make(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Make:
    def search(nodes: int = 2, **options: Any) -> Search:
        problem = HpProblem("line")
        problem.add_hyperparameter((0.0, 1.0), "x")
        evaluator = BalsamEvaluator(
            "ackley", "lab", allocation=AllocationRequest(nodes, WALL_MIN), client_path=client_yml, timing=QUICK
        )
        return RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.001, **options)

    return search


class Site:
    """Runs what waits; at each look an allocation is over, and what a run function says fits has ended before.

    Its clock is not driven: nothing depends on how long a look takes.
    """

    def __init__(
        self, site: VirtualSite, lasts_s: Callable[[int], float], most: int = 40, cut_s: float = 3400.0
    ) -> None:
        self.site, self.lasts_s, self.left, self.cut_s = site, lasts_s, most, cut_s
        self.allocations = self.runs = 0

    def __call__(self, progress: Progress) -> None:
        api, allocations = self.site.api, self.site.schedule()
        if not allocations:
            return
        assert self.left, "allocations without end"
        self.left -= 1
        running = self.site.acquire(sum(api.batch_jobs[key]["num_nodes"] for key in allocations))
        self.runs += len(running)
        for job_id in running:
            api.jobs[job_id]["batch_job_id"] = allocations[0]
        api.let_pass(self.cut_s)
        for job_id in running:
            if self.lasts_s(int(api.jobs[job_id]["tags"]["trial"])) <= self.cut_s:
                self.site.finish(job_id, 1.0)
            else:
                self.site.time_out(job_id)
        self.allocations += 1


@pytest.mark.parametrize("nodes", [1, 2, 6])
def test_when_all_runs_are_longer_than_the_allocations_the_search_ends_and_says_what_to_ask_for(
    nodes: int, make: Make, site: VirtualSite, api: BalsamApi
) -> None:
    play = Site(site, lambda number: 7200.0)
    search = make(nodes)
    with pytest.raises(BrokenApplicationError) as raised:
        search.search(max_evals=50, on_progress=play)
    assert "--wall-time-min M" in str(raised.value)
    assert "longer than the allocations" in str(raised.value)
    assert "3 allocations of 60 min, the last time after 56.7 min" in str(raised.value)
    failed = [line for line in search.evaluator.lines if line["job_status"] == "FAILED"]
    assert len(failed) >= 2
    for line in failed:
        assert line["m:failure"].startswith("cut by the end of 3 allocations of 60 min, the last time after 56.7 min")
        assert line["m:cut_by_allocations"] == 3
    assert play.runs <= 3 * (len(failed) + nodes)
    for line in failed:  # nothing takes a node for it again
        assert api.jobs[line["m:balsam_job_id"]]["state"] == "JOB_FINISHED"


def test_one_that_is_too_long_fails_and_the_others_go_on(make: Make, site: VirtualSite) -> None:
    search = make(max_cuts=2)
    frame = search.search(max_evals=8, on_progress=Site(site, lambda number: 7200.0 if number == 3 else 60.0))
    states = dict(zip(frame["job_id"], frame["job_status"], strict=True))
    assert {number for number, state in states.items() if state == "FAILED"} == {3}
    assert frame["m:failure"][3].startswith("cut by the end of 2 allocations")


def test_a_run_that_began_late_in_its_allocations_is_not_called_too_long(make: Make, site: VirtualSite) -> None:
    tries: list[int] = []

    def lasts_s(number: int) -> float:
        tries.append(number)
        return 1300.0 if tries.count(number) < 6 else 1.0

    frame = make(max_cuts=2).search(max_evals=2, on_progress=Site(site, lasts_s, cut_s=1200.0))
    assert set(frame["job_status"]) == {"DONE"}


def test_with_no_limit_of_cuts_a_trial_is_run_again_and_the_driver_warns(make: Make, site: VirtualSite) -> None:
    tries: list[int] = []
    notices: list[str] = []

    def lasts_s(number: int) -> float:
        tries.append(number)
        return 7200.0 if tries.count(number) < 6 else 60.0

    play = Site(site, lasts_s)

    def look(progress: Progress) -> None:
        notices.append(progress.notice or "")
        play(progress)

    frame = make(max_cuts=0).search(max_evals=2, on_progress=look)
    assert set(frame["job_status"]) == {"DONE"}
    assert any("its runs are longer than the allocations" in notice for notice in notices)


@pytest.mark.parametrize(("reached", "fails"), [([3.0, 6.0], False), ([3.0, 3.0], False), ([3.0] * 4, True)])
def test_a_run_that_gets_on_from_its_checkpoints_is_not_called_too_long(
    make: Make, site: VirtualSite, api: BalsamApi, reached: list[float], fails: bool
) -> None:
    tries: list[int] = []

    def lasts_s(number: int) -> float:
        tries.append(number)
        count = tries.count(number)
        for job in api.jobs.values():  # as a run does when it begins again
            if job["tags"].get("trial") == str(number) and count > 1:
                job["data"] = {**job["data"], "progress": reached[: count - 1]}
        return 7200.0 if count <= len(reached) + 1 else 60.0

    frame = make(max_cuts=3).search(max_evals=1, on_progress=Site(site, lasts_s))
    assert set(frame["job_status"]) == {"FAILED" if fails else "DONE"}


def test_a_driver_that_begins_anew_knows_the_cuts_and_the_limit(
    make: Make, site: VirtualSite, client_yml: Path, tmp_path: Path
) -> None:
    play = Site(site, lambda number: 7200.0)
    first = make(max_cuts=4)

    def stop_after_two(progress: Progress) -> None:
        play(progress)
        if play.allocations == 2:
            first.stop()

    first.search(max_evals=9, on_progress=stop_after_two)
    second = Search.resume("s", log_dir=tmp_path, client_path=client_yml, poll_s=0.001)
    second.evaluator.timing = QUICK
    with pytest.raises(BrokenApplicationError):
        second.search(on_progress=play)
    failures = {line["m:failure"] for line in second.evaluator.lines if line["job_status"] == "FAILED"}
    assert {failure.partition(" of 60")[0] for failure in failures} == {"cut by the end of 4 allocations"}


@pytest.mark.parametrize(
    ("lasted_s", "wall_min", "whole"),
    [(45, 1, True), (29, 1, False), (3090, 60, True), (3000, 60, False), (20 * 3600, 24 * 60, False), (0, 5, False)],
)
def test_what_counts_as_the_whole_of_an_allocation(lasted_s: float, wall_min: int, whole: bool) -> None:
    assert had_the_whole(lasted_s, 60.0 * wall_min) is whole
