"""What is known of a local stack: the record in `stack.json`, and what `server status` tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from deephyper_balsam.common.private import write_private
from deephyper_balsam.common.process_id import ProcessId
from deephyper_balsam.sites.configs import Site
from deephyper_balsam.store import sockets

SOCKET = "api.sock"
"""The API's socket, in the folder that the record names."""


@dataclass(frozen=True)
class Waits:
    """How many seconds something may take, before it counts as failed.

    Attributes
    ----------
    lock_s
        Until another command lets go of the stack.
    start_s, stop_s
        Until a process of the stack is there, or gone.
    answer_s
        Until the API answers a request of ours.
    busy_s
        Until an API that does not answer counts as dead.
    settle_s
        Until something that does not change any more counts as done.
    look_s
        Between two looks at the site's agent, which is started again when it is dead at both.
    sign_s
        Between two signs of life of a stack that runs.
    fence_s
        Without a sign of life that got through, until a host stops its own PostgreSQL.
    gone_s
        Without a sign of life, until a host counts as gone and another takes its stack over: more than `fence_s`.
    let_go_s
        Until a host that was taken over by a person's word has had the time to stop.
    """

    lock_s: float = 180.0
    start_s: float = 60.0
    stop_s: float = 15.0
    answer_s: float = 10.0
    busy_s: float = 60.0
    settle_s: float = 0.3
    look_s: float = 15.0
    sign_s: float = 2.0
    fence_s: float = 40.0
    gone_s: float = 60.0
    let_go_s: float = 10.0


@dataclass(frozen=True)
class ProcessStatus:
    """One process of the stack: its name, its pid while it runs, its log, and what is wrong though it runs."""

    name: str
    pid: int | None
    log: Path
    fault: str | None = None

    @property
    def running(self) -> bool:
        """Whether it runs and does its work."""
        return self.pid is not None and self.fault is None


@dataclass(frozen=True)
class StackStatus:
    """What of a stack runs, and how to reach it.

    Attributes
    ----------
    folder
        The stack's folder.
    url
        The API's address, or None before the first `up`.
    reason
        How the address for other hosts was chosen; None where they do not reach the API.
    env
        The variables that point Balsam's own command line at the stack.
    processes
        PostgreSQL, the API, and the agent when there is a site.
    site
        The site, or None.
    launchers
        How many BatchJobs run.
    elsewhere
        The other host that runs it, with its process; None: none does.
    """

    folder: Path
    url: str | None
    reason: str | None
    env: Mapping[str, str]
    processes: tuple[ProcessStatus, ...]
    site: Site | None
    launchers: int
    elsewhere: str | None = None

    @property
    def running(self) -> bool:
        """Whether every part of the stack runs."""
        return bool(self.processes) and all(process.running for process in self.processes)

    @property
    def stopped(self) -> bool:
        """Whether no part of the stack runs."""
        return not self.launchers and all(process.pid is None for process in self.processes)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``server status --json`` shows."""
        site = None if self.site is None else {"id": self.site.id, "name": self.site.name, "path": str(self.site.path)}
        return {
            "folder": str(self.folder),
            "url": self.url,
            "address_reason": self.reason,
            "env": dict(self.env),
            "running": self.running,
            "processes": [{**asdict(item), "log": str(item.log), "running": item.running} for item in self.processes],
            "site": site,
            "launchers": self.launchers,
            "elsewhere": self.elsewhere,
        }


@dataclass
class State:
    """What `stack.json` keeps. The processes are known by pid and start time.

    `listen` is what `server up --listen` was given, `address`, `port` and `reason` what became of it: see `Address`.
    `data` is what `server up --data` was given, None for the stack's folder; `data_dir` is where the data is then.
    """

    api_dir: str | None = None
    processes: dict[str, ProcessId] = field(default_factory=dict)
    socket_dir: str | None = None
    site_name: str | None = None
    site_config: str | None = None
    host: str | None = None
    folder: str | None = None
    agent_services: int = 0
    listen: str | None = None
    address: str | None = None
    port: int | None = None
    reason: str | None = None
    data: str | None = None
    data_dir: str | None = None

    @property
    def url(self) -> str | None:
        """By which clients find the API: an address, or its socket; None before the first start."""
        if self.address is not None:
            host = f"[{self.address}]" if ":" in self.address else self.address
            return f"https://{host}:{self.port}"
        return None if self.socket is None else sockets.url_of(self.socket)

    @property
    def socket(self) -> Path | None:
        """Where the API listens; None before the first start."""
        return None if self.api_dir is None else Path(self.api_dir) / SOCKET

    @classmethod
    def read(cls, path: Path) -> State:
        """Read the file; what is missing or broken (a crash, a full disk) counts as nothing known."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known = {name: ProcessId.from_dict(item) for name, item in data["processes"].items()}
            names = {one.name for one in fields(cls)}  # an older version kept a port
            return cls(**{**{name: value for name, value in data.items() if name in names}, "processes": known})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, path: Path) -> None:
        """Write the file under a temporary name and rename it."""
        write_private(path, json.dumps(asdict(self), indent=1))
