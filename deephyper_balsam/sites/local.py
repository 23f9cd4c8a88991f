"""One machine as one node of a Balsam site: the classes that `site-configs/local/settings.yml` names."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import psutil
from balsam.platform.app_run.app_run import TimeoutExpired
from balsam.platform.compute_node.default import DefaultNode
from balsam.platform.scheduler.local import LocalProcessScheduler
from balsam.platform.scheduler.scheduler import DelayedSubmitFail, SchedulerSubmitError
from balsam.schemas import SchedulerJobLog, SchedulerJobStatus

from deephyper_balsam.common import processes
from deephyper_balsam.launcher.forking import ForksPython
from deephyper_balsam.launcher.patience import Patient
from deephyper_balsam.sites.local_batch import ID_VARIABLE, BatchJobs
from deephyper_balsam.sites.scheduling import NEVER_WORKED_S, Withdrawn

_WALL_TIME_GRACE_S = 30.0


class LocalNode(DefaultNode):  # type: ignore[misc]
    """One machine, with so many CPU ids that ``node_packing_count`` alone decides how many jobs it runs at once."""

    cpu_ids: ClassVar[list[int]] = list(range(1024))
    gpu_ids: ClassVar[list[int | str]] = []

    @classmethod
    def get_job_nodelist(cls) -> list[LocalNode]:
        """Return this machine, with the NVIDIA GPUs that it shows under /dev."""
        hostname = socket.gethostname().split(".")[0]
        gpus = sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
        return [cls(hostname, hostname, gpu_ids=gpus)]

    @staticmethod
    def get_scheduler_id() -> int | None:
        """Return the id that `LocalScheduler` gave to the batch job that this process belongs to."""
        value = os.environ.get(ID_VARIABLE)
        return int(value) if value else None


class LocalRun(Patient, ForksPython):
    """A run on this machine: never pinned to CPUs, and ended with every process that it started.

    The command is started once, whatever ``ranks_per_node`` says: there is no MPI here.
    """

    _members: list[psutil.Process]

    def _build_cmdline(self) -> str:
        return str(self._cmdline)

    def _tree(self) -> list[psutil.Process]:
        """Return all processes of the run that were ever seen, the children of those that live included."""
        known = {process.pid: process for process in getattr(self, "_members", [])}
        roots = list(known.values())
        pid = getattr(self._process, "pid", None)
        if pid is not None and self._process.poll() is None:
            with contextlib.suppress(psutil.Error):
                roots.append(psutil.Process(pid))
        for root in roots:
            known.update((member.pid, member) for member in processes.tree(root))
        self._members = list(known.values())
        return self._members

    def terminate(self) -> None:
        """Ask every process of the run to end."""
        for process in self._tree():
            processes.send(process, signal.SIGTERM)
        if getattr(self._process, "pid", None) is None:  # it could not be started
            super().terminate()

    def kill(self) -> None:
        """Kill every process of the run."""
        for process in self._tree():
            processes.send(process, signal.SIGKILL)
        super().kill()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command; after `terminate`, for every process that it had started, too.

        Raises
        ------
        TimeoutExpired
            When some process still runs after `timeout` seconds.
        """
        begin = time.monotonic()
        code = int(super().wait(timeout=timeout))
        members = getattr(self, "_members", [])
        if members:
            left_s = None if timeout is None else max(0.0, timeout - (time.monotonic() - begin))
            if processes.wait_gone(members, 3600.0 if left_s is None else left_s):
                raise TimeoutExpired(cmd=self._cmdline, timeout=timeout)
        return code


class _Statuses(dict[Any, SchedulerJobStatus]):
    """Statuses that tell the agent of a BatchJob withdrawn before it was submitted that it is finished."""

    def __init__(self) -> None:
        super().__init__()
        self._withdrawn = Withdrawn()

    def __contains__(self, key: object) -> bool:
        return self._withdrawn.is_there() if key is None else super().__contains__(key)

    def __missing__(self, key: object) -> Any:
        return self._withdrawn


class LocalScheduler(LocalProcessScheduler):  # type: ignore[misc]
    """Runs each BatchJob at once as a process of this machine, and remembers it on disk (`BatchJobs`).

    Balsam's own knows a job by its pid alone and takes every process of the user for a job.
    """

    @classmethod
    def submit(
        cls,
        script_path: Path | str,
        project: str,
        queue: str,
        num_nodes: int,
        wall_time_min: int,
        cwd: Path | str | None = None,
        **kwargs: Any,
    ) -> int:
        """Start the script now and return its new id.

        Raises
        ------
        SchedulerSubmitError
            When the process cannot be started or recorded.
        """
        script = Path(script_path).resolve()
        try:
            job = _jobs().submit(
                script,
                cwd=Path(cwd) if cwd else script.parent,
                project=project,
                queue=queue,
                num_nodes=num_nodes,
                wall_time_min=wall_time_min,
            )
        except OSError as error:
            raise SchedulerSubmitError(f"Cannot start {script}: {error}") from error
        return job.id

    @classmethod
    def get_statuses(
        cls, project: str | None = None, user: str | None = None, queue: str | None = None
    ) -> dict[int, SchedulerJobStatus]:
        """Return the jobs that run. One over its wall time is ended first, as a batch system would do."""
        jobs = _jobs()
        jobs.sweep()
        statuses = _Statuses()
        for job in jobs.running():
            elapsed_s = job.elapsed_s
            if elapsed_s > job.wall_time_min * 60 + _WALL_TIME_GRACE_S:
                jobs.stop(job)
                continue
            statuses[job.id] = SchedulerJobStatus(
                scheduler_id=job.id,
                state="running",
                queue=job.queue,
                num_nodes=job.num_nodes,
                wall_time_min=job.wall_time_min,
                project=job.project,
                time_remaining_min=max(0, int(job.wall_time_min - elapsed_s / 60)),
                queued_time_min=0,
            )
        return statuses

    @classmethod
    def delete_job(cls, scheduler_id: int | None) -> str:
        """End the job: its launcher is asked to stop its runs in order, then whatever is left is killed."""
        jobs = _jobs()
        for job in jobs.running():
            if job.id == scheduler_id:
                jobs.stop(job)
        return str(scheduler_id)

    @classmethod
    def parse_logs(cls, scheduler_id: int, job_script_path: Path | str | None) -> SchedulerJobLog:
        """Return when the job started and ended.

        Raises
        ------
        DelayedSubmitFail
            When the job failed before it could have done any work. Balsam then shows the BatchJob as
            ``submit_failed``; the reason is in the ``.output`` file beside its script.
        """
        job = _jobs().get(scheduler_id)
        if job is None or job.end_time is None:
            return SchedulerJobLog()
        if job.exit_code and not job.deleted and job.end_time - job.start_time < NEVER_WORKED_S:
            raise DelayedSubmitFail(f"The job script {job.script} ended with exit code {job.exit_code}")
        return SchedulerJobLog(start_time=_utc(job.start_time), end_time=_utc(job.end_time))


def _jobs() -> BatchJobs:
    return BatchJobs(Path(os.environ["BALSAM_SITE_PATH"]))


def _utc(seconds: float) -> datetime:
    """Balsam keeps times without a zone, in UTC."""
    return datetime.fromtimestamp(seconds, tz=timezone.utc).replace(tzinfo=None)
