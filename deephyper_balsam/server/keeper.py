"""Keeps PostgreSQL for as long as this host owns the stack's folder: ``python -m deephyper_balsam.server.keeper``.

It is PostgreSQL's parent, gives the stack's signs of life (`sign_of_life.py`), and kills PostgreSQL:

- as soon as another host has a higher claim; then everything else of the stack on this host is ended, too;
- when no sign of life got through for `fence_s` seconds, which is less than others wait before they take over. When the
  file system answers again and the folder is still ours, PostgreSQL is started again.

All of it is killed with SIGKILL, for what ends in order tidies up: PostgreSQL and the site's agent would remove the
pid files that the next host has written. If the keeper itself is killed, the kernel sends PostgreSQL a SIGQUIT. The
order comes on the standard input, as a JSON object with the fields of `Order`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deephyper_balsam.common import processes
from deephyper_balsam.common.clock import steady
from deephyper_balsam.server.sign_of_life import Claim, Claims, LostError, Owner
from deephyper_balsam.server.stack_folder import CLAIM_VARIABLE, MARK_VARIABLE

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_KILL_S = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Order:
    """What a keeper is to do.

    Attributes
    ----------
    command, data
        PostgreSQL's, and the folder in which it is started.
    folder, claim
        The stack's folder, and the number of the claim that owns it.
    sign_s, fence_s
        Seconds between two signs of life, and without one until PostgreSQL is stopped.
    account
        The number of the account that runs PostgreSQL, if it is another.
    receiver, receiver_env
        The command that ships PostgreSQL's log elsewhere and is started again whenever it ends, and what its
        environment has beside ours; empty: the log is not shipped.
    """

    command: list[str]
    data: str
    folder: str
    claim: int
    sign_s: float
    fence_s: float
    account: int | None = None
    receiver: list[str] = field(default_factory=list)
    receiver_env: dict[str, str] = field(default_factory=dict)


def keep(order: Mapping[str, Any]) -> tuple[list[str], str]:
    """Return the command that starts a keeper, and what it reads on its standard input."""
    return [sys.executable, "-m", __name__], json.dumps(order)


class Keeper:
    """PostgreSQL's life under one claim.

    Parameters
    ----------
    owner
        The claim.
    start
        Starts PostgreSQL.
    end_all
        Ends everything else that was started under the claim.
    ship
        Starts the receiver of PostgreSQL's log; None: there is none.
    sign_s, fence_s
        See `Order`.
    clock
        Seconds, the time that the host slept included.
    """

    def __init__(
        self,
        owner: Owner,
        start: Callable[[], subprocess.Popen[bytes]],
        end_all: Callable[[], None],
        *,
        sign_s: float,
        fence_s: float,
        ship: Callable[[], subprocess.Popen[bytes]] | None = None,
        clock: Callable[[], float] = steady,
    ) -> None:
        self._owner, self._start, self._end_all = owner, start, end_all
        self._sign_s, self._fence_s, self._clock = sign_s, fence_s, clock
        self._confirmed = clock()
        self._lost = threading.Event()
        self._now = threading.Event()
        self._signals: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._ship = ship
        self._receiver: subprocess.Popen[bytes] | None = None

    def pass_on(self, number: int) -> None:
        """Send PostgreSQL a signal at the next look; the keeper ends with it."""
        self._signals.append(number)

    def run(self) -> int:
        """Keep PostgreSQL until it ends or the folder is lost; return its exit code."""
        try:
            self._owner.beat()
        except LostError:
            logger.error("Another host has taken the stack over: PostgreSQL is not started here")
            return 1
        self._confirmed = self._clock()
        self._child = self._start()
        threading.Thread(target=self._sign, name="sign of life", daemon=True).start()
        try:
            return self._watch()
        finally:
            self._end_receiver()

    def _watch(self) -> int:
        assert self._child is not None
        while True:
            if self._ship is not None and (self._receiver is None or self._receiver.poll() is not None):
                self._receiver = self._ship()
            try:
                return self._child.wait(_TICK_S)
            except subprocess.TimeoutExpired:
                pass
            while self._signals:
                self._child.send_signal(self._signals.pop(0))
            if self._lost.is_set():
                return self._give_up()
            if self._silent and not self._wait_out():
                return self._give_up()

    @property
    def _silent(self) -> bool:
        return self._clock() - self._confirmed > self._fence_s

    def _sign(self) -> None:
        while not self._lost.is_set():
            began = self._clock()
            try:
                self._owner.beat()
                self._confirmed = began
            except LostError:
                self._lost.set()
            except OSError as error:
                logger.warning("No sign of life could be given: %s", error)
            self._now.wait(self._sign_s)
            self._now.clear()

    def _wait_out(self) -> bool:
        """Stop PostgreSQL while no sign of life gets through; return whether the folder is still ours then."""
        self._now.set()
        self._lost.wait(2 * _TICK_S)  # a host that slept finds out at once
        if not self._silent:
            return not self._lost.is_set()
        logger.error(
            "No sign of life got through for %.0f s, so another host may take over: PostgreSQL stops until one does",
            self._clock() - self._confirmed,
        )
        self._kill()
        while self._silent and not self._lost.is_set():
            if self._signals:
                return False
            time.sleep(_TICK_S)
        if self._lost.is_set():
            return False
        logger.error("The folder is still ours: PostgreSQL is started again")
        self._child = self._start()
        return True

    def _end_receiver(self) -> None:
        """Let the receiver write the last of the log: it ends when PostgreSQL has, and all is there."""
        if self._receiver is not None:
            try:
                self._receiver.wait(_KILL_S)
            except subprocess.TimeoutExpired:
                self._receiver.kill()
                self._receiver.wait()

    def _kill(self) -> None:
        assert self._child is not None
        if self._receiver is not None:
            self._receiver.kill()
        if self._child.poll() is None:
            with contextlib.suppress(psutil.Error):
                processes.end([psutil.Process(self._child.pid)], grace_s=_KILL_S, first=signal.SIGKILL)
            self._child.wait()

    def _give_up(self) -> int:
        """Stop PostgreSQL at once, then all the rest, and say so to the host that waits for it."""
        self._kill()
        if self._lost.is_set():
            logger.error("Another host has taken the stack over: everything of it on this host is ended")
            self._end_all()
            with contextlib.suppress(OSError):
                self._owner.leave("taken over")
        return 1


def _end_with(keeper: int) -> None:
    """Ask the kernel for a SIGQUIT when the keeper is gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)
    if os.getppid() != keeper:  # it was killed just before
        os._exit(1)


def main() -> int:
    """Do what the order says."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    order = Order(**json.loads(sys.stdin.read()))
    claims = Claims(Path(order.folder))
    found = claims.latest()
    claim = found[0] if found is not None and found[0].number == order.claim else Claim(order.claim)
    of_the_stack = processes.carries(MARK_VARIABLE, order.folder)
    of_the_claim = processes.carries(CLAIM_VARIABLE, str(order.claim))

    mine = os.getpid()

    def start(command: list[str], **more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd=order.data,
            env={**os.environ, **more},
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: _end_with(mine),
            start_new_session=True,
        )

    def end_all() -> None:
        also = [] if order.account is None else [order.account]
        found = processes.matching(lambda process: of_the_stack(process) and of_the_claim(process), also)
        processes.end(found, grace_s=_KILL_S, first=signal.SIGKILL)

    keeper = Keeper(
        Owner(claims, claim),
        lambda: start(order.command),
        end_all,
        sign_s=order.sign_s,
        fence_s=order.fence_s,
        ship=(lambda: start(order.receiver, **order.receiver_env)) if order.receiver else None,
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, lambda received, _frame: keeper.pass_on(received))
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main())
