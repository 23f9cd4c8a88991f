"""Searches through Cobalt and PBS played by processes: real agent, job template, launcher, `aprun`, `mpiexec`."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from deephyper_balsam.server.stack import LocalStack

from .machine import Machine, machine
from .waiting import wait_for

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
import batch_system

pytestmark = pytest.mark.live

# A site config, the batch system that it is for, and one of its queues
MACHINES = [("theta-knl-cobalt", "cobalt", "default"), ("polaris-pbs", "pbs", "debug")]
MODES = [
    "mpi",
    pytest.param(
        "serial",
        marks=[
            pytest.mark.skipif(not batch_system.own_names(), reason="nodes cannot be given names here: not root"),
            pytest.mark.long,
        ],
    ),
]


@pytest.fixture(scope="module", params=MACHINES, ids=lambda params: params[0])
def system(
    request: pytest.FixtureRequest, stack: LocalStack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    config, kind, queue = request.param
    work = tmp_path_factory.mktemp(config)
    batch = batch_system.install(work / "batch", kind)
    with machine(stack, work, config, batch, queue=queue, project="datascience") as made:
        try:
            yield made
        finally:
            for path in (work / "batch" / "jobs").glob("*.json"):
                (work / "batch" / f"{path.stem}.delete").touch()


@pytest.mark.parametrize("mode", MODES)
def test_a_search_whose_allocation_is_deleted_is_finished_by_the_next_one(system: Machine, mode: str) -> None:
    name = f"{system.site_name}-cut-{mode}"
    with system.sign("hold"):
        search = system.search(name, "--nodes", "2", "--job-mode", mode, "--max-evals", "5")
        wait_for(lambda: system.held(name), "two evaluations that are held")
        (running,) = system.batch_jobs(name)
        subprocess.run(["qdel", str(running["scheduler_id"])], env=system.env, check=True)
        wait_for(lambda: system.batch_jobs(name)[0]["state"] == "finished", "the first allocation's end")
    said = system.finish(search)
    assert "5 done" in said, [(row["job_id"], row["m:failure"]) for row in system.rows(name)]
    first, second = system.ended_batch_jobs(name)
    for batch_job in (first, second):
        assert batch_job["start_time"] is not None
        assert batch_job["end_time"] is not None
    rows = system.rows(name)
    if mode == "mpi":
        assert {row["m:rank"] for row in rows} == {"0"}  # each was started by the machine's own launcher
    # Two ended in the first, whichever: serial mode takes trials in any order
    by_allocation = Counter(int(row["m:allocation"].partition(".")[0]) for row in rows)
    assert by_allocation == {first["scheduler_id"]: 2, second["scheduler_id"]: 3}


def test_two_allocations_at_once_share_a_search(system: Machine) -> None:
    name = f"{system.site_name}-two"
    with system.sign("meet"):
        said = system.finish(system.search(name, "--nodes", "1", "--max-allocations", "2", "--max-evals", "6"))
    assert "6 done" in said
    ids = {row["scheduler_id"] for row in system.ended_batch_jobs(name)}
    by_trial = {row["job_id"]: int(row["m:allocation"].partition(".")[0]) for row in system.rows(name)}
    assert len(ids) == 2
    assert {by_trial[0], by_trial[1]} == ids


def test_of_an_evaluation_on_two_nodes_with_two_ranks_each_the_first_rank_reports(system: Machine) -> None:
    nodes = system.check_first_of_four_ranks_reports(f"{system.site_name}-ranks")
    assert len(nodes) == (2 if batch_system.own_names() else 1)
