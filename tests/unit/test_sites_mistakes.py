"""`site check` on a real site folder with one mistake in it: one line that names it, and the exit code."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deephyper_balsam.cli import main
from deephyper_balsam.errors import NotLoggedInError, UnreachableError
from deephyper_balsam.sites import checks, configs

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
import batch_system

NOW = "2999-01-01T00:00:00"


class FakeGateway:
    """Sites in a list; made for every credentials file."""

    rows: list[dict[str, Any]]
    fails: Exception | None = None
    clock_ahead_s: float | None = None

    def __init__(self, client_path: object = None) -> None:
        if self.fails is not None:
            raise self.fails

    def sites(self) -> list[dict[str, Any]]:
        return list(self.rows)

    def create_site(self, name: str, path: str) -> int:
        self.rows.append({"id": 1, "last_refresh": NOW, "name": name, "path": path})
        return 1


@dataclass
class Site:
    """A site for PBS with which nothing is wrong, and what a mistake may change."""

    path: Path
    gateway: type[FakeGateway]
    monkeypatch: pytest.MonkeyPatch
    batch: Path
    options: list[str]
    started: list[subprocess.Popen[bytes]]

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text()
        assert old in text
        (self.path / name).write_text(text.replace(old, new))

    def clock(self, skew_s: float) -> None:
        self.gateway.clock_ahead_s = skew_s

    def check(self) -> Result:
        return CliRunner().invoke(main, ["site", "check", str(self.path), *self.options])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    fake = type("Fake", (FakeGateway,), {"rows": []})
    monkeypatch.setattr(configs, "Gateway", fake)
    monkeypatch.setattr(checks, "Gateway", fake)
    for name, value in batch_system.install(tmp_path / "batch", "pbs").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "client.yml").write_text("api_root: http://api.example\n")
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(tmp_path / "client.yml"))
    made = configs.init_site(tmp_path / "a site", "polaris-pbs", "polaris", project="datascience")
    # An agent without children: this process has some, and those of other tests that ended
    agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    (made.path / "balsam-service.pid").write_text(f"{socket.gethostname()}\n{agent.pid}")
    found = Site(made.path, fake, monkeypatch, tmp_path / "batch", [], [agent])
    found.clock(0)
    yield found
    for process in found.started:
        process.kill()
        process.communicate()


def silent_agent_elsewhere(site: Site) -> None:
    (site.path / "balsam-service.pid").write_text("login9\n1")
    site.gateway.rows[0]["last_refresh"] = "2026-01-01T00:00:00"


def agent_without_its_python(site: Site) -> None:
    python = site.path.parent / "python"
    python.symlink_to(sys.executable)
    agent = subprocess.Popen(
        [str(python), "-c", "import time; print(1, flush=True); time.sleep(300)"], stdout=subprocess.PIPE
    )
    site.started.append(agent)
    assert agent.stdout is not None
    agent.stdout.readline()
    (site.path / "balsam-service.pid").write_text(f"{socket.gethostname()}\n{agent.pid}")
    python.unlink()


def unwritable(site: Site) -> None:
    (site.path / "qsubmit").rmdir()
    (site.path / "qsubmit").symlink_to("/proc/self")  # not writable for root either


# What is done to a good site; the check that fails; the words of its line
MISTAKES: dict[str, tuple[Callable[[Site], object], str, tuple[str, ...]]] = {
    "a command of the scheduler is missing": (
        lambda site: (site.batch / "bin" / "qdel").unlink(),
        "commands",
        ("not found on this machine: qdel",),
    ),
    "the project is not filled in": (
        lambda site: site.edit("settings.yml", "datascience", "YOUR_PROJECT"),
        "names",
        ("fill in YOUR_PROJECT in", "settings.yml"),
    ),
    "no queue is allowed": (
        lambda site: site.edit("settings.yml", "allowed_projects:\n    - datascience", "allowed_projects: []"),
        "names",
        ("settings.yml allows no queue or no project",),
    ),
    "a queue that the scheduler does not have": (
        lambda site: site.edit("settings.yml", "        debug:", "        debugg:"),
        "names",
        ("the scheduler has no queue debugg", "allowed_queues"),
    ),
    "a package is missing in the site's environment": (
        lambda site: site.options.extend(["--import", "no_such_package"]),
        "packages",
        (f"cannot be imported by {sys.executable}: no_such_package",),
    ),
    "no route to the API": (
        lambda site: setattr(site.gateway, "fails", UnreachableError("Balsam does not answer at http://api.example")),
        "api",
        ("does not answer at http://api.example",),
    ),
    "the login has expired": (
        lambda site: setattr(site.gateway, "fails", NotLoggedInError("The login has expired. Run `balsam login`.")),
        "api",
        ("Run `balsam login`",),
    ),
    "Balsam does not know the site": (
        lambda site: site.gateway.rows.clear(),
        "api",
        ("no site of yours with id 1",),
    ),
    "the folder was moved": (
        lambda site: site.gateway.rows[0].update(path="/old/place"),
        "api",
        ("polaris in /old/place, not in",),
    ),
    "the clock is wrong": (
        lambda site: site.clock(-300),
        "clock",
        ("s ahead of the API's: set it by NTP",),
    ),
    "a folder cannot be written": (unwritable, "folders", ("missing or not writable in", "qsubmit")),
    "the template is missing": (
        lambda site: (site.path / "job-template.sh").unlink(),
        "template",
        ("job-template.sh does not exist",),
    ),
    "the template has a mistake": (
        lambda site: site.edit("job-template.sh", "{{ num_nodes }}", "{{ num_nodes"),
        "template",
        ("job-template.sh cannot be filled: TemplateSyntaxError",),
    ),
    "the template makes no script": (
        lambda site: site.edit("job-template.sh", "|| exit 1", "|| { exit 1"),
        "template",
        ("job-template.sh makes no script for bash", "syntax error"),
    ),
    "the settings are no YAML": (
        lambda site: site.edit("settings.yml", "launcher:", "launcher: ["),
        "settings",
        ("settings.yml is not YAML", "line"),
    ),
    "the settings name a class that is not there": (
        lambda site: site.edit("settings.yml", "pbs.PolarisNode", "pbs.PolarisNod"),
        "settings",
        ("settings.yml: ", "PolarisNod"),
    ),
    "the agent does not run": (
        lambda site: (site.path / "balsam-service.pid").unlink(),
        "agent",
        ("the agent does not run: start it with `balsam site start`",),
    ),
    "the agent was killed": (
        lambda site: (site.path / "balsam-service.pid").write_text(f"{socket.gethostname()}\n{2**22 + 1}"),
        "agent",
        ("is gone: remove", "`balsam site start`"),
    ),
    "the agent's Python is gone": (
        agent_without_its_python,
        "agent",
        ("the agent's Python", "is gone", "`balsam site start`"),
    ),
    "the agent of another host is silent": (
        silent_agent_elsewhere,
        "agent",
        ("the agent on login9 was last heard of", "`balsam site start`"),
    ),
}


def test_a_site_without_a_mistake_passes(site: Site) -> None:
    result = site.check()
    assert result.exit_code == 0, result.output
    assert "FAILED" not in result.output


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_names_the_mistake(site: Site, mistake: str) -> None:
    make, name, words = MISTAKES[mistake]
    make(site)
    result = site.check()
    assert result.exit_code == 3
    (line,) = (line for line in result.output.splitlines() if line.startswith("FAILED"))
    assert line.split()[1] == name
    for word in words:
        assert word in line
    assert f"is not ready: {name}." in result.output
