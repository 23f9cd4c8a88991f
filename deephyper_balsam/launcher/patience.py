"""Runs whose end may be nobody's fault: the batch system or the file system was away.

``srun`` needs Slurm's controller, and ends with 1 where that does not answer; a run's folder may be on a file system
that is not there for a minute. Balsam's launchers count the first as the application's error and die of the second.
Here such a run counts as running until the answer comes, and is then given back to the queue: it is charged to nobody.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import time
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from balsam.platform.app_run.app_run import FailedStartProcess, SubprocessAppRun, TimeoutExpired

logger = logging.getLogger(__name__)

_AWAY = {
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO,
    errno.ESHUTDOWN,
}  # fmt: skip
_MOST_BY_WORDS = 3
_SETTLES_S = 120.0  # after a batch system's return, until all its nodes have told it that they are there
_clock = time.monotonic


class Word(Enum):
    """What the batch system says of the allocation that this process is in."""

    RUNS = "runs"
    ENDS = "ends"
    AWAY = "away"  # it does not answer


class _NotYet:
    """Stands for the process of a run that could not be started yet."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.pid = None

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.code = -15

    def kill(self) -> None:
        self.code = -9

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("a run that could not be started yet", timeout or 0.0)
        return self.code


class Patient(SubprocessAppRun):  # type: ignore[misc]
    """A run that waits for its folder, and that goes back to the queue when that was away as it ended."""

    wait_for_folder_s: ClassVar[float] = 300.0
    look_s: ClassVar[float] = 5.0
    given_back = False
    """Whether the run that ended is to start again, charged to nobody."""
    _began_at: float | None = None
    _looked_at = -1e9
    _was_away = False
    _cwd: Path
    _outfile_path: Path
    _process: Any
    _outfile: Any

    def start(self) -> None:
        """Start the run; where its folder cannot be written now, later (`poll`)."""
        now = _clock()
        self._began_at = now if self._began_at is None else self._began_at
        self._looked_at = now
        try:
            super().start()
        except OSError as error:
            self._process, self._outfile = _NotYet(), io.BytesIO()
            if now - self._began_at < self.wait_for_folder_s:
                logger.warning("The run in %s cannot be started now, and is tried again: %s", self._cwd, error)
            else:
                logger.error(
                    "The run in %s could not be started for %.0f s: %s", self._cwd, now - self._began_at, error
                )
                self._process = FailedStartProcess()

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs or may yet be started, or cannot be judged now."""
        if isinstance(self._process, _NotYet) and self._process.code is None:
            if _clock() - self._looked_at >= self.look_s:
                self.start()
            return None
        code = super().poll()
        if not code:
            return None if code is None else 0
        return self._judged(int(code))

    def _judged(self, code: int) -> int | None:
        if _clock() - self._looked_at < self.look_s and self._was_away:
            return None
        self._looked_at = _clock()
        if not isinstance(self._process, (_NotYet, FailedStartProcess)) and folder_is_away(self._cwd):
            self._was_away = True
            return None
        self.given_back = self.given_back or self._was_away
        return code

    def tail_output(self, nlines: int = 10) -> str:
        """Return the last lines of `job.out`; none where it is not to be read, of which Balsam's launcher would die."""
        try:
            return str(super().tail_output(nlines))
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return ""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises
        ------
        TimeoutExpired
            When it has not ended after `timeout` seconds.
        """
        if isinstance(self._process, _NotYet):
            try:
                return self._process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                raise TimeoutExpired(cmd=self._cmdline, timeout=timeout) from error
        return int(super().wait(timeout=timeout))


def folder_is_away(folder: Path) -> bool:
    """Whether a folder cannot be read because its file system does not answer, or is not mounted."""
    try:
        os.listdir(folder)
        return False
    except OSError as error:
        if error.errno in _AWAY:
            return True
    site = os.environ.get("BALSAM_SITE_PATH")
    return bool(site) and not os.path.exists(os.path.join(str(site), "settings.yml"))


class NeedsScheduler(Patient):
    """A run that a program of the batch system starts: where that fails and the system is away, nobody is to blame.

    `word` is asked when a run ends with an error; while the system is away, once in `look_s` for all runs together.
    """

    probes: ClassVar[bool] = True  # first: where it never answers, as behind some firewalls, its silence says nothing
    messages: ClassVar[Any] = None  # what that program writes when its system is away
    refusals: ClassVar[Any] = None  # what it writes when the system does not let it begin
    _answers: ClassVar[bool | None] = None
    _away_at: ClassVar[float] = -1e9  # when it was last seen to be away
    _by_words: ClassVar[Counter[str]] = Counter()
    _ends = False

    @classmethod
    def word(cls) -> Word:
        """What the batch system says of this allocation."""
        return Word.RUNS

    def start(self) -> None:
        """Start the run."""
        cls = type(self)
        if cls._answers is None:
            cls._answers = not cls.probes or cls.word() is not Word.AWAY
        super().start()

    def _judged(self, code: int) -> int | None:
        if self._ends or (self._was_away and _clock() - self._looked_at < self.look_s):
            return None
        word = self._ask()
        if word is Word.ENDS:
            self._ends = True
            return None
        if word is Word.AWAY and self._answers:
            self._was_away, self._looked_at = True, _clock()
            return None
        judged = super()._judged(code)
        if judged is not None and not self.given_back and self._blames_its_system():
            self.given_back = True
        return judged

    def _ask(self) -> Word:
        """Return the system's word; that it is away holds for all runs, so that none waits for its silence again."""
        cls = type(self)
        if self._answers and _clock() - self._away_at < self.look_s:
            return Word.AWAY
        word = cls.word()
        if word is Word.AWAY:
            cls._away_at = _clock()
        return word

    def _blames_its_system(self) -> bool:
        """Whether the program that started it wrote so; without an outage that was seen, a few times at most.

        An application may write such words, too. A batch system that is back refuses runs until its nodes have
        told it that they are there.
        """
        said = self.tail_output(50)
        if self.refusals is not None and _clock() - self._away_at < _SETTLES_S and self.refusals.search(said):
            return True
        if self.messages is None or not self.messages.search(said):
            return False
        self._by_words[str(self._cwd)] += 1
        if self._by_words[str(self._cwd)] > _MOST_BY_WORDS:
            return False
        type(self)._away_at = _clock() - self.look_s  # it answers again, but it was away
        return True
