"""One search over two real local sites, one of which is killed in the middle."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deephyper_balsam import BalsamEvaluator, HpProblem, Resources
from deephyper_balsam.common import processes
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import Search
from deephyper_balsam.monitor import liveness
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.sites.configs import site_config
from deephyper_balsam.store import allocations
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.trial import TrialState

from .conftest import stack_environment
from .waiting import wait_for

pytestmark = pytest.mark.live

RUN = """
import os, pathlib, time
HERE = pathlib.Path(__file__).parent
def note(what):
    with open(HERE / "calls.txt", "a") as calls:
        print(what, flush=True, file=calls)
def run(job):
    note(f"begin {job.id}")
    time.sleep(0.5)
    while (HERE / "hold").exists() and "second site" in os.getcwd():
        time.sleep(0.1)
    note(f"end {job.id}")
    return job["x"]
"""


NODES = """
from deephyper_balsam.sites.local import LocalNode
class ThreeNodes(LocalNode):
    @classmethod
    def get_job_nodelist(cls):
        [node] = super().get_job_nodelist()
        return [cls(f"node-{number}", node.hostname, gpu_ids=[]) for number in range(3)]
"""
SIZES = """
import time
def resources(config):
    from deephyper_balsam import Resources
    return Resources(num_nodes=config["nodes"])
def run(job):
    time.sleep(0.7)
    return job["nodes"]
"""


class SecondSite:
    """A site beside the stack's own, with its own agent."""

    def __init__(self, stack: LocalStack, folder: Path, config: str = "local") -> None:
        self.path, self.name = folder / "second site", f"second-{folder.name[-8:]}"
        environment = stack_environment(stack)
        command = [sys.executable, "-m", "deephyper_balsam", "site", "init", str(self.path), "--config", config]
        environment["PYTHONPATH"] = str(folder)  # where a node class of the test's own is found
        subprocess.run([*command, "--name", self.name], env=environment, check=True, capture_output=True)
        with open(folder / "agent.log", "w", encoding="utf-8") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "balsam.site.service.main"],
                cwd=self.path,
                env={**environment, "BALSAM_SITE_PATH": str(self.path)},
                stdout=log,
                stderr=log,
            )

    def kill(self) -> int:
        """Kill everything of the site at once, as when its machine loses power; how many processes."""
        found = processes.matching(processes.carries("BALSAM_SITE_PATH", str(self.path)))
        for process in found:
            processes.send(process, signal.SIGKILL)
        self.agent.wait()
        return len(found)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="live sites "))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@contextmanager
def site_beside(stack: LocalStack, folder: Path, config: str = "local") -> Iterator[SecondSite]:
    made = SecondSite(stack, folder, config)
    yield made
    made.kill()
    wait_for(lambda: not processes.matching(processes.carries("BALSAM_SITE_PATH", str(made.path))), "all to be dead")
    gateway = Gateway(stack.client_path)
    for site in gateway.sites():
        if site["name"] == made.name:
            gateway.delete_site(site["id"])


@pytest.fixture
def second(stack: LocalStack, folder: Path) -> Iterator[SecondSite]:
    with site_beside(stack, folder) as made:
        yield made


@pytest.fixture
def of_three_nodes(stack: LocalStack, folder: Path) -> Iterator[SecondSite]:
    """A site whose allocations have up to three virtual nodes of this machine."""
    config = folder / "config"
    shutil.copytree(site_config("local").path, config)
    settings = (config / "settings.yml").read_text()
    changed = settings.replace("deephyper_balsam.sites.local.LocalNode", "three_nodes.ThreeNodes")
    (config / "settings.yml").write_text(changed.replace("max_nodes: 1", "max_nodes: 3"))
    (folder / "three_nodes.py").write_text(NODES)
    with site_beside(stack, folder, str(config)) as made:
        yield made


def test_two_sites_share_a_search_and_one_ends_it_when_the_other_is_killed(
    stack: LocalStack, second: SecondSite, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, seconds in (
        (liveness, "_LOOK_S", 1.0),
        (liveness, "_SILENT_S", 6.0),
        (allocations, "SILENT_LAUNCHER_S", 8.0),
    ):
        monkeypatch.setattr(module, name, seconds)  # nobody waits for minutes here
    (folder / "line_run.py").write_text(RUN)
    problem = HpProblem("line")
    problem.add_hyperparameter((-3.0, 3.0), "x")
    evaluator = BalsamEvaluator(
        f"{folder / 'line_run.py'}:run",
        ["local", second.name],
        resources=Resources(evals_per_node=2),
        allocation=AllocationRequest(1, wall_time_min=10),
        client_path=stack.client_path,
    )
    notices: list[str] = []
    held: list[list[int]] = []
    cut: list[int] = []

    def at(site: str, state: TrialState) -> list[int]:
        return [ln["job_id"] for ln in evaluator.lines if (ln["m:site"], ln["job_status"]) == (site, state.value)]

    def kill_when_both_are_used(progress: Progress) -> None:
        if progress.notice is not None and (not notices or notices[-1] != progress.notice):
            notices.append(progress.notice)
        if cut or not at("local", TrialState.DONE) or not at(second.name, TrialState.DONE):
            return
        (folder / "hold").touch()
        running = at(second.name, TrialState.RUNNING)
        held.append(running if len(running) == 2 else [])
        if len(held) >= 10 and held[-1] and all(before == held[-1] for before in held[-10:]):  # none is just ending
            cut.extend(running)
            assert second.kill() > 2

    search = Search(problem, evaluator, f"two-{second.name}", "random", seed=3, log_dir=folder, poll_s=0.2)
    frame = search.search(max_evals=24, on_progress=kill_when_both_are_used)

    assert len(cut) == 2
    assert list(frame["job_status"]) == ["DONE"] * 24
    assert set(frame["m:site"]) == {"local", second.name}
    assert set(frame.loc[cut, "m:site"]) == {"local"}
    assert set(frame.loc[cut, "m:moved_from"]) == {second.name}
    assert any(f"the agent of site {second.name} has given no sign" in said for said in notices), notices
    calls = Counter((folder / "calls.txt").read_text().splitlines())
    assert {calls[f"end {number}"] for number in range(24)} == {1}  # each evaluated once
    assert {number for number in range(24) if calls[f"begin {number}"] == 2} == set(cut)
    gateway = Gateway(stack.client_path)
    ours = {row["id"] for row in gateway.batch_jobs([gateway.site("local")["id"]])}
    rows = {int(row["tags"]["trial"]): row for row in gateway.jobs({"search": search.name})}
    assert len(rows) == 24
    assert {rows[number]["batch_job_id"] for number in cut} <= ours


def test_a_hyperparameter_chooses_the_nodes_and_what_is_too_large_fails_with_its_reason(
    stack: LocalStack, of_three_nodes: SecondSite, folder: Path
) -> None:
    (folder / "sizes.py").write_text(SIZES)
    problem = HpProblem("sizes")
    problem.add_hyperparameter((1, 4), "nodes")
    problem.add_hyperparameter((0.0, 1.0), "x")
    evaluator = BalsamEvaluator(
        f"{folder / 'sizes.py'}:run",
        of_three_nodes.name,
        resources=f"{folder / 'sizes.py'}:resources",
        allocation=AllocationRequest(3, wall_time_min=10),
        client_path=stack.client_path,
    )
    name = f"sizes-{of_three_nodes.name}"
    Search(problem, evaluator, name, "random", seed=5, log_dir=folder, poll_s=0.2, max_failures=0).search(max_evals=4)
    later = Search.resume(name, log_dir=folder / "empty", client_path=stack.client_path, poll_s=0.2)
    frame = later.search(max_evals=10)

    too_large = frame["p:nodes"] == 4
    assert 0 < too_large.sum() < len(frame) == 10
    assert set(frame["m:failure"][too_large]) == {
        "it asks for 4 nodes, and no allocation gives an evaluation more than 3"
    }
    done = frame[~too_large]
    assert set(done["job_status"]) == {"DONE"}
    assert set(done["p:nodes"]) == {1, 2, 3}
    rows = {int(row["tags"]["trial"]): row for row in Gateway(stack.client_path).jobs({"search": name})}
    assert {rows[n]["num_nodes"] == nodes for n, nodes in zip(done["job_id"], done["p:nodes"], strict=True)} == {True}
    for moment in done["m:timestamp_start"]:
        under_way = done[(done["m:timestamp_start"] <= moment) & (moment < done["m:timestamp_end"])]
        assert under_way["p:nodes"].sum() <= 3
