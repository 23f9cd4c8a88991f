"""`search utilization` on the fake API."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam import BalsamEvaluator, HpProblem, RandomSearch
from deephyper_balsam.cli import main

pytest_plugins = ["balsam_fixtures"]
Play = Callable[..., Any]


@pytest.fixture
def searched(api: BalsamApi, site: VirtualSite, play: Play, client_yml: Path, tmp_path: Path) -> str:
    """A search of ten trials in an allocation of two nodes that has ended."""
    allocation = site.add_allocation(2)
    play(lambda config: float(config["x"]))
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    evaluator = BalsamEvaluator("ackley", "lab", client_path=client_yml)
    RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.02).search(max_evals=10)
    return str(allocation)


def call(client_yml: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["search", "utilization", *words], env={"BALSAM_CLIENT_PATH": str(client_yml)})


def test_a_search_that_had_no_allocation_says_so(searched: str, client_yml: Path) -> None:
    done = call(client_yml, "s")
    assert (done.exit_code, done.output.splitlines()[0]) == (0, "Search s: no allocation of it has run yet.")


def test_the_parts_are_told_and_add_up(searched: str, api: BalsamApi, client_yml: Path) -> None:
    starts = [row["data"]["result"]["start"] for row in api.jobs.values() if "result" in row["data"]]
    [row] = api.batch_jobs.values()
    row["num_nodes"] = 20  # the runs of the fake last a second whatever its clock says, and overlap
    began, ended = min(starts) - 36, max(starts) + 36
    row["start_time"], row["end_time"] = (
        datetime.fromtimestamp(moment, timezone.utc).replace(tzinfo=None).isoformat() for moment in (began, ended)
    )
    for job in api.jobs.values():
        job["batch_job_id"] = row["id"]
    found = json.loads(call(client_yml, "s", "--json").stdout)
    assert sum(found["node_hours"].values()) == pytest.approx(20 * (ended - began) / 3600, rel=1e-3)
    assert found["node_hours"]["start-up"] == pytest.approx(20 * 36 / 3600, rel=1e-3)
    said = call(client_yml, "s").output
    assert " busy with runs, " in said
    assert "from the allocation's start to its first run" in said


def test_an_unknown_search_is_bad_input(searched: str, client_yml: Path) -> None:
    done = call(client_yml, "other")
    assert done.exit_code == 2
    assert "There is no search 'other'" in done.output


def test_a_picture_has_a_known_suffix(searched: str, client_yml: Path, tmp_path: Path) -> None:
    done = call(client_yml, "s", "-o", str(tmp_path / "hours.bmp"))
    assert done.exit_code == 2
    assert not (tmp_path / "hours.bmp").exists()
