"""Driver and launcher inside one allocation of Cobalt and PBS, played by processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deephyper_balsam.resources import folder
from deephyper_balsam.sites.local import LocalStack

from .machines import machine
from .waiting import wait_for

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
import batch_system

pytestmark = pytest.mark.live

RUN = """
import os
def run(job):
    rank = os.environ.get("PMI_RANK", os.environ.get("ALPS_APP_PE"))
    return {"objective": -job["x"] ** 2, "metadata": {"rank": rank}}
"""
COMMON = ["--problem", "problem.py", "--run", "run.py", "--method", "random", "--max-evals", "4"]


def script_command(kind: str, queue: str, name: str, site: Path, client: str) -> list[str]:
    """The line that the job script's own comment shows."""
    script = str(folder("jobscripts") / f"{kind}.sh")
    if kind == "cobalt":
        variables = f"BALSAM_SITE_PATH={site}:MINUTES=10:BALSAM_CLIENT_PATH={client}"
        asked = ["-A", "datascience", "-q", queue, "-n", "2", "-t", "10", "-o", "script.out", "--env", variables]
        return ["qsub", *asked, script, name, *COMMON]
    variables = f'BALSAM_SITE_PATH={site},SEARCH="{name} {" ".join(COMMON)}",MINUTES=10,BALSAM_CLIENT_PATH={client}'
    wanted = ["-l", "select=2:system=polaris", "-l", "walltime=00:10:00", "-l", "filesystems=home:eagle"]
    return ["qsub", "-A", "datascience", "-q", queue, *wanted, "-o", "script.out", "-v", variables, script]


@pytest.mark.parametrize(
    ("config", "kind", "queue"), [("theta-knl-cobalt", "cobalt", "default"), ("polaris-pbs", "pbs", "prod")]
)
def test_a_search_runs_inside_an_allocation_by_job_script_and_by_submit(
    config: str, kind: str, queue: str, stack: LocalStack, tmp_path: Path
) -> None:
    system = batch_system.install(tmp_path / "batch", kind)
    with machine(config, f"inside-{kind}", stack, tmp_path, system, RUN, project="datascience") as here:
        try:
            wait_for(lambda: here.gateway.site(here.site.name)["allowed_queues"], "the agent's word on queues")
            by_script, by_submit = f"script-{kind}", f"submit-{kind}"
            command = script_command(kind, queue, by_script, here.site.path, stack.env["BALSAM_CLIENT_PATH"])
            queued = here.call(*command)
            assert queued.returncode == 0, queued.stderr
            options = ["--site", here.site.name, "-n", "2", "-t", "10", "-q", queue, "-A", "datascience"]
            submitted = here.search("submit", by_submit, *COMMON, *options)
            assert submitted.returncode == 0, submitted.stderr
            rows = {
                name: wait_for(
                    lambda name=name: [
                        row
                        for row in here.gateway.batch_jobs([here.site.id], ["finished", "submit_failed"])
                        if row["filter_tags"] == {"search": name}
                    ],
                    f"the end of {name}",
                )
                for name in (by_script, by_submit)
            }
            for name in rows:
                [row] = rows[name]
                assert here.gathered(name) == [0, 1, 2, 3], here.logs()
                assert (row["state"], row["num_nodes"]) == ("finished", 2), here.logs()
                # Each was started by the machine's own launcher
                trials = here.gateway.jobs({"search": name})
                assert {trial["data"]["result"]["metadata"]["rank"] for trial in trials} == {"0"}
            assert "4 done" in (tmp_path / "script.out").read_text()
        finally:
            for path in (tmp_path / "batch" / "jobs").glob("*.json"):
                (tmp_path / "batch" / f"{path.stem}.delete").touch()
