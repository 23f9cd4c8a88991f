"""Searches through Cobalt and PBS played by processes: real agent, job template, launcher, `aprun`, `mpiexec`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deephyper_balsam.gateway import Gateway
from deephyper_balsam.sites.configs import init_site
from deephyper_balsam.sites.local import LocalStack

from .conftest import stack_environment

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
import batch_system

pytestmark = pytest.mark.live

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
RUN = """
import os
def run(job):
    rank = os.environ.get("PMI_RANK", os.environ.get("ALPS_APP_PE"))
    return {"objective": -job["x"] ** 2, "metadata": {"rank": rank}}
"""


@pytest.mark.parametrize(
    ("config", "kind", "queue"), [("theta-knl-cobalt", "cobalt", "debug-cache-quad"), ("polaris-pbs", "pbs", "prod")]
)
def test_a_search_runs_on_two_nodes_of_a_machine_and_gives_them_back(
    config: str, kind: str, queue: str, stack: LocalStack, tmp_path: Path
) -> None:
    batch = batch_system.install(tmp_path / "batch", kind)
    env = {**stack_environment(stack), **batch}
    site = init_site(tmp_path / "a site", config, config, client_path=stack.client_path, project="datascience")
    settings = site.path / "settings.yml"
    settings.write_text(re.sub(r"sync_period: \d+", "sync_period: 1", settings.read_text()))
    template = site.path / "job-template.sh"
    template.write_text(re.sub(r"export https?_proxy.*", "", template.read_text()))  # this API is near
    (tmp_path / "problem.py").write_text(PROBLEM)
    (tmp_path / "run.py").write_text(RUN)
    with (site.path / "log" / "agent.out").open("wb") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "balsam.site.service.main"],
            cwd=site.path,
            env={**env, "BALSAM_SITE_PATH": str(site.path)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    name = f"on-{kind}"
    try:
        command = [sys.executable, "-m", "deephyper_balsam", "search", "run", name, "--problem", "problem.py"]
        command += ["--run", "run.py", "--site", config, "--method", "random", "--max-evals", "4", "--nodes", "2"]
        command += ["--wall-time-min", "10", "--queue", queue, "--project", "datascience"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
        logs = "\n".join(path.read_text()[-2000:] for path in (*site.path.glob("log/*"), *site.path.glob("qsubmit/*")))
        assert done.returncode == 0, done.stdout + done.stderr + logs
        assert "4 done" in done.stdout
        show = [sys.executable, "-m", "deephyper_balsam", "search", "results", name, "--json"]
        rows = json.loads(
            subprocess.run(show, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
        )
        assert {row["m:rank"] for row in rows} == {"0"}  # each was started by the machine's own launcher
        deadline, gateway = time.monotonic() + 90, Gateway(stack.client_path)
        while (batch_job := gateway.batch_jobs([site.id])[0])["state"] != "finished":
            assert time.monotonic() < deadline, batch_job
            time.sleep(0.3)
        assert batch_job["start_time"] is not None
        assert batch_job["end_time"] is not None
    finally:
        for path in (tmp_path / "batch" / "jobs").glob("*.json"):
            (tmp_path / "batch" / f"{path.stem}.delete").touch()
        agent.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
