"""The processes of a local stack: found by their record or by the mark that they carry, and ended."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from deephyper_balsam.common import processes
from deephyper_balsam.server.stack_state import State
from deephyper_balsam.sites.local_batch import ID_VARIABLE


def find(state: State, name: str, variable: str, value: Path, word: str) -> list[psutil.Process]:
    """Return the recorded process, and strays of its kind: children that outlived it, or one that no record knows.

    Parameters
    ----------
    state
        The record.
    name
        The part's name in it.
    variable, value
        What stands in the environment of its processes.
    word
        What stands in their command line.

    Returns
    -------
    list of psutil.Process
        The recorded one first, if it runs.
    """
    recorded = state.processes.get(name)
    found = recorded.find() if recorded is not None else None
    strays = processes.matching(processes.carries(variable, str(value), word))
    return [*([found] if found else []), *(stray for stray in strays if found is None or stray.pid != found.pid)]


def stop(state: State, name: str, found: list[psutil.Process], timeout_s: float) -> None:
    """End a part; BatchJobs that an agent started go on.

    Parameters
    ----------
    state
        The record, from which the part is removed.
    name
        The part's name in it.
    found
        Its processes. The first, the main one, is asked to end; then all are ended.
    timeout_s
        How long the main process may take.
    """
    if found:
        members = [member for process in found for member in processes.tree(process)]
        processes.send(found[0], signal.SIGTERM)
        processes.wait_gone(found[:1], timeout_s)
        processes.end([*members, *found], grace_s=1, spare=_is_of_a_batch_job)
    state.processes.pop(name, None)


def _is_of_a_batch_job(process: psutil.Process) -> bool:
    return ID_VARIABLE in process.environ()
