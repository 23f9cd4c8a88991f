"""The site of a local stack and Balsam's agent for it: made, started, looked after, ended with its launchers."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from pathlib import Path

import psutil

from deephyper_balsam.common import processes
from deephyper_balsam.common.process_id import ProcessId
from deephyper_balsam.common.processes import tail
from deephyper_balsam.errors import BalsamError, InputError, ServerError
from deephyper_balsam.server import parts
from deephyper_balsam.server.credentials import Credentials
from deephyper_balsam.server.stack_folder import StackFolder
from deephyper_balsam.server.stack_state import State
from deephyper_balsam.sites.agent import PID_FILE, dead_parts, fault_of, is_ending
from deephyper_balsam.sites.configs import SITE_ID_FILE, Site, check_config, forget_site, init_site, site_config
from deephyper_balsam.sites.local_batch import STOP_GRACE_S, BatchJobs
from deephyper_balsam.store.gateway import Gateway

_ALLOCATIONS_END_S = 120.0
_POLL_S = 0.05


_LOCAL = "local"


@dataclass(frozen=True)
class NewSite:
    """What a stack's site is made of, when it has none.

    Attributes
    ----------
    config
        A name from `site_configs`, or the path of a folder like those; None: this machine.
    name
        The site's name in Balsam; None: that of the config.
    project, queue
        What the config leaves to its user.
    """

    config: str | None = None
    name: str | None = None
    project: str | None = None
    queue: str | None = None

    def check(self) -> None:
        """Check that a site can be made of it.

        Raises
        ------
        InputError
            When the config is unknown, or project and queue do not fit it.
        """
        check_config(self.config or _LOCAL, project=self.project, queue=self.queue)


class Condition(Enum):
    """How the agent of a local stack does."""

    WHOLE = auto()
    """It does its work, or was stopped."""
    ENDING = auto()
    """It is being stopped: services have ended in order, its main process not yet."""
    DEAD = auto()
    """It died, or one of its services did."""


class SiteAgent:
    """The stack's site.

    Parameters
    ----------
    files
        The stack's folder.
    credentials
        Its secrets.
    """

    def __init__(self, files: StackFolder, credentials: Credentials) -> None:
        self._files, self._credentials = files, credentials

    def site(self) -> Site | None:
        """Return the stack's site, or None when it has none."""
        try:
            site_id = int((self._files.site_path / SITE_ID_FILE).read_text())
        except (OSError, ValueError):
            return None
        return Site(site_id, self._files.state().site_name or _LOCAL, self._files.site_path)

    @property
    def jobs(self) -> BatchJobs:
        """The site's BatchJobs."""
        return BatchJobs(self._files.site_path)

    def up(self, state: State, new: NewSite, env: Mapping[str, str], *, restart: bool) -> None:
        """Make the site if there is none, and start its agent if it does not run, or not as it should.

        Parameters
        ----------
        state
            The record, which is kept up.
        new
            What the site is made of.
        env
            The variables that point Balsam at the stack.
        restart
            Start the agent anew in any case.

        Raises
        ------
        InputError
            When there is a site of another config.
        ServerError
            When the agent does not start; the message has the end of its log.
        """
        config = state.site_config or _LOCAL
        if self.site() is None:
            if self._files.site_path.exists():
                shutil.rmtree(self._files.site_path)  # a start that was cut: Balsam does not know it
            self._new_site(state, new)
        elif new.config is not None and site_config(new.config).name != config:
            raise InputError(
                f"The stack in {self._files.path} has a site of the config {config}, and {new.config} is another. Use "
                f"another folder for that, or name no config to go on with {config}."
            )
        elif state.folder != str(self._files.path):
            Gateway(self._files.client_path).move_site(self._site_id, str(self._files.site_path))
        state.folder = str(self._files.path)
        main, fault = self.find(state)
        if main is not None and fault is None and not restart:
            self._record(state, main)
            return
        if fault is not None:
            self._files.say(f"The site's agent ran, but {fault}: it is started again.")
        elif main is None and "agent" in state.processes:
            self._files.say("The site's agent had ended: it is started again.")
        parts.stop(state, "agent", self._processes(state), self._files.waits.stop_s)
        self._free_jobs(state)
        self._start(state, env)

    def down(self, state: State, *, orderly: bool) -> None:
        """End the launchers and the agent.

        Parameters
        ----------
        state
            The record, from which the agent is removed.
        orderly
            Whether the API still takes the last states of launchers; without it they would try for minutes to reach it.
        """
        if self.site() is None:
            return
        from concurrent.futures import ThreadPoolExecutor

        if orderly and (state.site_config or _LOCAL) != _LOCAL and self.find(state)[0] is not None:
            self._see_allocations_end()
        found = self._processes(state)
        for process in found[:1]:
            processes.send(process, signal.SIGTERM)
        jobs = self.jobs.running()
        if jobs:
            with ThreadPoolExecutor(len(jobs)) as pool:
                list(pool.map(lambda job: self.jobs.stop(job, STOP_GRACE_S if orderly else 1.0), jobs))
        parts.stop(state, "agent", found, self._files.waits.stop_s if orderly else 1.0)
        (self._files.site_path / PID_FILE).unlink(missing_ok=True)
        self.jobs.sweep()

    def _see_allocations_end(self) -> None:
        """Let the agent end what it was asked to: without a server a launcher keeps its nodes, trying to reach it."""
        gateway, until, said = Gateway(self._files.client_path), time.monotonic() + _ALLOCATIONS_END_S, ""
        while True:
            try:
                left = [row["id"] for row in gateway.batch_jobs([self._site_id], ["pending_deletion"])]
            except BalsamError as error:
                self._files.say(f"Balsam does not say which allocations are still to be ended ({error}).")
                return
            if not left:
                return
            names = ", ".join(f"BatchJob {one}" for one in left)
            if time.monotonic() > until:
                self._files.say(
                    f"The site's agent did not end {names}: look into the scheduler's queue, and cancel it there."
                )
                return
            if names != said:
                self._files.say(f"Waiting until the scheduler has ended {names}, as was asked.")
                said = names
            time.sleep(self._files.waits.settle_s)

    def find(self, state: State) -> tuple[psutil.Process | None, str | None]:
        """Return the agent, and what is wrong with it: one of whose services died only looks alive.

        Parameters
        ----------
        state
            The record.

        Returns
        -------
        tuple
            Its main process, or None; and what keeps it from its work, or None.
        """
        recorded = state.processes.get("agent")
        main = recorded.find() if recorded is not None else None
        if main is None:
            main = next(iter(self._processes(state)), None)
        if main is None:
            return None, None
        if main.pid != self._pid():
            return main, f"{self._files.site_path / PID_FILE} names another process"
        return main, fault_of(main, state.agent_services)

    def condition(self, state: State) -> Condition:
        """Return how the agent does that was started last; one that has ended in order has removed its pid file.

        Parameters
        ----------
        state
            The record.
        """
        recorded = state.processes.get("agent")
        if recorded is None or self._pid() != recorded.pid:
            return Condition.WHOLE
        main = recorded.find()
        if main is None:
            return Condition.DEAD
        if not dead_parts(main, state.agent_services):
            return Condition.WHOLE
        return Condition.ENDING if is_ending(main) else Condition.DEAD

    @property
    def _site_id(self) -> int:
        site = self.site()
        assert site is not None
        return site.id

    def _free_jobs(self, state: State) -> None:
        """Delete the sessions that a killed agent or launcher left: Balsam would keep their jobs for five minutes.

        Launchers of a batch system run on other machines: their driver sees which are gone.
        """
        kept = (state.site_config or _LOCAL) != _LOCAL or bool(self._local_launchers())
        if not kept:
            self.jobs.sweep()
        path = state.socket
        assert path is not None
        token = str(self._credentials.client_settings().get("token"))
        code, answer = self._credentials.ask(path, "GET", "/sessions/", token=token)
        if code != HTTPStatus.OK:
            self._files.say(
                f"Balsam does not say what ran when the stack ended (HTTP {code}): that starts again in five minutes."
            )
            return
        for session in answer["results"]:
            is_agents = session.get("batch_job_id") is None  # and the agent is stopped here
            if session["site_id"] == self._site_id and (is_agents or not kept):
                self._credentials.ask(path, "DELETE", f"/sessions/{session['id']}", token=token)

    def _local_launchers(self) -> list[psutil.Process]:
        return processes.matching(processes.carries("BALSAM_SITE_PATH", str(self._files.site_path), "_mode.py"))

    def _new_site(self, state: State, new: NewSite) -> None:
        config = site_config(new.config or _LOCAL)
        name = new.name or config.name
        arguments = (self._files.site_path, config, name, self._files.client_path)
        try:
            site = init_site(*arguments, project=new.project, queue=new.queue)
        except InputError:
            if not forget_site(name, self._files.site_path, self._files.client_path):
                raise
            site = init_site(*arguments, project=new.project, queue=new.queue)
        _close_to_others(self._files.site_path)
        state.site_name, state.site_config = site.name, config.name
        self._files.save(state)

    def _record(self, state: State, main: psutil.Process) -> None:
        """Remember the agent, which `balsam site sync` may have started anew."""
        found = ProcessId.of(main.pid)
        if found is not None and state.processes.get("agent") != found:
            state.processes["agent"] = found
        self._files.save(state)

    def _processes(self, state: State) -> list[psutil.Process]:
        found = parts.find(state, "agent", "BALSAM_SITE_PATH", self._files.site_path, "balsam.site.service.main")
        main = self._pid()
        return sorted(found, key=lambda process: process.pid != main)

    def _pid(self) -> int | None:
        try:
            return int((self._files.site_path / PID_FILE).read_text().split()[-1])
        except (OSError, ValueError, IndexError):
            return None

    def _start(self, state: State, env: Mapping[str, str]) -> None:
        (self._files.site_path / PID_FILE).unlink(missing_ok=True)
        log = self._files.logs / "agent.log"
        child, state.processes["agent"] = processes.start(
            [sys.executable, "-m", "balsam.site.service.main"],
            cwd=self._files.site_path,
            env=self._files.environment(**env),
            log=log,
        )
        self._files.save(state)
        deadline = time.monotonic() + self._files.waits.start_s
        services, since = 0, time.monotonic()
        while services == 0 or time.monotonic() - since < self._files.waits.settle_s:
            if child.poll() is not None:
                raise ServerError(f"The site's agent ended with exit code {child.returncode}. {tail(log)}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The site's agent did not start within {self._files.waits.start_s:.0f} s. {tail(log)}"
                )
            time.sleep(_POLL_S)
            seen = _count_children(psutil.Process(child.pid)) if self._pid() == child.pid else 0
            if seen != services:
                services, since = seen, time.monotonic()
        state.agent_services = services
        self._files.save(state)


def _close_to_others(folder: Path) -> None:
    """Take from others what Balsam gave them under a generous umask."""
    for above, _, files in os.walk(folder):
        for path in (above, *(os.path.join(above, name) for name in files)):
            if not os.path.islink(path):
                os.chmod(path, os.stat(path).st_mode & 0o700)


def _count_children(process: psutil.Process) -> int:
    try:
        children = process.children()
        return sum(child.status() != psutil.STATUS_ZOMBIE for child in children)
    except psutil.Error:
        return 0
