"""What our schedulers share: foreign batch jobs as values, and a Balsam scheduler class on top of pure functions.

Balsam's agent calls a scheduler class each few seconds, and takes a BatchJob that is absent from its answer for
finished. Anything that the class raises and the agent does not expect ends that service silently: the BatchJobs freeze
while the agent looks alive. So here absence is looked up by id, an answer that did not come changes nothing, and only
errors that the agent knows are raised.

A scheduler is a dialect: functions that build a command, and functions that read its text. `run_command` is the only
one that runs something.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, cast

from balsam.platform.scheduler import DelayedSubmitFail, SchedulerDeleteError, SchedulerInterface
from balsam.platform.scheduler.scheduler import SchedulerNonZeroReturnCode, SchedulerSubmitError
from balsam.schemas import SchedulerBackfillWindow, SchedulerJobLog, SchedulerJobStatus

from deephyper_balsam.sites.local_batch import PYTHON_VARIABLE

logger = logging.getLogger(__name__)

NAME_PREFIX = "balsam-"
NEVER_WORKED_S = 30.0
"""A script that fails before it has run for so long has done no work."""
_COMMAND_TIMEOUT_S = 60.0
ASK_S = 10.0
"""How long a launcher waits for an answer about its own job: its runs wait meanwhile."""
# What a limit that is none counts as, in minutes: a year
UNLIMITED_MIN = 366 * 24 * 60


SubmitError = SchedulerSubmitError
"""A scheduler did not take a job; the message says why."""


class State(Enum):
    """What a batch job does, in our words. `alive` says if it may still run something."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"  # its script ended with an error
    UNKNOWN = "unknown"  # a word that the table of the scheduler lacks: nothing is concluded from it

    @property
    def alive(self) -> bool:
        """Whether it may still run something. An unknown state does: its end is told by a known one."""
        return self not in (State.FINISHED, State.FAILED)


@dataclass(frozen=True)
class Job:
    """One batch job as its scheduler tells it.

    Attributes
    ----------
    id
        The scheduler's number for it.
    state
        In our words.
    queue, project
        As they were asked for.
    num_nodes
        Nodes, 0 when it does not say.
    wall_time_min, time_remaining_min, queued_time_min
        Minutes, 0 when it does not say.
    start_time, end_time
        Seconds since the epoch, None when it does not say.
    exit_code
        What the script ended with; None when it does not say.
    """

    id: int
    state: State
    queue: str = ""
    project: str = ""
    num_nodes: int = 0
    wall_time_min: int = 0
    time_remaining_min: int = 0
    queued_time_min: int = 0
    start_time: float | None = None
    end_time: float | None = None
    exit_code: int | None = None

    @property
    def failed_at_once(self) -> bool:
        """Whether its script ended with an error before it could have done any work."""
        if self.state is not State.FAILED or self.start_time is None or self.end_time is None:
            return False
        return self.end_time - self.start_time < NEVER_WORKED_S

    def status(self) -> SchedulerJobStatus:
        """Return the job in Balsam's words; only for one that is queued or running."""
        return SchedulerJobStatus(
            scheduler_id=self.id,
            state=self.state.value,
            queue=self.queue,
            num_nodes=self.num_nodes,
            wall_time_min=self.wall_time_min,
            project=self.project,
            time_remaining_min=self.time_remaining_min,
            queued_time_min=self.queued_time_min,
        )


@dataclass(frozen=True)
class Request:
    """What is asked of a scheduler: run `script` on `num_nodes` nodes for `wall_time_min` minutes.

    Attributes
    ----------
    environment
        Variables that the script needs and a scheduler may not hand on by itself.
    after
        It starts only when this job is over, however that ended; None: when there is room.
    """

    script: Path
    project: str
    queue: str
    num_nodes: int
    wall_time_min: int
    environment: Mapping[str, str]
    after: int | None = None

    @property
    def name(self) -> str:
        """The job's name: it carries the queue, which schedulers rename or route to another (`queue_of`)."""
        return f"{NAME_PREFIX}{self.queue}"

    @property
    def output(self) -> Path:
        """Where the script's output goes: beside it, under the name that a search looks for."""
        return self.script.with_suffix(".output")


def queue_of(job_name: str, queue: str) -> str:
    """Return the queue that a job was submitted to: the one in its name if it is ours, else what the scheduler says."""
    return job_name[len(NAME_PREFIX) :] if job_name.startswith(NAME_PREFIX) else queue


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it said."""

    code: int
    output: str
    errors: str

    @property
    def said(self) -> str:
        """All of it, for a message."""
        return f"{self.errors}\n{self.output}".strip()


def run_command(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = _COMMAND_TIMEOUT_S,
) -> Answer:
    """Run a scheduler's command. That it cannot be run, or does not end, is an answer too (codes 127 and 124)."""
    try:
        done = subprocess.run(
            list(command),
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Answer(124, "", f"{command[0]} did not answer within {timeout_s:.0f} s")
    except OSError as error:
        return Answer(127, "", f"cannot run {command[0]}: {error.strerror or error}")
    return Answer(done.returncode, done.stdout, done.stderr)


def clock_min(text: str) -> int:
    """Read ``[days-]hours:minutes:seconds`` (or ``minutes:seconds``, ``minutes``) as whole minutes, rounded up.

    Raises
    ------
    ValueError
        When it is something else.
    """
    days, _, clock = text.strip().rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if len(parts) == 1 and not days:
        parts = [0, parts[0], 0]
    elif len(parts) == 2 and not days:
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return int(days or 0) * 24 * 60 + hours * 60 + minutes + (seconds > 0)


def minutes_told(text: object) -> int:
    """Read what `clock_min` reads; 0, as in `Job`, for what is none, such as ``N/A`` or ``NOT_SET``."""
    try:
        return max(0, clock_min(str(text)))
    except ValueError:
        return 0


def queues_of_qstat() -> set[str] | None:
    """Ask ``qstat -Q`` of PBS or Cobalt: two lines of heading, then a queue a line, its name first."""
    answer = run_command(["qstat", "-Q"])
    rows = answer.output.splitlines()[2:]
    return None if answer.code else {row.split()[0] for row in rows if row.strip()}


def local_seconds(text: str, form: str) -> float | None:
    """Read a time in this machine's zone as seconds since the epoch; None when it is no such time."""
    try:
        return time.mktime(time.strptime(text.strip(), form))
    except (ValueError, OverflowError):
        return None


def id_in_last_line(text: str, separator: str) -> int:
    """Return the number before `separator` in the last line, where batch systems print a new job's id.

    Raises
    ------
    ValueError
        When there is none.
    """
    lines = text.strip().splitlines()
    return int(lines[-1].partition(separator)[0]) if lines else int("")


class _Unchanged:
    """A status that agrees with whatever Balsam holds already: nothing is known that would change it."""

    class _Any:
        """Equal to everything: a str or enum on the other side leaves the answer to it."""

        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = None  # type: ignore[assignment]

    state = _Any()


class Withdrawn:
    """The status of a BatchJob that was deleted before it was submitted: it has no id in the scheduler, so id None.

    Balsam's agent asks twice whether an id is among the statuses: first whether there is something to delete, then
    whether the job is gone, of which it would write down the times, and dies where there is no id. Between the two
    it takes the state that is told. So the answers are no, then yes, then "finished", and the BatchJob is done.
    """

    state = State.FINISHED.value

    def __init__(self) -> None:
        self._asked = 0

    def is_there(self) -> bool:
        """Answer the agent's next question."""
        self._asked += 1
        return self._asked % 2 == 0


class Statuses(dict[Any, SchedulerJobStatus]):
    """The jobs that are queued or running; an id that is not among them is looked up before it is denied.

    ``id in statuses`` is what Balsam's agent asks before it calls a BatchJob finished. For the id None see `Withdrawn`.
    """

    def __init__(self, jobs: Sequence[Job], scheduler: type[BatchScheduler]) -> None:
        super().__init__({job.id: job.status() for job in jobs if job.state in (State.QUEUED, State.RUNNING)})
        self._scheduler, self._withdrawn = scheduler, Withdrawn()
        self._present: dict[Any, bool] = {job.id: True for job in jobs if job.state is State.UNKNOWN}

    def __contains__(self, key: object) -> bool:
        if key is None:
            return self._withdrawn.is_there()
        if super().__contains__(key):
            return True
        if key not in self._present:
            self._present[key] = not self._scheduler.has_ended(cast(int, key))
        return self._present[key]

    def __missing__(self, key: object) -> Any:
        return self._withdrawn if key is None else _Unchanged()


class BatchScheduler(SchedulerInterface):  # type: ignore[misc]
    """A scheduler for Balsam's agent, made from a dialect: the abstract methods, which are pure but for `find`."""

    # The last words on jobs that ended, until the agent asks for them; and how often a job was not known any more
    _ended: ClassVar[dict[int, Job]] = {}
    _missed: ClassVar[dict[int, int]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._ended, cls._missed = {}, {}

    @classmethod
    @abstractmethod
    def submit_command(cls, request: Request) -> list[str]:
        """Return the command that submits."""

    @classmethod
    @abstractmethod
    def parse_submit(cls, text: str) -> int:
        """Return the new job's id from what the command printed; ValueError when there is none."""

    @classmethod
    @abstractmethod
    def list_jobs(cls, user: str) -> list[Job]:
        """Return the user's jobs; SchedulerNonZeroReturnCode when the scheduler does not answer."""

    @classmethod
    @abstractmethod
    def find(cls, job_id: int) -> Job | None:
        """Ask for one job; None when the scheduler knows none, SchedulerNonZeroReturnCode when it does not answer."""

    @classmethod
    @abstractmethod
    def delete_command(cls, job_id: int) -> list[str]:
        """Return the command that ends a job."""

    @classmethod
    def known_queues(cls) -> set[str] | None:
        """Return the queues that the scheduler has; None when it does not tell."""
        return None

    @classmethod
    def history(cls, job_id: int, script: Path | None) -> Job | None:
        """Return what is known of a job that the scheduler has forgotten, from wherever it keeps that."""
        return None

    @classmethod
    def ask(cls, command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
        """Run a command and return what it printed.

        Raises
        ------
        SchedulerNonZeroReturnCode
            When it failed: the agent logs that and tries again in its next round.
        """
        answer = run_command(command, environment=environment)
        if answer.code:
            raise SchedulerNonZeroReturnCode(f"{' '.join(command)} ended with {answer.code}: {answer.said}")
        return answer.output

    # ---- what Balsam's agent calls

    @classmethod
    def submit(
        cls,
        script_path: Path | str,
        project: str,
        queue: str,
        num_nodes: int,
        wall_time_min: int,
        cwd: Path | str | None = None,
        after: int | None = None,
        **kwargs: Any,
    ) -> int:
        """Submit the script and return its id in the scheduler; it starts only when the job `after` is over.

        Raises
        ------
        SchedulerSubmitError
            When the scheduler refuses, cannot be run, or answers without an id.
        """
        names = (name for name in os.environ if name.startswith("BALSAM_"))
        environment = {**{name: os.environ[name] for name in names}, PYTHON_VARIABLE: sys.executable}
        request = Request(Path(script_path).absolute(), project, queue, num_nodes, wall_time_min, environment, after)
        command = cls.submit_command(request)
        answer = run_command(command, cwd=Path(cwd) if cwd else None, environment=environment)
        if answer.code:
            raise SchedulerSubmitError(f"{' '.join(command)} ended with {answer.code}: {answer.said}")
        try:
            return cls.parse_submit(answer.output)
        except ValueError as error:
            raise SchedulerSubmitError(
                f"{' '.join(command)} printed no job id that could be read: {answer.said!r}. "
                "Look whether the job is queued, and delete it."
            ) from error

    @classmethod
    def get_statuses(cls, project: str | None = None, user: str | None = None, queue: str | None = None) -> Statuses:
        """Return the user's jobs that are queued or running.

        Raises
        ------
        SchedulerNonZeroReturnCode
            When the scheduler does not answer; the agent then changes nothing.
        """
        if user is None:
            import getpass

            user = getpass.getuser()
        try:
            jobs = cls.list_jobs(user)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SchedulerNonZeroReturnCode(f"cannot read the scheduler's answer: {error!r}") from error
        for job in jobs:
            cls._missed.pop(job.id, None)
        return Statuses(jobs, cls)

    @classmethod
    def has_ended(cls, job_id: int) -> bool:
        """Whether a job that the queue does not show has ended: by what the scheduler says of it, never by silence.

        A job that the scheduler does not know at all is looked up once more in the agent's next round.
        """
        try:
            job = cls.find(job_id)
        except (SchedulerNonZeroReturnCode, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("Cannot tell what became of job %s, which stays as it is: %s", job_id, error)
            return False
        if job is None:
            cls._missed[job_id] = cls._missed.get(job_id, 0) + 1
            logger.info("The scheduler knows no job %s (look %d)", job_id, cls._missed[job_id])
            return cls._missed[job_id] > 1
        cls._missed.pop(job_id, None)
        if not job.state.alive:
            cls._ended[job_id] = job
        return not job.state.alive

    @classmethod
    def delete_job(cls, scheduler_id: int | None) -> str:
        """End a job.

        Raises
        ------
        SchedulerDeleteError
            When the scheduler refuses, or the job was never submitted; the agent logs that.
        """
        if scheduler_id is None:
            raise SchedulerDeleteError("the BatchJob was deleted before it was submitted: there is nothing to end")
        answer = run_command(cls.delete_command(scheduler_id))
        if answer.code:
            raise SchedulerDeleteError(answer.said)
        return answer.output

    @classmethod
    def get_backfill_windows(cls) -> dict[str, list[SchedulerBackfillWindow]]:
        """Return nothing: no part of a search uses them."""
        return {}

    @classmethod
    def parse_logs(cls, scheduler_id: int, job_script_path: Path | str | None) -> SchedulerJobLog:
        """Return when the job started and ended, as far as anybody knows.

        Raises
        ------
        DelayedSubmitFail
            When the script failed before it could have done any work: the BatchJob becomes ``submit_failed``, and the
            reason stands in the script's ``.output`` file.
        """
        script = Path(job_script_path) if job_script_path else None
        job = cls._ended.pop(scheduler_id, None)
        cls._missed.pop(scheduler_id, None)
        try:
            job = job or cls.find(scheduler_id) or cls.history(scheduler_id, script)
        except Exception as error:  # whatever it is, the agent must live
            logger.warning("No times for job %s: %s", scheduler_id, error)
        if job is None:
            return SchedulerJobLog()
        if job.failed_at_once:
            raise DelayedSubmitFail(f"Job {job.id} ended at once, exit code {job.exit_code}")
        return SchedulerJobLog(start_time=_utc(job.start_time), end_time=_utc(job.end_time))

    @classmethod
    def discover_projects(cls) -> list[str]:
        """Return none: Balsam's own asks on the terminal. Projects are named in ``settings.yml``."""
        return []


def _utc(seconds: float | None) -> datetime | None:
    """Balsam keeps times without a zone, in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, tz=timezone.utc).replace(tzinfo=None)
