"""`search.log`: what the package says while a search is driven, in a file that never ends the search."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from deephyper_balsam.common.private import open_own
from deephyper_balsam.common.wording import counted, printable


class SearchLog(WatchedFileHandler):
    """The log of a search, which never ends the search: it comes back where it was deleted, or its disk was full."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self._path = path
        self._lost = 0  # lines that could not be written

    def _open(self) -> Any:  # what a FileHandler lets its children replace
        return open(self.baseFilename, "a", encoding="utf-8", opener=open_own)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, in a new file where the old one is gone."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
            if self._lost and self.stream is not None:
                self.stream.write(f"({counted(self._lost, 'line')} before the last one could not be written)\n")
                self._lost = 0
        except OSError:
            self._lose()

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a line that the disk did not take; anything else is a mistake in the program, and is shown."""
        if isinstance(sys.exc_info()[1], OSError):
            self._lose()
        else:
            super().handleError(record)

    def _lose(self) -> None:
        self._lost += 1
        self.stream, stream = None, self.stream
        with contextlib.suppress(OSError):  # what it still held back is lost with it
            if stream is not None:
                stream.close()

    def close(self) -> None:
        """Close the file; the last lines may be lost where the disk is full."""
        with contextlib.suppress(OSError):
            super().close()


class _PrintableFormatter(logging.Formatter):
    """What runs said of their failures is read in a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write the package's log lines into a file while the block runs.

    Parameters
    ----------
    path
        Of the file; lines are added at its end.
    """
    logger = logging.getLogger("deephyper_balsam")
    handler = SearchLog(path)
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
