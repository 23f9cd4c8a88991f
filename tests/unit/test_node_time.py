"""How busy the nodes are: the same figure in the view of `run`, in `watch`, in `utilization` and in the report."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.cli.progress import ProgressView
from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.monitor.follower import Follower
from deephyper_balsam.monitor.node_hours import count_node_hours
from deephyper_balsam.store.allocations import Allocations
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.node_time import busy_share, places
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.store.trial_rows import trial_tags
from deephyper_balsam.trial import TrialState

pytest_plugins = ["balsam_fixtures", "watched_search"]

Story = Callable[[], Any]


class World:
    """A search of two trials a node that goes on, and those who look at it."""

    def __init__(self, gateway: Gateway, site: VirtualSite, api: BalsamApi, record: SearchRecord) -> None:
        self.gateway, self.site, self.api = gateway, site, api
        self.follower = Follower(gateway, record)
        [row] = list(gateway.sites())
        allocations = Allocations(
            gateway, row, trial_tags("s"), lambda nodes: 2 * nodes, None, timing=Timing(allocations_s=0.0)
        )
        self.driver = SimpleNamespace(
            gateway=gateway, begun_at=record.created_at, sites=[SimpleNamespace(name="lab", allocations=allocations)]
        )
        search: Any = SimpleNamespace(
            name="s", method="random", problem=SimpleNamespace(name="net"), evaluator=self.driver
        )
        self.view = ProgressView(search, Console(file=io.StringIO()))
        self.ended: dict[int, float] = {}

    def allocation(self, nodes: int, *, told: bool) -> int:
        """Add one that runs; `told`: its site's agent has said since when."""
        made = self.site.add_allocation(nodes)
        if told:
            self.api.batch_jobs[made]["start_time"] = _utc(self.api.now())
        return made

    def end(self, batch_job_id: int) -> None:
        self.api.change_batch_job(batch_job_id, state="finished", end_time=_utc(self.api.now()))

    def run(self, batch_job_id: int, count: int) -> list[int]:
        began = self.site.acquire(count)
        for job_id in began:
            self.api.change_job(job_id, batch_job_id=batch_job_id)
        return began

    def finish(self, job_id: int, seconds: float, objective: float | None) -> None:
        now = self.api.now().timestamp()
        self.site.finish(job_id, objective, None if objective else "diverged", start=now - seconds, end=now)

    def look(self) -> tuple[float | None, float | None]:
        """Return how busy the view of `run` and `watch` say the nodes are."""
        for row in self.gateway.jobs(trial_tags("s")):
            self.driver.on_change(row, "lab")
        self.driver.sites[0].allocations.refresh()
        self.view(Progress(dict.fromkeys(TrialState, 0), None, 0.0, 0.0, None, None, 0, None))
        assert self.view._snapshot is not None
        return self.view._snapshot.busy, self.follower.look().busy


def _utc(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).replace(tzinfo=None).isoformat()


@pytest.fixture
def world(gateway: Gateway, site: VirtualSite, api: BalsamApi, record: SearchRecord, ids: list[int]) -> World:
    return World(gateway, site, api, record)


def told_by_all(client_yml: Path) -> dict[str, Any]:
    done = CliRunner().invoke(
        main, ["search", "utilization", "s", "--json"], env={"BALSAM_CLIENT_PATH": str(client_yml)}
    )
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("told", [True, False], ids=["the agent told the start", "nobody told the start"])
def test_run_watch_and_utilization_say_the_same(world: World, client_yml: Path, told: bool) -> None:
    """One node for 90 s and two for 60 s: of 420 s of places, 180 s had a run on them."""
    first = world.allocation(1, told=True)
    one, other = world.run(first, 2)
    world.look()
    world.api.let_pass(60.0)
    world.finish(one, 60.0, 0.5)
    world.finish(other, 60.0, None)
    world.api.let_pass(30.0)
    world.end(first)
    second = world.allocation(2, told=told)
    world.run(second, 1)
    world.look()
    world.api.let_pass(40.0)
    world.look()
    world.api.let_pass(20.0)

    run, watch = world.look()
    found = told_by_all(client_yml)
    expected = (60.0 + 60.0 + 60.0) / (2 * 90.0 + 4 * 60.0)
    assert run == pytest.approx(expected, abs=0.01)
    assert watch == pytest.approx(expected, abs=0.01)
    assert found["busy"] == pytest.approx(expected, abs=0.01)
    assert found["utilization"] == pytest.approx(expected - 60.0 / 420.0, abs=0.01)  # the failed run is of no use
    env = {"BALSAM_CLIENT_PATH": str(client_yml)}
    told = CliRunner().invoke(main, ["search", "status", "s", "--json"], env=env).stdout
    assert json.loads(told)["busy"] == pytest.approx(found["busy"], abs=0.001)
    assert re.search(
        r"^Nodes: 4[23]\.\d% busy", CliRunner().invoke(main, ["search", "status", "s"], env=env).stdout, re.M
    )


@pytest.mark.parametrize("started", [True, False])
def test_driver_and_watcher_reckon_the_time_left_alike(world: World, started: bool) -> None:
    """By the start where it is told, else by what the agent says."""
    allocation = world.allocation(1, told=started)
    world.api.batch_jobs[allocation]["scheduler_id"] = 77
    world.api.sites[world.site.id]["queued_jobs"] = {"77": {"time_remaining_min": 21}}
    world.api.let_pass(600.0)
    driver = world.driver.sites[0].allocations
    driver.refresh()
    [row] = driver.alive
    [seen] = world.follower.look().allocations
    assert seen.left_s == pytest.approx(driver.left_s(row), abs=2.0)
    assert seen.left_s == pytest.approx(3000.0 if started else 1320.0, abs=2.0)


def test_a_run_that_was_cut_was_on_its_node(world: World, client_yml: Path) -> None:
    allocation = world.allocation(1, told=True)
    [cut] = world.run(allocation, 1)
    world.look()
    world.api.let_pass(60.0)
    world.site.time_out(cut)
    world.look()
    world.api.let_pass(60.0)
    run, watch = world.look()
    found = told_by_all(client_yml)
    assert [run, watch, found["busy"]] == pytest.approx([0.25] * 3, abs=0.01)
    assert found["utilization"] == 0.0
    told = CliRunner().invoke(main, ["search", "status", "s", "--json"], env={"BALSAM_CLIENT_PATH": str(client_yml)})
    assert json.loads(told.stdout)["busy"] == pytest.approx(0.25, abs=0.01)


def test_status_needs_no_numpy() -> None:
    code = "import sys, deephyper_balsam.monitor.timeline; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_who_looks_again_and_again_counts_each_run_once(world: World) -> None:
    allocation = world.allocation(1, told=True)
    [job] = world.run(allocation, 1)
    for _ in range(3):
        world.api.let_pass(20.0)
        world.api.change_job(job, data={**world.api.jobs[job]["data"], "noted": world.api.now().timestamp()})
        world.look()
    world.finish(job, 60.0, 1.0)
    assert world.look() == pytest.approx((0.5, 0.5), abs=0.01)
    world.api.change_job(job, data={**world.api.jobs[job]["data"], "gathered": {"at": world.api.now().timestamp()}})
    assert world.look() == pytest.approx((0.5, 0.5), abs=0.01)


def test_nobody_says_how_busy_nodes_are_before_one_is_there(world: World, client_yml: Path) -> None:
    assert world.look() == (None, None)
    assert told_by_all(client_yml)["busy"] is None
    world.allocation(1, told=False)  # it runs, and nothing has begun
    assert world.look() == (None, None)
    assert told_by_all(client_yml)["busy"] is None


def test_an_allocation_of_others_is_not_the_searchs_until_it_runs_a_trial_of_it(world: World) -> None:
    others = world.allocation(4, told=True)
    world.api.let_pass(100.0)
    assert world.look() == (None, None)
    world.run(others, 2)
    world.api.let_pass(100.0)
    assert world.look() == pytest.approx((2 * 100 / (8 * 200),) * 2, abs=0.01)


@pytest.mark.parametrize(
    ("nodes", "shapes", "expected"),
    [(4, {(1, 1)}, 4), (4, {(1, 2)}, 8), (4, {(2, 1)}, 2), (5, {(2, 1)}, 2), (1, {(2, 1)}, 1), (3, (), 3)],
)
def test_the_places_of_an_allocation(nodes: int, shapes: Any, expected: int) -> None:
    assert places(nodes, shapes) == expected


def test_a_share_is_never_more_than_all() -> None:
    assert busy_share(11.0, 10.0) == 1.0
    assert busy_share(1.0, 0.0) is None


def test_the_report_says_the_node_hours_figure() -> None:
    from made_searches import made_search
    from test_node_hours import timeline

    from deephyper_balsam.monitor.node_hours import Allocation, Run
    from deephyper_balsam.results.analysis.report import html

    runs = [Run(1, 0, 1800, "useful"), Run(1, 1800, 2700, "failed")]
    counted = count_node_hours(timeline(runs, allocations=[Allocation(1, "lab", 1, 1, 0.0, 3600.0)]))
    page = html(made_search(12), 0.0, counted)
    assert "Nodes were 75% busy with runs in 1 node-hours. 50% of node-hours were useful." in page
    assert "Most of the rest: failed, 25%." in page


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([(0, 1800, "useful"), (1800, 3200, "failed")], "Most of the rest: failed, 39%."),
        ([(0, 1800, "useful"), (1800, 3200, "repeated"), (3200, 3600, "failed")], "Most of the rest: repeated, 39%."),
        ([(0, 1800, "useful"), (3000, 3600, "failed")], "Most of the rest: no configuration, 33%."),
        ([(0, 3600, "failed")], "Most of the rest: failed, 100%."),
    ],
)
def test_the_largest_loss_is_named_be_it_failed_or_repeated_runs(runs: list[Any], said: str) -> None:
    """Once it named the largest idle part, 6%, where failed runs were 26%."""
    from made_searches import made_search
    from test_node_hours import timeline

    from deephyper_balsam.monitor.node_hours import Allocation, Run
    from deephyper_balsam.results.analysis.report import html

    counted = count_node_hours(
        timeline([Run(1, *run) for run in runs], allocations=[Allocation(1, "lab", 1, 1, 0.0, 3600.0)])
    )
    assert said in html(made_search(12), 0.0, counted)
