"""A job that stays RUNNING though no launcher holds it: the driver gives it back to the queue while it drives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.trial import Trial

pytest_plugins = ["balsam_fixtures"]

SETTINGS = {"problem": {"name": "p"}, "method": "random", "options": {}, "seed": 1}


def run(job: Any) -> float:
    return float(job["x"])


@pytest.fixture
def evaluator(site: VirtualSite, client_yml: Path) -> Iterator[BalsamEvaluator]:
    site.add_allocation(4)
    made = BalsamEvaluator(run, "lab", client_path=client_yml)
    made.open("s", dict(SETTINGS), max_evals=100)
    made.submit([Trial(0, {"x": 1.0}), Trial(1, {"x": 2.0})])
    yield made
    made.gateway._client.session.close()


@pytest.fixture
def orphan(evaluator: BalsamEvaluator, site: VirtualSite, api: BalsamApi) -> int:
    """A job whose launcher said that it runs after it had given its session back; another runs as it should."""
    job_id, _ = site.acquire(2)
    api.change_job(job_id, state="RUN_TIMEOUT")
    api.change_job(job_id, state="RUNNING")
    assert api.jobs[job_id]["session_id"] is None
    assert evaluator.collect() == []
    return job_id


def let_pass(evaluator: BalsamEvaluator, api: BalsamApi, seconds: float) -> None:
    api.let_pass(seconds)
    evaluator.gateway.sites()  # any answer tells the driver what time it is at the server


def states(api: BalsamApi) -> list[str]:
    return [api.trials("s")[number]["state"] for number in (0, 1)]


def test_it_runs_again_once_what_ran_it_must_be_gone(
    evaluator: BalsamEvaluator, api: BalsamApi, site: VirtualSite, orphan: int
) -> None:
    let_pass(evaluator, api, 20)
    evaluator.collect()
    assert states(api) == ["RUNNING", "RUNNING"]
    let_pass(evaluator, api, 20)
    evaluator.collect()
    assert states(api) == ["RESTART_READY", "RUNNING"]
    assert site.acquire(2) == [orphan]
    site.finish(orphan, 1.0)
    [result] = evaluator.collect()
    assert (result.number, result.objective) == (0, 1.0)
    let_pass(evaluator, api, 60)
    evaluator.collect()
    assert states(api) == ["JOB_FINISHED", "RUNNING"]


def test_its_result_wins_where_the_run_had_ended_after_all(
    evaluator: BalsamEvaluator, api: BalsamApi, site: VirtualSite, orphan: int
) -> None:
    let_pass(evaluator, api, 40)
    site.deliver(orphan, 5.0)
    [result] = evaluator.collect()
    assert (result.number, result.objective) == (0, 5.0)
    evaluator.collect()
    assert states(api) == ["RUNNING", "RUNNING"]


def test_a_launcher_that_took_it_meanwhile_keeps_it(evaluator: BalsamEvaluator, api: BalsamApi, orphan: int) -> None:
    let_pass(evaluator, api, 40)
    api.jobs[orphan]["session_id"] = 7  # such a change is no news to whoever asks for what changed
    evaluator.collect()
    assert states(api) == ["RUNNING", "RUNNING"]


def test_what_is_given_back_and_lost_again_is_given_back_again(
    evaluator: BalsamEvaluator, api: BalsamApi, orphan: int
) -> None:
    let_pass(evaluator, api, 40)
    evaluator.collect()
    api.change_job(orphan, state="RUNNING")
    evaluator.collect()
    assert states(api) == ["RUNNING", "RUNNING"]
    let_pass(evaluator, api, 40)
    evaluator.collect()
    assert states(api) == ["RESTART_READY", "RUNNING"]


def test_a_new_search_is_laid_out_for_the_allocations_that_run_already(site: VirtualSite, client_yml: Path) -> None:
    site.add_allocation(3)
    site.add_allocation(2)
    site.add_allocation(7, state="finished")
    made = BalsamEvaluator(run, "lab", client_path=client_yml)
    assert made.open("s", dict(SETTINGS), max_evals=100).settings["num_workers"] == 5
    made.gateway._client.session.close()
