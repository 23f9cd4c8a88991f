"""Processes known by pid and start time, so that a reused pid is never taken for ours; ended with their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from deephyper_balsam.common.process_id import ProcessId

# A child that outlives the call that started it would make Popen warn when it is collected.
_started_here: list[subprocess.Popen[bytes]] = []
_POLL_S = 0.02


def start(
    arguments: list[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    stdout_to_log: bool = True,
    order: str | None = None,
    pass_fds: Sequence[int] = (),
) -> tuple[subprocess.Popen[bytes], ProcessId]:
    """Start a process in a session of its own whose output goes to the end of `log`, which only the owner may read.

    Parameters
    ----------
    arguments
        The program and its words.
    cwd
        Its working directory.
    env
        Its whole environment.
    log
        The file of its output.
    stdout_to_log
        Whether its standard output goes there, too; else only the standard error does.
    order
        What it reads on its standard input, which ends then; by default nothing.
    pass_fds
        The open files that it inherits under their numbers.

    Returns
    -------
    tuple
        The child, and what it is known by when this process has ended.

    Raises
    ------
    OSError
        When the program cannot be started.
    """
    with open_log(log) as output:
        child = subprocess.Popen(
            arguments,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL if order is None else subprocess.PIPE,
            stdout=output if stdout_to_log else subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    if child.stdin is not None and order is not None:
        with contextlib.suppress(BrokenPipeError), child.stdin:  # it ended at once: whoever waits for it says so
            child.stdin.write(order.encode())
    _reap()
    _started_here.append(child)
    return child, ProcessId.of(child.pid) or ProcessId(child.pid, "ended")


def open_log(log: Path) -> IO[bytes]:
    """Open a log to write at its end; only its owner may read it, whatever the umask is."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "ab")


def tree(process: psutil.Process) -> list[psutil.Process]:
    """Return the process and all that descend from it; an empty list when it is gone."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def matching(condition: Callable[[psutil.Process], bool], also: Iterable[int] = ()) -> list[psutil.Process]:
    """Return the living processes of ours for which `condition` holds, never this one or one that it descends from.

    Anybody can start a process with our name, folder or environment, so who started it counts first.

    Parameters
    ----------
    condition
        Asked of each; what raises `psutil.Error` does not match.
    also
        Further accounts, by their numbers, whose processes may be ours, such as that which runs PostgreSQL for root.
    """
    accounts = {os.geteuid(), *also}
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid in mine or process.uids().real not in accounts:  # real: a program may be set-uid root
                continue
            if process.status() != psutil.STATUS_ZOMBIE and condition(process):
                found.append(process)
    return found


def carries(name: str, value: str, word: str = "") -> Callable[[psutil.Process], bool]:
    """Return the condition: started with the environment variable `name` at `value`, and `word` in the command line."""

    def condition(process: psutil.Process) -> bool:
        if process.environ().get(name) != value:
            return False
        return not word or any(word in part for part in process.cmdline())

    return condition


def send(process: psutil.Process, signal_number: int) -> None:
    """Send a signal; a process that is gone already is no error."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(signal_number)


def wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for processes to end; return those that still run after `timeout_s`.

    A zombie counts as ended: whose child it is may never ask for it.
    """
    left = list(processes)
    deadline = time.monotonic() + timeout_s
    while True:
        _reap()
        left = [process for process in left if _runs(process)]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(_POLL_S)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _reap() -> None:
    _started_here[:] = [child for child in _started_here if child.poll() is None]


def end(
    processes: Iterable[psutil.Process],
    *,
    grace_s: float,
    first: int = signal.SIGTERM,
    spare: Callable[[psutil.Process], bool] = lambda process: False,
) -> None:
    """End processes and all that descend from them: `first` to each, `grace_s` seconds to obey, then SIGKILL.

    What they start while they end is found and killed, too; those for which `spare` holds are left alone.
    """
    known = {process.pid: process for root in processes for process in tree(root) if not _holds(spare, process)}
    for process in known.values():
        send(process, first)
    left = wait_gone(known.values(), grace_s)
    deadline = time.monotonic() + 5
    while left and time.monotonic() < deadline:
        for process in left:
            for member in tree(process):
                if _holds(spare, member):
                    continue
                known[member.pid] = member
                send(member, signal.SIGKILL)
        left = wait_gone(known.values(), 1)


def _holds(condition: Callable[[psutil.Process], bool], process: psutil.Process) -> bool:
    try:
        return condition(process)
    except (psutil.Error, OSError):  # it is gone
        return False


def tail(log: Path, lines: int = 15) -> str:
    """Return a log's path and its last lines, for an error message."""
    text = ""
    with contextlib.suppress(OSError):
        text = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    return f"Log: {log}" + (f"\n{text}" if text else " (empty)")
