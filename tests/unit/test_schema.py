"""What a later program wrote is refused and left alone; what was made before there were versions is read."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, PlayingSite, VirtualSite

from deephyper_balsam import __version__
from deephyper_balsam.cli import main
from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.search import RandomSearch, Search
from deephyper_balsam.errors import NewerVersionError
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.driver_requests import EXTEND, answer_request, read_requests, send_request
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.record import find_records
from deephyper_balsam.store.snapshots import read_rows

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02)
"""The site of these tests is a fast one."""

Play = Callable[..., PlayingSite]
LATER = {"schema": 2, "program": "7.1.0", "new_field": [1]}


def run(job: Any) -> float:
    return float(job["x"])


def score(config: dict[str, Any]) -> float:
    return float(config["x"])


@pytest.fixture
def make(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Callable[[], Search]:
    """Make the search `s`; it asks for allocations itself."""

    def search() -> Search:
        problem = HpProblem("small")
        problem.add_hyperparameter((1, 60), "x")
        evaluator = BalsamEvaluator(run, "lab", allocation=AllocationRequest(2), client_path=client_yml, timing=QUICK)
        return RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.01)

    return search


@pytest.fixture
def begun(make: Callable[[], Search], play: Play, gateway: Gateway, site: VirtualSite) -> None:
    """The search `s`, three of whose trials are done, and which somebody asked for more."""
    play(score)
    make().search(max_evals=3)
    send_request(gateway, site.id, "s", EXTEND, 1.0, max_evals=6)


def of_kind(api: BalsamApi, kind: str) -> list[dict[str, Any]]:
    if kind == "trial":
        return [row for row in api.jobs.values() if "trial" in row["tags"]]
    return [row for row in api.jobs.values() if row["tags"].get("kind") == kind]


KINDS = ["search", "trial", "driver", "request"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_says_its_version_and_the_program(begun: None, api: BalsamApi, kind: str) -> None:
    rows = of_kind(api, kind)
    assert rows
    assert {(row["data"]["schema"], row["data"]["program"]) for row in rows} == {(1, __version__)}


def changed_by_a_later_program(api: BalsamApi, kind: str) -> dict[int, Any]:
    row = of_kind(api, kind)[-1]
    api.change_job(row["id"], data={**row["data"], **LATER})
    return {row["id"]: copy.deepcopy(row) for row in api.jobs.values()}


@pytest.mark.parametrize("words", [("status", "s"), ("resume", "s")], ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_a_search_that_a_later_program_wrote_is_refused_and_left_as_it_is(
    begun: None, api: BalsamApi, client_yml: Path, tmp_path: Path, kind: str, words: tuple[str, ...]
) -> None:
    before = changed_by_a_later_program(api, kind)
    options = ("--log-dir", str(tmp_path)) if words[0] == "resume" else ()
    done = CliRunner().invoke(main, ["search", *words, *options], env={"BALSAM_CLIENT_PATH": str(client_yml)})
    assert done.exit_code == 2
    assert "was written by deephyper-balsam 7.1.0, in version 2 of its data" in " ".join(done.output.split())
    assert {job_id: api.jobs[job_id] for job_id in before} == before


@pytest.mark.parametrize("kind", ["search", "trial"])
def test_results_that_a_later_program_wrote_are_not_guessed_at(
    begun: None, api: BalsamApi, client_yml: Path, kind: str
) -> None:
    changed_by_a_later_program(api, kind)
    done = CliRunner().invoke(main, ["search", "results", "s"], env={"BALSAM_CLIENT_PATH": str(client_yml)})
    assert done.exit_code == 2
    assert "7.1.0" in done.output


@pytest.mark.parametrize("kind", KINDS)
def test_a_driver_does_not_touch_a_search_that_a_later_program_wrote(
    begun: None, make: Callable[[], Search], api: BalsamApi, kind: str
) -> None:
    before = changed_by_a_later_program(api, kind)
    with pytest.raises(NewerVersionError, match=r"7\.1\.0"):
        make().search(max_evals=6)
    assert {job_id: api.jobs[job_id] for job_id in before} == before


def test_other_searches_are_listed_beside_one_of_a_later_program(
    begun: None, api: BalsamApi, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    changed_by_a_later_program(api, "search")
    assert find_records(gateway) == []
    assert "7.1.0" in caplog.text


def test_rows_without_a_version_are_those_made_before_there_was_one(
    begun: None, make: Callable[[], Search], api: BalsamApi
) -> None:
    for row in list(api.jobs.values()):
        data = {key: value for key, value in row["data"].items() if key not in ("schema", "program")}
        api.change_job(row["id"], data=data)
    assert len(make().search(max_evals=6)) == 6


def test_what_changes_a_trials_data_keeps_the_fields_that_it_does_not_know(begun: None, gateway: Gateway) -> None:
    row = read_rows(gateway, "s")[0]
    row["data"] = {**row["data"], "new_field": [1], "moved": {"at": 1.0, "from": "lab"}}
    outcome = trial_data.failed("why")
    for data in (
        trial_data.with_result(row, outcome),
        trial_data.with_gathered(row, outcome, 1, 2.0, 0),
        trial_data.with_another_try(row, outcome),
        trial_data.with_cancelled(row, 1.0),
        trial_data.with_moved(row, "lab", 1.0),
        trial_data.with_set_aside(row, 1, 1.0),
        trial_rows.job_elsewhere(row, 1, 1, 0)["data"],
    ):
        assert data["new_field"] == [1]  # type: ignore[typeddict-item]


def test_an_answer_keeps_what_it_does_not_know_of_the_request(begun: None, api: BalsamApi, gateway: Gateway) -> None:
    [row] = of_kind(api, "request")
    api.change_job(row["id"], data={**row["data"], "new_field": [1]})
    [request] = read_requests(gateway, "s")
    answer_request(gateway, request, 1.0, "done")
    assert api.jobs[row["id"]]["data"]["new_field"] == [1]
