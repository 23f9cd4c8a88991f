"""Calls that are made again until they are answered: while Balsam is away, a search waits and loses nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from deephyper_balsam.driver.session import SearchSession
from deephyper_balsam.errors import NotLoggedInError, UnreachableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_RETRY_S = 30.0


class Patience:
    """Makes calls of a session until they are answered, with pauses that grow to 30 s.

    Parameters
    ----------
    session
        What is called.
    stop
        Once it is set, nothing is tried again.

    Attributes
    ----------
    notice
        Why a call is waited for now; None: none is.
    """

    def __init__(self, session: SearchSession, stop: threading.Event) -> None:
        self._session, self._stop = session, stop
        self.notice: str | None = None

    def __call__(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, as soon as it does.

        Raises
        ------
        UnreachableError, NotLoggedInError
            Only when the driver was asked to stop.
        """
        pause_s = 1.0
        outage: tuple[float, str] | None = None
        while True:
            try:
                answer = call()
            except (UnreachableError, NotLoggedInError) as error:
                if self._stop.is_set():
                    raise
                outage = outage or (self._session.now(), str(error))
                self.notice = f"{error} Trying again in {pause_s:.0f} s."
                logger.warning("%s", self.notice)
                self._session.wait(pause_s, self._stop)
                pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
                self._connect_again()
            else:
                self.notice = None
                if outage is not None:
                    lasted_s = self._session.now() - outage[0]
                    self._session.note_outage(lasted_s, outage[1])
                    logger.info("Balsam answers again, after %.0f s", lasted_s)
                return answer

    def _connect_again(self) -> None:
        try:
            self._session.reconnect()
        except NotLoggedInError as error:
            logger.debug("Still not logged in: %s", error)
