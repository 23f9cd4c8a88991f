"""Looks after the agent of a local stack: one that died, or that lost a part, is started again without a person.

Balsam's agent does not notice that a process of its own was killed, and nothing of the search starts any more. The API
server is the part of a stack that always runs: a thread of it looks at the agent, and starts
``python -m deephyper_balsam.server.mender FOLDER`` where that died. An agent that a person stopped is left alone.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deephyper_balsam.errors import DeepHyperBalsamError
from deephyper_balsam.server.site_agent import Condition
from deephyper_balsam.server.stack import LocalStack

logger = logging.getLogger(__name__)

_MOST = 3  # times in `_WITHIN_S`: an agent that dies at once has a fault of its own, which its log tells
_WITHIN_S = 600.0
_ENDS_WITHIN_S = 120.0  # a service waits for a request under way; beyond that the end hangs


class Mender:
    """Has the agent started again when it is dead at two looks, one after the other, or ends and does not come to it.

    Parameters
    ----------
    condition
        How the agent does.
    mend
        Starts it again.
    clock
        Seconds.
    """

    def __init__(
        self,
        condition: Callable[[], Condition],
        mend: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._condition, self._mend, self._clock = condition, mend, clock
        self._was_dead = False
        self._ends_since: float | None = None
        self._mended_at: list[float] = []

    def look(self) -> None:
        """Look once."""
        condition, before, now = self._condition(), self._was_dead, self._clock()
        if condition is not Condition.ENDING:
            self._ends_since = None
        elif self._ends_since is None:
            self._ends_since = now
        dead = condition is Condition.DEAD or (self._ends_since is not None and now - self._ends_since > _ENDS_WITHIN_S)
        self._was_dead = dead and not before
        if not (dead and before):
            return
        self._mended_at = [at for at in self._mended_at if now - at < _WITHIN_S]
        if len(self._mended_at) < _MOST:
            self._mended_at.append(now)
            self._mend()

    def run(self, every_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Look every `every_s` seconds for as long as the process runs; an error in one look is told and passes."""
        while True:
            sleep(every_s)
            try:
                self.look()
            except Exception:
                logger.exception("The site's agent could not be looked at")


def look_after_agent(folder: Path, environment: Mapping[str, str], every_s: float) -> None:
    """Look after a stack's agent from a thread of this process.

    Parameters
    ----------
    folder
        The stack's folder.
    environment
        For the process that starts the agent again.
    every_s
        Seconds between two looks.
    """
    stack = LocalStack(folder)

    def mend() -> None:
        command = [sys.executable, "-m", __name__, str(folder)]
        with open(stack.logs / "agent.log", "ab") as log:
            subprocess.run(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
            )

    mender = Mender(lambda: stack.agent.condition(stack.files.state()), mend)
    threading.Thread(target=mender.run, args=(every_s,), name="mender", daemon=True).start()


def main() -> int:
    """Start the agent of the stack in the folder that is given, if it died and the stack is not being stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    try:
        LocalStack(sys.argv[1]).mend_agent()
    except DeepHyperBalsamError as error:
        logger.error("The site's agent was not started again: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
