"""One state of a search: why it is over, and what to do next, the same for all who ask."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, PlayingSite, VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.search import RandomSearch, Search
from deephyper_balsam.monitor.follower import Follower
from deephyper_balsam.monitor.timeline import read_timeline
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.record import find_record
from deephyper_balsam.store.search_state import Budget, EndReason, read_state

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02)
"""The site of these tests is a fast one."""

Play = Callable[..., PlayingSite]


def run(job: Any) -> float:
    return float(job["x"])


def score(config: dict[str, Any]) -> float:
    return float(config["x"])


@pytest.fixture
def make(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Callable[..., Search]:
    """Make the search `s` over six configurations; it asks for allocations itself."""

    def search(**options: Any) -> Search:
        problem = HpProblem("small")
        problem.add_hyperparameter((1, 6), "x")
        evaluator = BalsamEvaluator(run, "lab", allocation=AllocationRequest(2), client_path=client_yml, timing=QUICK)
        return RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.01, **options)

    return search


def call(client_yml: Path, *words: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["search", *words], env={"BALSAM_CLIENT_PATH": str(client_yml)})
    assert done.exit_code == code, done.output
    return done.output


def used_up(
    how: EndReason, make: Callable[..., Search], gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> dict[str, Any]:
    """Use up a search in one of the ways; the budget that it had."""
    budget: dict[str, Any] = {
        EndReason.EVALUATIONS: {"max_evals": 3},
        EndReason.SPACE: {"max_evals": 99},
        EndReason.TIME: {"max_evals": 99, "timeout": 0.3},
    }[how]
    make().search(**budget)
    return budget


WAYS = [EndReason.EVALUATIONS, EndReason.SPACE, EndReason.TIME]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_search_that_is_used_up_and_resumed_says_so_and_asks_for_no_allocation(
    way: EndReason,
    make: Callable[..., Search],
    play: Play,
    gateway: Gateway,
    site: VirtualSite,
    api: BalsamApi,
    client_yml: Path,
    tmp_path: Path,
) -> None:
    if way is not EndReason.TIME:  # then nothing ever runs
        play(score)
    budget = used_up(way, make, gateway, site, api)
    asked_for = len(api.batch_jobs)
    make().search(**budget)
    nothing_found = way is EndReason.TIME
    said = call(client_yml, "resume", "s", "--log-dir", str(tmp_path), code=int(nothing_found))
    expected = {
        EndReason.EVALUATIONS: "Ended: its budget of 3 evaluations is used up.",
        EndReason.TIME: "Ended: its time is used up.",
        EndReason.SPACE: f"Ended: {EndReason.SPACE.value}.",
    }[way]
    assert expected in said
    assert len(api.batch_jobs) == asked_for
    assert {row["tags"].get("kind") for row in api.jobs.values()} == {None, "search", "driver"}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_all_who_ask_agree_that_a_used_up_search_is_over_and_how_it_goes_on(
    way: EndReason,
    make: Callable[..., Search],
    play: Play,
    gateway: Gateway,
    site: VirtualSite,
    api: BalsamApi,
    client_yml: Path,
) -> None:
    if way is not EndReason.TIME:
        play(score)
    used_up(way, make, gateway, site, api)
    record = find_record(gateway, "s")
    snapshot = Follower(gateway, record).look()
    state = read_state(gateway, record, snapshot.states)
    assert (state.end, state.is_over, snapshot.complete) == (way, True, True)
    assert read_timeline(gateway, record).complete
    said = call(client_yml, "status", "s")
    expected = {
        EndReason.EVALUATIONS: "search extend s --max-evals N, then search resume s goes on",
        EndReason.TIME: "search extend s --timeout S, then search resume s goes on",
        EndReason.SPACE: "nothing is left to go on with",
    }[way]
    assert expected in said
    assert "(deephyper-balsam search resume" not in said


def test_a_search_that_was_extended_and_runs_is_not_called_complete(
    make: Callable[..., Search], play: Play, site: VirtualSite, client_yml: Path
) -> None:
    evaluated, goes_on = list[Any](), threading.Event()

    def held(config: dict[str, Any]) -> float:
        if len(evaluated) >= 2:
            goes_on.wait(30)
        evaluated.append(config)
        return score(config)

    def drained_hours() -> float:
        return float(json.loads(call(client_yml, "utilization", "s", "--json"))["node_hours"]["drained"])

    def status() -> dict[str, Any]:
        return dict(json.loads(call(client_yml, "status", "s", "--json")))

    play(held)
    make().search(max_evals=2)
    assert drained_hours() > 0
    assert status()["complete"]
    call(client_yml, "extend", "s", "--max-evals", "4")
    assert (drained_hours(), status()["end"], status()["complete"]) == (0.0, None, False)
    assert status()["next"] == "deephyper-balsam search resume s goes on"
    driver = threading.Thread(target=lambda: make().search(max_evals=4))
    driver.start()
    try:
        until = time.monotonic() + 20
        while status()["states"].get("RUNNING") is None and time.monotonic() < until:
            time.sleep(0.05)
        assert (drained_hours(), status()["complete"], status()["next"]) == (0.0, False, "its driver goes on with it")
    finally:
        goes_on.set()
        driver.join()
    assert (len(evaluated), status()["complete"]) == (4, True)


def test_a_point_added_to_a_complete_search_says_what_it_takes_and_is_evaluated_then(
    make: Callable[..., Search],
    play: Play,
    gateway: Gateway,
    site: VirtualSite,
    api: BalsamApi,
    client_yml: Path,
    tmp_path: Path,
) -> None:
    play(score)
    make().search(max_evals=2)
    tried = {row["x"] for row in (site.config(row["id"]) for row in api.trials("s").values())}
    x = next(x for x in range(1, 7) if x not in tried)
    said = call(client_yml, "add", "s", f"x={x}")
    assert "the budget of 2 evaluations is used up" in said
    assert "search extend s --max-evals 3`, then `deephyper-balsam search resume s`" in said
    assert "search extend s --max-evals 3, then search resume s goes on" in call(client_yml, "status", "s")
    assert "1 added configuration waits: " in (Follower(gateway, find_record(gateway, "s")).look().notice or "")
    again = ("resume", "s", "--log-dir", str(tmp_path))
    assert "1 added configuration was not evaluated for want of budget" in call(client_yml, *again)
    assert "added configurations were not evaluated" in (tmp_path / "s" / "search.log").read_text()
    call(client_yml, "extend", "s", "--max-evals", "3")
    call(client_yml, *again)
    assert site.config(api.trials("s")[2]["id"]) == {"x": x}


def test_a_budget_is_used_by_time_or_by_evaluations() -> None:
    assert Budget(3, 10.0).used(2, 9.9) is None
    assert Budget(3, 10.0).used(3, 9.9) is EndReason.EVALUATIONS
    assert Budget(3, 10.0).used(0, 10.0) is EndReason.TIME
    assert Budget().used(10**6, 1e9) is None
    assert [EndReason.of(reason.value) for reason in EndReason] == list(EndReason)
    assert EndReason.of("interrupted") is None
