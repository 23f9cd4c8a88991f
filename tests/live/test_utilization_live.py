"""Where the node-hours of real searches went: three causes of idle nodes, each prepared, and each found by its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deephyper_balsam import BalsamEvaluator, HpProblem, RandomSearch, Resources
from deephyper_balsam.cli import main
from deephyper_balsam.driver import loop as driving
from deephyper_balsam.monitor.node_hours import CAUSES, count_node_hours
from deephyper_balsam.monitor.timeline import read_timeline
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.record import find_record

from .waiting import wait_for

pytestmark = pytest.mark.live


def short(job: Any) -> float:
    import time

    time.sleep(1.5)
    return float(job["x"])


def one_long(job: Any) -> float:
    import time

    time.sleep(9.0 if job.id == 0 else 1.0)
    return float(job["x"])


def searching(name: str, run: Callable[[Any], float], folder: Path, nodes: int | None = 1) -> RandomSearch:
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    request = None if nodes is None else AllocationRequest(nodes, wall_time_min=10)
    evaluator = BalsamEvaluator(run, "local", resources=Resources(evals_per_node=2), allocation=request)
    return RandomSearch(problem, evaluator, name, seed=1, log_dir=folder, poll_s=0.3)


def utilization(name: str) -> dict[str, Any]:
    """Return the node-hours once the agent has said when the allocation began and ended."""
    gateway = Gateway()
    site = gateway.site("local")["id"]

    def ended() -> bool:
        rows = [row for row in gateway.batch_jobs([site]) if row["filter_tags"] == {"search": name}]
        return bool(rows) and all(row["end_time"] for row in rows)

    wait_for(ended, "the end of the allocation")
    done = CliRunner().invoke(main, ["search", "utilization", name, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def check_sum(name: str) -> None:
    """The parts add up to what the BatchJobs lasted, and the busy ones to what the runs themselves say."""
    gateway = Gateway()
    record = find_record(gateway, name)
    timeline = read_timeline(gateway, record)
    hours = count_node_hours(timeline)
    lasted = sum(one.nodes * (one.end - one.start) for one in timeline.allocations) / 3600
    assert sum(hours.by_kind.values()) == pytest.approx(lasted, rel=0.01)
    results = [row["data"]["result"] for row in gateway.jobs({"search": name}) if "result" in row["data"]]
    ran = sum(result["end"] - result["start"] for result in results) / 2 / 3600  # two places a node
    assert hours.by_kind["useful"] + hours.by_kind["failed"] == pytest.approx(ran, rel=0.01)


def most_idle(found: dict[str, Any], *but: str) -> str:
    return max((cause for cause in CAUSES if cause not in but), key=lambda cause: float(found["node_hours"][cause]))


@pytest.mark.long
def test_a_slow_optimizer_is_found(balsam_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = driving.make_optimizer

    def slow(*args: Any, **options: Any) -> Any:
        optimizer = made(*args, **options)
        ask = optimizer.ask
        optimizer.ask = lambda count: (time.sleep(12), ask(min(count, 1)))[1]
        return optimizer

    monkeypatch.setattr(driving, "make_optimizer", slow)
    searching("slow-optimizer", short, tmp_path).search(max_evals=4)
    found = utilization("slow-optimizer")
    assert most_idle(found, "start-up") == "no configuration", found
    check_sum("slow-optimizer")


def test_stragglers_are_found(balsam_env: dict[str, str], tmp_path: Path) -> None:
    searching("stragglers", one_long, tmp_path).search(max_evals=3)
    found = utilization("stragglers")
    assert most_idle(found, "start-up") == "drained", found
    check_sum("stragglers")


@pytest.mark.long
def test_an_empty_queue_that_nobody_fills_is_found(balsam_env: dict[str, str], tmp_path: Path) -> None:
    gateway = Gateway()
    site = gateway.site("local")
    batch_job = gateway.create_batch_job(
        {
            "site_id": site["id"],
            "num_nodes": 1,
            "wall_time_min": 10,
            "queue": "local",
            "project": "local",
            "job_mode": "mpi",
            "optional_params": {},
            "filter_tags": {"search": "empty-queue"},
        }
    )
    searching("empty-queue", short, tmp_path, nodes=None).search(max_evals=2)
    time.sleep(20)  # longer than what else may keep a node idle on a busy machine
    searching("empty-queue", short, tmp_path, nodes=None).search(max_evals=4)
    gateway.end_batch_job(batch_job["id"])
    found = utilization("empty-queue")
    assert most_idle(found, "start-up") == "no driver", found
    check_sum("empty-queue")
