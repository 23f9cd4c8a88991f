"""A process that evaluates one trial after the other, for a search in processes of this machine.

It reads a JSON line for each trial from its input and answers with one: the outcome. The run itself is a child of this
process (`node.worker.evaluate_apart`), so whatever it does, this process goes on.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from deephyper_balsam.common.objective import command_minimises
from deephyper_balsam.node.rungs import RungKeeper
from deephyper_balsam.node.stoppers import Stopper
from deephyper_balsam.node.worker import evaluate_apart, job_here, print_anything

STANDING_FILE, RUNGS_FILE = "standing.json", "rungs.json"
"""In the search's folder, written by the driver; in a trial's, written here."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Evaluate what is asked until the input ends, or the process that asks is gone."""
    _end_with_parent()
    print_anything()
    # Apart from what runs read and print, and closed in what they start
    tasks = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for line in tasks:
        answers.write(json.dumps(evaluate_one(json.loads(line))).encode() + b"\n")
        answers.flush()


def evaluate_one(task: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a trial in a folder of its own, where what it prints is kept in `job.out`.

    Parameters
    ----------
    task
        ``spec`` (as of `store.applications`), ``number``, ``config``, ``folder``, ``limit_s``, ``minimize``,
        ``trial`` (as of `job_here`), ``stopper`` (`Stopper.to_dict`), and ``standing``, the file with the standing at
        its rungs.
    """
    spec, folder = task["spec"], Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    minimize = bool(task["minimize"]) or command_minimises(spec)
    with (folder / "job.out").open("ab") as file, _printing_to(file):
        stopper = Stopper.from_dict(task["stopper"])
        keeper = _keeper(stopper, folder, Path(task["standing"])) if stopper.compares else None
        line = None if keeper is None else keeper.line
        job = job_here(
            task["number"],
            task["config"],
            folder,
            trial=task["trial"],
            stopper=stopper,
            line=line,
            told_to_stop=any(decision["stop"] for decision in read_rungs(folder)),
            minimize=minimize,
        )
        beside = None if keeper is None else keeper.answering
        return evaluate_apart(spec, job, task["limit_s"], minimize=minimize, beside=beside)[0]


def _keeper(stopper: Stopper, folder: Path, standing: Path) -> RungKeeper:
    """Return what decides at the rungs of a trial from a file, and leaves the decisions in the trial's folder."""

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        known = json.loads(standing.read_text(encoding="utf-8")) if standing.exists() else {"rungs": {}}
        return {"rungs": read_rungs(folder)}, known

    def write(data: Mapping[str, Any]) -> None:
        partial = folder / f".{RUNGS_FILE}"
        partial.write_text(json.dumps(data["rungs"]), encoding="utf-8")
        partial.replace(folder / RUNGS_FILE)

    return RungKeeper(stopper, read, write)


def read_rungs(folder: Path) -> list[dict[str, Any]]:
    """Return what was decided at the rungs of the trial whose folder this is (`Decision.to_dict`)."""
    file = folder / RUNGS_FILE
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return found


@contextmanager
def _printing_to(file: IO[bytes]) -> Iterator[None]:
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in kept:
            os.dup2(file.fileno(), number)
        yield
    finally:
        for number, copy in kept:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(copy, number)
            os.close(copy)


def _end_with_parent() -> None:
    """Let the kernel end this process, and with it its run, when the driver is killed. Linux only."""
    parent = os.getppid()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
