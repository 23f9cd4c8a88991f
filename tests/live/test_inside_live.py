"""Driver and launcher inside one allocation of Cobalt and PBS, played by processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.server.stack import LocalStack

from .machine import machine
from .waiting import wait_for

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
import batch_system

pytestmark = pytest.mark.live

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
    ("config", "kind", "queue"), [("theta-knl-cobalt", "cobalt", "default"), ("polaris-pbs", "pbs", "debug")]
)
def test_a_search_runs_inside_an_allocation_by_job_script_and_by_submit(
    config: str, kind: str, queue: str, stack: LocalStack, tmp_path: Path
) -> None:
    system = batch_system.install(tmp_path / "batch", kind)
    with machine(stack, tmp_path, config, system, queue=queue, project="datascience") as here:
        try:
            wait_for(lambda: here.gateway.site(here.site_name)["allowed_queues"], "the agent's word on queues")
            by_script, by_submit = f"script-{kind}", f"submit-{kind}"
            command = script_command(kind, queue, by_script, here.site, stack.env["BALSAM_CLIENT_PATH"])
            path = f"{Path(sys.executable).parent}{os.pathsep}{here.env['PATH']}"
            outside = {"cwd": tmp_path, "env": {**here.env, "PATH": path}, "capture_output": True, "text": True}
            queued = subprocess.run(command, **outside, timeout=120)  # type: ignore[call-overload]
            assert queued.returncode == 0, queued.stderr
            options = ["--site", here.site_name, "-n", "2", "-t", "10", "-q", queue, "-A", "datascience"]
            words = [sys.executable, "-m", "deephyper_balsam", "search", "submit", by_submit, *COMMON, *options]
            submitted = subprocess.run(words, **outside, timeout=120)  # type: ignore[call-overload]
            assert submitted.returncode == 0, submitted.stderr
            rows = {
                name: wait_for(
                    lambda name=name: [
                        row
                        for row in here.gateway.batch_jobs([here.site_id], ["finished", "submit_failed"])
                        if row["filter_tags"] == {"search": name}
                    ],
                    f"the end of {name}",
                )
                for name in (by_script, by_submit)
            }
            for name in rows:
                [row] = rows[name]
                trials = list(here.gateway.jobs({"search": name}))
                assert sorted(row["data"]["gathered"]["order"] for row in trials) == [0, 1, 2, 3], here.logs()
                assert (row["state"], row["num_nodes"]) == ("finished", 2), here.logs()
                # Each was started by the machine's own launcher
                assert {trial["data"]["result"]["metadata"]["rank"] for trial in trials} == {"0"}
            assert "4 done" in (tmp_path / "script.out").read_text()
        finally:
            for path in (tmp_path / "batch" / "jobs").glob("*.json"):
                (tmp_path / "batch" / f"{path.stem}.delete").touch()
