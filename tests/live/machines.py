"""A Balsam site on a machine with a batch system, and its agent, for as long as a test needs them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deephyper_balsam.gateway import Gateway, Row
from deephyper_balsam.sites import chain
from deephyper_balsam.sites.configs import Site, init_site
from deephyper_balsam.sites.local import LocalStack

from .conftest import stack_environment
from .waiting import wait_for

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""


@dataclass
class Machine:
    """A site with its agent, and a folder to search in."""

    site: Site
    gateway: Gateway
    folder: Path
    env: dict[str, str]

    def call(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder, with this installation's `python` first."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"
        env = {**self.env, "PATH": path, **variables}
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=120)

    def search(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-m", "deephyper_balsam", "search", *words)

    def links(self, search: str, *states: str) -> list[Row]:
        """Return the BatchJobs with the driver of a search."""
        return chain.find(self.gateway, [self.site.id], search, states or None)

    def gathered(self, search: str) -> list[int]:
        """Return the order in which results were taken in: each number once, when none was lost or repeated."""
        rows = self.gateway.jobs({"search": search})
        return sorted(row["data"]["gathered"]["order"] for row in rows if "gathered" in row["data"])

    def logs(self) -> str:
        files = [*self.site.path.glob("log/*"), *self.site.path.glob("qsubmit/*.output"), *self.folder.glob("*.out*")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


@contextlib.contextmanager
def machine(
    config: str, name: str, stack: LocalStack, work: Path, system: Mapping[str, str], run: str, **names: str
) -> Iterator[Machine]:
    """Make a site from a config in the folder `work`, with the variables of a batch system, and run its agent."""
    site = init_site(work / "a site", config, name, client_path=stack.client_path, **names)
    settings = site.path / "settings.yml"
    settings.write_text(re.sub(r"sync_period: \d+", "sync_period: 1", settings.read_text()))
    template = site.path / "job-template.sh"
    template.write_text(re.sub(r"export https?_proxy.*", "", template.read_text()))  # this API is near
    (work / "problem.py").write_text(PROBLEM)
    (work / "run.py").write_text(run)
    env = {**stack_environment(stack), **system}
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
    try:
        wait_for((site.path / "balsam-service.pid").exists, "the site's agent")
        yield Machine(site, Gateway(stack.client_path), work, env)
    finally:
        agent.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
