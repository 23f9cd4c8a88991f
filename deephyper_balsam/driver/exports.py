"""The files in a search's folder, which are copies of what its session holds: `results.csv` and `search.yaml`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deephyper_balsam.driver.session import SearchSession
from deephyper_balsam.errors import InputError
from deephyper_balsam.results import table as results

logger = logging.getLogger(__name__)

LOOK_S = 10.0
"""How often files that could not be written, or are gone, are looked for."""

_NAMES = ("results.csv", "search.yaml")
_SHARE = 0.05  # of the driver's time, at most, goes into writing results.csv


class Exports:
    """Writes the files of one search; a disk that takes nothing never ends the search.

    Parameters
    ----------
    folder
        Where they are written.
    session
        What holds the trials.
    hyperparameters
        Their names, in the order of the columns.
    asked_for
        What `search.yaml` says.
    """

    def __init__(
        self,
        folder: Path,
        session: SearchSession,
        hyperparameters: Sequence[str],
        asked_for: Mapping[str, Any],
    ) -> None:
        self.folder = folder
        self.asked_for = dict(asked_for)
        self._session = session
        self._file = results.ResultsFile(folder / "results.csv", hyperparameters)
        self._wrote_at = self._looked_at = -1e9
        self._took_s = 0.0
        self._not_written: str | None = None  # why the files could not be written the last time

    @property
    def notice(self) -> str | None:
        """What a person should know of the files, if there is something."""
        return None if self._not_written is None else self._lost_said(self._not_written)

    def write(self, now: bool = False) -> None:
        """Write the files, seldom enough that it never takes more than a twentieth of the driver's time.

        Parameters
        ----------
        now
            However lately they were written.
        """
        moment = time.monotonic()
        if not now and moment - self._wrote_at < max(1.0, self._took_s / _SHARE):
            return
        try:
            settings = self.folder / "search.yaml"
            if not settings.exists():
                results.write_whole(settings, yaml.safe_dump(self.asked_for, sort_keys=False))
            self._file.write(self._session.take_changed_lines(), lambda: self._session.lines)
        except (InputError, OSError) as error:  # a full disk, a quota, a folder that is gone: these are copies only
            if self._not_written is None:
                logger.warning("%s", self._lost_said(error))
            self._not_written = str(error)
        else:
            if self._not_written is not None:
                logger.info("The files in %s are written again", self.folder)
            self._not_written = None
        self._wrote_at = time.monotonic()
        self._took_s = self._wrote_at - moment

    def write_again(self) -> None:
        """Try again, now and then, to write what could not be written, or was deleted since."""
        now = time.monotonic()
        if now - max(self._wrote_at, self._looked_at) < LOOK_S:
            return
        self._looked_at = now
        gone = [name for name in _NAMES if not (self.folder / name).exists()]
        if gone and self._not_written is None:
            logger.warning("%s gone from %s: written again", " and ".join(gone), self.folder)
        if gone or self._not_written is not None:
            self.write(now=True)

    def _lost_said(self, error: object) -> str:
        return (
            f"The search's files in {self.folder} cannot be written now ({error}). The search goes on and tries again; "
            f"{self._session.advice.files_are_copies}"
        )
