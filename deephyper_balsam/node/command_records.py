"""What a shell command says of how it goes: lines of its output, or a JSON file that it writes anew as it goes.

A command that shall stop gets a signal, and a minute to end; what it recorded last is its objective then.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from deephyper_balsam.node.running_job import RunningJob

STOP_GRACE_S = 60.0
DEFAULT_SIGNAL = "SIGTERM"
_MAX_LINE_CHARS = 1 << 16
_LINE_ENDS = re.compile(r"[\r\n]")


class CommandRecords:
    """Takes in the records of a command while it runs.

    Parameters
    ----------
    rule
        Where they stand: ``regex`` with a group for the budget and one for the objective (in this order, or named so),
        or ``json`` with the file's name, and ``budget`` and ``objective``, the keys in it; and ``signal``, the name of
        the one that asks the command to stop.
    job
        Which records, and knows whether to stop.
    workdir
        The command's folder.
    """

    def __init__(self, rule: Mapping[str, str], job: RunningJob, workdir: Path) -> None:
        self._rule, self._job = rule, job
        self._pattern = re.compile(rule["regex"]) if "regex" in rule else None
        self._file = workdir / rule["json"] if "json" in rule else None
        self._seen: tuple[int, int] | None = None
        self._line = ""
        self._told_at: float | None = None

    def take_in(self, text: str) -> None:
        """Take in what the command printed since the last call, maybe nothing, and look at its file.

        Parameters
        ----------
        text
            Any piece of its output.

        Raises
        ------
        ValueError
            What it recorded is no finite number.
        """
        if self._pattern is not None:
            *whole, self._line = _LINE_ENDS.split(self._line + text)
            self._line = self._line[-_MAX_LINE_CHARS:]
            for line in whole:
                self._take_in_line(line)
        elif self._file is not None:
            self._look_at(self._file)

    def end(self) -> None:
        """Take in what is left when the command has ended."""
        self.take_in("\n")

    def _take_in_line(self, line: str) -> None:
        assert self._pattern is not None
        for found in self._pattern.finditer(line):
            named = found.groupdict()
            first, second = (named["budget"], named["objective"]) if named else found.groups()
            self._record(float(first), float(second))

    def _look_at(self, file: Path) -> None:
        try:
            stat = file.stat()
            if (stat.st_mtime_ns, stat.st_size) == self._seen:
                return
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or half written: the next look sees it
            return
        self._seen = stat.st_mtime_ns, stat.st_size
        budget, objective = (_within(content, self._rule.get(key, key)) for key in ("budget", "objective"))
        if budget is not None and objective is not None:
            self._record(budget, objective)

    def _record(self, budget: Any, objective: Any) -> None:
        last = self._job.last_record
        if self._told_at is None and (last is None or budget != last[0] or objective != last[1]):
            self._job.record(budget, objective)

    def ends(self, process: int) -> bool:
        """Ask the command to stop, once, where it shall; return whether it had its time and must be ended.

        Parameters
        ----------
        process
            The id of the shell that runs it.
        """
        if self._told_at is None:
            if self._job.stopped():
                self._told_at = time.monotonic()
                _send(process, signal.Signals[self._rule.get("signal", DEFAULT_SIGNAL)])
            return False
        return time.monotonic() - self._told_at > STOP_GRACE_S

    @property
    def was_stopped(self) -> bool:
        """Whether the command was asked to stop."""
        return self._told_at is not None


def _within(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _send(shell: int, number: int) -> None:
    """Send a signal to the command: to what the shell has started, or to itself where it has become the command."""
    try:
        started = psutil.Process(shell).children(recursive=True)
    except psutil.Error:
        return
    for process in [one.pid for one in started] or [shell]:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue
