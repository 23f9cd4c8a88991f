"""Cobalt and ``aprun``: the classes that the site config `theta-knl-cobalt` names.

Balsam's own scheduler class drops a row whose state it does not know, and the agent then calls that job finished.
The formats are those of Cobalt's own manual pages qsub(1), qstat(1), qdel(1), and of ALPS' aprun(1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from balsam.platform.app_run import ThetaAprun
from balsam.platform.scheduler.scheduler import SchedulerNonZeroReturnCode

from deephyper_balsam.launcher.patience import Word
from deephyper_balsam.sites.runs import AllocationRun
from deephyper_balsam.sites.scheduling import (
    Answer,
    BatchScheduler,
    Job,
    Request,
    State,
    minutes_told,
    queue_of,
    queues_of_qstat,
    run_command,
)

# qstat(1), "State". A job that failed or ended is not in the queue any more: its .cobaltlog tells of it.
STATES = {
    "admin_hold": State.QUEUED,
    "dep_fail": State.QUEUED,
    "dep_hold": State.QUEUED,
    "exiting": State.RUNNING,
    "killing": State.RUNNING,
    "maxrun_hold": State.QUEUED,
    "preempted": State.QUEUED,
    "preempting": State.RUNNING,
    "queued": State.QUEUED,
    "running": State.RUNNING,
    "starting": State.RUNNING,
    "user_hold": State.QUEUED,
}

_COLUMNS = ("JobID", "State", "WallTime", "Queue", "Nodes", "Project", "TimeRemaining", "QueuedTime", "JobName")
_HEADER = {"QSTAT_HEADER": ":".join(_COLUMNS)}


def submit_command(request: Request) -> list[str]:
    """Return the ``qsub`` command."""
    return [
        "qsub",
        *("--jobname", request.name),
        *("-A", request.project),
        *("-q", request.queue),
        *("-n", str(request.num_nodes)),
        *("-t", str(request.wall_time_min)),
        *("--env", environment_words(request.environment)),
        *("-o", str(request.output)),
        *("-e", str(request.output)),
        *("--debuglog", str(log_of(request.script))),
        *(() if request.after is None else ("--dependencies", str(request.after))),
        str(request.script),
    ]


def environment_words(environment: Mapping[str, str]) -> str:
    """Return variables as ``--env`` takes them: between colons, those inside of a value after a backslash."""
    return ":".join(f"{name}=" + value.replace(":", r"\:") for name, value in environment.items())


def log_of(script: Path) -> Path:
    """Return where Cobalt tells how a job went."""
    return script.with_suffix(".cobaltlog")


def parse_submit(text: str) -> int:
    """Read the id: the last line that is a number, for Cobalt prints notes of the project and queue before it.

    Raises
    ------
    ValueError
        When there is none.
    """
    numbers = [line.strip() for line in text.splitlines() if line.strip().isdigit()]
    return int(numbers[-1] if numbers else "")


def queue_command(user: str) -> list[str]:
    """Return the ``qstat`` command that lists the user's jobs; the columns are chosen by $QSTAT_HEADER."""
    return ["qstat", "-u", user]


def job_command(job_id: int) -> list[str]:
    """Return the ``qstat`` command for one job."""
    return ["qstat", str(job_id)]


def parse_queue(text: str) -> list[Job]:
    """Read the table under its two head lines; a line that is no job is passed over."""
    return [job for line in text.splitlines() if (job := _parse_line(line)) is not None]


def _parse_line(line: str) -> Job | None:
    fields = line.split(None, len(_COLUMNS) - 1)
    if len(fields) < len(_COLUMNS) - 1 or not fields[0].isdigit():
        return None
    number, word, limit, queue, nodes, project, left, waited, name = [*fields, ""][: len(_COLUMNS)]
    return Job(
        id=int(number),
        state=STATES.get(word.lower(), State.UNKNOWN),
        queue=queue_of(name.strip(), queue),
        project=project,
        num_nodes=int(nodes) if nodes.isdigit() else 0,
        wall_time_min=minutes_told(limit),
        time_remaining_min=minutes_told(left),
        queued_time_min=minutes_told(waited),
    )


def parse_log(text: str, job_id: int) -> Job | None:
    """Read a job's ``.cobaltlog``: lines that begin with a time in UTC; None before the job has started."""
    lines = [line for line in text.splitlines() if "(UTC)" in line]
    started = next((_time(line) for line in lines if "COBALT_STARTTIME" in line), None)
    if started is None:
        return None
    codes = re.findall(r"exit code of (-?\d+)", text)
    exit_code = int(codes[-1]) if codes else None
    # A negative code, or one over 128, is the signal that ended it
    failed = exit_code is not None and 0 < exit_code < 128
    state = State.FAILED if failed else State.FINISHED
    return Job(job_id, state, start_time=started, end_time=_time(lines[-1]), exit_code=exit_code)


def _time(line: str) -> float | None:
    try:
        return datetime.strptime(line.partition("(UTC)")[0].strip(), "%a %b %d %H:%M:%S %Y %z").timestamp()
    except ValueError:
        return None


class CobaltScheduler(BatchScheduler):
    """Cobalt for Balsam's agent."""

    @classmethod
    def submit_command(cls, request: Request) -> list[str]:
        """Return the ``qsub`` command."""
        return submit_command(request)

    @classmethod
    def parse_submit(cls, text: str) -> int:
        """Read the new id."""
        return parse_submit(text)

    @classmethod
    def list_jobs(cls, user: str) -> list[Job]:
        """Return what ``qstat`` shows of the user: it ends with 1 and says nothing when that is nothing."""
        return _listed(queue_command(user))

    @classmethod
    def find(cls, job_id: int) -> Job | None:
        """Ask ``qstat`` for one job; it shows none that ended."""
        return next((job for job in _listed(job_command(job_id)) if job.id == job_id), None)

    @classmethod
    def history(cls, job_id: int, script: Path | None) -> Job | None:
        """Read the log that Cobalt wrote beside the script."""
        log = log_of(script) if script else None
        return parse_log(log.read_text(errors="replace"), job_id) if log and log.is_file() else None

    @classmethod
    def known_queues(cls) -> set[str] | None:
        """Ask ``qstat -Q``."""
        return queues_of_qstat()

    @classmethod
    def delete_command(cls, job_id: int) -> list[str]:
        """Return the ``qdel`` command."""
        return ["qdel", str(job_id)]


def _listed(command: list[str]) -> list[Job]:
    answer = run_command(command, environment=_HEADER)
    if answer.code and (answer.code != 1 or answer.said):
        raise SchedulerNonZeroReturnCode(f"{' '.join(command)} ended with {answer.code}: {answer.said}")
    return parse_queue(answer.output)


class ThetaRun(AllocationRun, ThetaAprun):  # type: ignore[misc]
    """A run started by ``aprun``. ``exec`` lets the launcher's signals reach it, whatever preamble there is."""

    job_variable: ClassVar[str] = "COBALT_JOBID"
    ask_environment: ClassVar[Mapping[str, str] | None] = _HEADER

    @classmethod
    def ask_command(cls, job_id: int) -> list[str]:
        """Return the ``qstat`` command."""
        return job_command(job_id)

    @classmethod
    def read_answer(cls, answer: Answer, job_id: int) -> Word:
        """Return what Cobalt says: a job that is killed or preempted, or that leaves, ends."""
        if answer.code and (answer.code != 1 or answer.said):
            return Word.AWAY
        rows = (line.split() for line in answer.output.splitlines())
        states = [row[1].lower() for row in rows if len(row) > 1 and row[0] == str(job_id)]
        return Word.ENDS if set(states) & {"exiting", "killing", "preempting"} else Word.RUNS

    def _build_cmdline(self) -> str:
        command: Any = super()._build_cmdline()
        return f"exec {command}"
