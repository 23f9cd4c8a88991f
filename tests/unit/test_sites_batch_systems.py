"""The life of a BatchJob through Balsam's own scheduler service, on fake Cobalt and PBS made of real processes."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from balsam.config import Settings
from balsam.site.service.scheduler import SchedulerService

from deephyper_balsam.sites.configs import fill_in, site_config

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
import batch_system

QUEUES = {"theta-knl-cobalt": "default", "polaris-pbs": "prod"}
KINDS = {"theta-knl-cobalt": "cobalt", "polaris-pbs": "pbs"}


class Agent:
    """Balsam's scheduler service with one BatchJob; only the API is a stand-in."""

    def __init__(self, site: Path, config: str) -> None:
        settings = Settings(**yaml.safe_load(fill_in(site_config(config).settings_text(), "datascience")))
        template = site / "job-template.sh"
        text = (site_config(config).path / "job-template.sh").read_text()
        # The launcher is played by what the test puts in its place; everything above it is the template's own
        template.write_text(re.sub(r'exec "\$python" -m deephyper_balsam\.launcher\.{{.*?}}', "exec ./launcher", text))
        sched = settings.scheduler
        self.job = SimpleNamespace(
            id=1, state="pending_submission", scheduler_id=None, status_info={}, start_time=None, end_time=None,
            num_nodes=2, wall_time_min=90, queue=QUEUES[config], project="datascience", job_mode="mpi",
            filter_tags={"search": "it's"}, optional_params={}, partitions=None,
            validate=lambda *_: None, partitions_to_cli_args=lambda: "",
        )  # fmt: skip
        objects = SimpleNamespace(filter=lambda **_: [self.job], bulk_update=lambda jobs: None)
        record = SimpleNamespace(save=lambda: None)
        client = SimpleNamespace(
            BatchJob=SimpleNamespace(objects=objects),
            Site=SimpleNamespace(objects=SimpleNamespace(get=lambda **_: record)),
        )
        self.record = record
        self.service = SchedulerService(
            client, 1, sched.scheduler_class, 1, sched.allowed_queues, sched.allowed_projects,
            sched.optional_batch_job_params, template, site / "qsubmit", {},
        )  # fmt: skip

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():  # the fakes are processes, and machines can be slow
            assert time.monotonic() < deadline, vars(self.job)
            self.service.run_cycle()
            time.sleep(0.05)


@pytest.fixture(params=list(QUEUES))
def agent(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    site = tmp_path / "it's a site"
    (site / "qsubmit").mkdir(parents=True)
    for name, value in batch_system.install(tmp_path / "batch", KINDS[request.param]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BALSAM_SITE_PATH", str(site))
    made = Agent(site, request.param)
    yield made
    for job in (json.loads(path.read_text()) for path in (tmp_path / "batch" / "jobs").glob("*.json")):
        (tmp_path / "batch" / f"{job['id']}.delete").touch()


def launcher(text: str) -> Path:
    path = Path(os.environ["BALSAM_SITE_PATH"]) / "launcher"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_batch_job_is_submitted_runs_and_ends_with_its_times_known(agent: Agent) -> None:
    site = launcher('printf "%s\\n" "$@" > words; env > environment; until [ -e end ]; do sleep 0.1; done').parent
    agent.until(lambda: agent.job.state == "running")
    (status,) = agent.record.queued_jobs.values()
    assert (status.queue, status.num_nodes, status.wall_time_min) == (
        agent.job.queue,
        2,
        90,
    )  # not where it was routed to
    agent.until((site / "environment").exists)
    (site / "end").touch()
    agent.until(lambda: agent.job.state == "finished")
    assert agent.job.end_time >= agent.job.start_time
    assert (site / "words").read_text().split("\n")[:6] == ["-j", "mpi", "-t", "90", "--tag", "search=it's"]
    assert f"BALSAM_SITE_PATH={site}" in (site / "environment").read_text()


def test_the_launcher_finds_its_nodes_and_its_batch_job_in_the_environment(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = launcher(
        "env -0 > environment.new; cp ${PBS_NODEFILE:-/dev/null} nodes; mv environment.new environment"
    ).parent
    agent.until((site / "environment").exists)
    text = (site / "environment").read_text()
    for name, _, value in (entry.partition("=") for entry in text.split("\0")):
        if name.startswith(("COBALT_", "PBS_")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("PBS_NODEFILE", str(site / "nodes"))
    config = "polaris-pbs" if (site / "nodes").read_text() else "theta-knl-cobalt"
    node_class = Settings(**yaml.safe_load(site_config(config).settings_text())).launcher.compute_node
    assert len({node.hostname for node in node_class.get_job_nodelist()}) == 2
    assert len(node_class.get_job_nodelist()) == 2
    assert node_class.get_scheduler_id() == agent.job.scheduler_id


def test_a_batch_job_that_is_deleted_ends_in_order(agent: Agent) -> None:
    site = launcher("trap 'echo handed back > told; exit 0' TERM; touch ready; while true; do sleep 0.1; done").parent
    agent.until((site / "ready").exists)
    agent.job.state = "pending_deletion"
    agent.until(lambda: agent.job.state == "finished")
    assert (site / "told").read_text() == "handed back\n"


def test_neither_an_unknown_state_nor_a_server_that_is_away_ends_a_batch_job(agent: Agent, tmp_path: Path) -> None:
    site = launcher("touch ready; until [ -e end ]; do sleep 0.1; done").parent
    agent.until(lambda: agent.job.state == "running")
    states = tmp_path / "batch" / "states.json"
    states.write_text(json.dumps({str(agent.job.scheduler_id): "Z9"}))
    for _ in range(3):
        agent.service.run_cycle()
        assert agent.job.state == "running"
    (tmp_path / "batch" / "down").touch()
    for _ in range(3):
        agent.service.run_cycle()
        assert agent.job.state == "running"
    (tmp_path / "batch" / "down").unlink()
    states.unlink()
    (site / "end").touch()
    agent.until(lambda: agent.job.state == "finished")


def test_a_launcher_that_cannot_start_is_told_from_an_allocation_that_ran(agent: Agent) -> None:
    launcher("echo no such module; exit 7")
    agent.until(lambda: agent.job.state == "submit_failed")
    output = Path(agent.job.status_info["submit_script"]).with_suffix(".output")
    assert "no such module" in output.read_text()
