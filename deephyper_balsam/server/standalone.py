"""A search with all that it needs inside one allocation: server, site, agent, launcher and driver on its first node.

Nothing runs outside. The stack's folder, on the file system that the nodes share, is all that one allocation leaves
to the next: that finds the search where it stood, also when the first node was killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deephyper_balsam.common.private import write_private
from deephyper_balsam.errors import BalsamError, InputError, SettingsError
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.sites.configs import check_config
from deephyper_balsam.store.driver_requests import STOP, read_requests
from deephyper_balsam.store.gateway import Gateway

logger = logging.getLogger(__name__)

SEARCH_FILE = "search.yaml"
"""In the stack's folder: the options of the search, where `search submit --standalone` wrote them."""

DONE = (0, 1, 2)
"""The driver's exit codes after which no other allocation is of use: done, or never to be done."""

_CUT = 130
_ALLOCATION, _QUEUED = "allocation.json", "queued.json"
_POLL_S = 0.2
_OVER_WITHIN_S = 30.0
_ENDS_S = 120.0
_LEAVE_S = 20.0  # of the end of a long allocation, for what is slower than usual


@dataclass(frozen=True)
class Allocation:
    """The batch job that this process runs in.

    Attributes
    ----------
    scheduler
        The scheduler's class, of those in `sites`.
    id
        The scheduler's number for it.
    nodes
        How many it has.
    """

    scheduler: Any
    id: int
    nodes: int

    @classmethod
    def here(cls, config: str) -> Allocation:
        """Find out.

        Parameters
        ----------
        config
            The machine's site config.

        Raises
        ------
        InputError
            When the config is unknown, or this process is in no batch job of such a machine.
        """
        settings = check_config(config).settings
        if settings.scheduler is None:
            raise SettingsError(f"The site config {config} has no scheduler.")
        node = settings.launcher.compute_node
        number = node.get_scheduler_id()
        if number is None:
            raise InputError(
                f"This is no batch job of a machine like {config}: the scheduler's id is in none of its variables. "
                "Submit a script that calls this (jobscripts/), or use `deephyper-balsam search submit --standalone`."
            )
        return cls(settings.scheduler.scheduler_class, number, len(node.get_job_nodelist()))

    def left_s(self, wall_time_min: int | None) -> float:
        """Return how many seconds it has left, by the scheduler's word and by the minutes that were given.

        Parameters
        ----------
        wall_time_min
            Its minutes, from about now on; None: the scheduler is to say.

        Raises
        ------
        InputError
            When nobody says it.
        """
        found = []
        if wall_time_min is not None:
            found.append(60.0 * wall_time_min)
        job = self._ask(self.id)
        if job is not None and job.wall_time_min and job.start_time is not None:
            found.append(job.start_time + 60.0 * job.wall_time_min - time.time())
        if not found:
            raise InputError("The scheduler does not tell how long this batch job may run: give -t, its minutes.")
        return min(found)

    def is_over(self, other: int) -> bool:
        """Return whether the scheduler says that another batch job has ended; its silence says nothing."""
        # Of a job that it does not know any more it is asked twice
        return other == self.id or any(self.scheduler.has_ended(other) for _ in range(2))

    def withdraw(self, other: int) -> None:
        """Take another batch job out of the queue."""
        from deephyper_balsam.sites.scheduling import run_command

        run_command(self.scheduler.delete_command(other))

    def _ask(self, number: int) -> Any:
        from balsam.platform.scheduler.scheduler import SchedulerNonZeroReturnCode

        with contextlib.suppress(SchedulerNonZeroReturnCode, ValueError, AttributeError):
            return self.scheduler.find(number)
        return None


class Standalone:
    """A stack that lives in one allocation after the other.

    Parameters
    ----------
    stack
        Its stack.
    search
        The search's name.
    allocation
        The one that runs now.
    stop
        Whether somebody asked to stop.
    """

    def __init__(self, stack: LocalStack, search: str, allocation: Allocation, stop: Callable[[], bool]) -> None:
        self._stack, self._search, self._allocation, self._stop = stack, search, allocation, stop

    def run(self, command: Callable[[int], Sequence[str]], ends_at: float, **site: Any) -> int:
        """Start all, wait for the search or for the end of the allocation, and end all in order.

        Parameters
        ----------
        command
            Takes the minutes that are left and returns the words for `launcher.inside` from then on.
        ends_at
            When the allocation ends, by `time.monotonic`.
        **site
            What the site is made of, as for `LocalStack.up`.

        Returns
        -------
        int
            The driver's exit code.

        Raises
        ------
        InputError
            When too little time is left, or the stack runs elsewhere.
        ServerError
            When the stack does not start.
        """
        self._stack.up(listen="auto", takeover=self._is_left(), **site)
        try:
            write_private(self._stack.folder / _ALLOCATION, json.dumps({"id": self._allocation.id}))
            gateway = Gateway(self._stack.client_path)
            self._clear(gateway)
            since = gateway.now()
            left_s = ends_at - time.monotonic()
            minutes = int((left_s - (_LEAVE_S if left_s > 600 else 0)) // 60)
            if minutes < 1:
                raise InputError(
                    f"Only {left_s:.0f} s of the allocation are left now that everything runs: ask for more minutes."
                )
            code = self._wait(command(minutes))
            over = code in DONE or self._was_stopped(gateway, since)
        finally:
            self._stack.down()
        if over:
            self._withdraw_following()
        return code

    def _was_stopped(self, gateway: Gateway, since: float) -> bool:
        """Return whether somebody stopped the search by `search stop` meanwhile."""
        with contextlib.suppress(BalsamError):
            requests = read_requests(gateway, self._search)
            return any(request.what == STOP and request.given_at >= since for request in requests)
        return False

    def _is_left(self) -> bool:
        """Whether the stack is as an allocation left it that was killed: the scheduler knows that it is over."""
        try:
            before = int(json.loads((self._stack.folder / _ALLOCATION).read_text())["id"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        deadline = time.monotonic() + _OVER_WITHIN_S
        while self._stack.files.state().processes and time.monotonic() < deadline and not self._stop():
            if self._allocation.is_over(before):
                return True
            time.sleep(1)
        return False

    def _clear(self, gateway: Gateway) -> None:
        """End what Balsam takes for alive of allocations before this one: what was cut there starts again at once."""
        site = self._stack.site()
        assert site is not None
        now = datetime.now(timezone.utc).replace(tzinfo=None).isoformat()
        for row in gateway.batch_jobs([site.id], ["pending_submission", "queued", "running"]):
            if row["scheduler_id"] != self._allocation.id:
                gateway.finish_batch_job(row["id"], now)
        for session in gateway.sessions():
            if session["site_id"] == site.id and session.get("batch_job_id") is not None:
                logger.info("What ran in BatchJob %s when it was cut starts again", session["batch_job_id"])
                gateway.end_session(session["id"])

    def _wait(self, words: Sequence[str]) -> int:
        command = [sys.executable, "-m", "deephyper_balsam.launcher.inside", *words]
        # A session of its own: the scheduler's signals reach this process alone, which passes them on in order
        running = subprocess.Popen(command, env={**os.environ, **self._stack.env}, start_new_session=True)
        told = False
        while (code := running.poll()) is None:
            if self._stop() and not told:
                running.terminate()
                told, late = True, time.monotonic() + _ENDS_S
            if told and time.monotonic() > late:
                running.kill()
            time.sleep(_POLL_S)
        return 128 - code if code < 0 else code

    def _withdraw_following(self) -> None:
        for number in queued(self._stack.folder):
            if number > self._allocation.id:
                self._allocation.withdraw(number)


def queued(folder: Path) -> list[int]:
    """Return the batch jobs that were submitted for the stack in a folder, by their numbers in the scheduler."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return [int(number) for number in json.loads((folder / _QUEUED).read_text())["ids"]]
    return []


def note_queued(folder: Path, numbers: Sequence[int]) -> None:
    """Remember the batch jobs that were submitted for the stack in a folder."""
    write_private(folder / _QUEUED, json.dumps({"ids": list(numbers)}))


def exit_code(code: int, following: int) -> int:
    """Return what the batch job ends with.

    One that ended in order and that others follow has done its part: some schedulers start them only then.

    Parameters
    ----------
    code
        The driver's exit code.
    following
        How many batch jobs follow.
    """
    return 0 if code == _CUT and following else code
