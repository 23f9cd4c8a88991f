"""BatchJobs of a local site as processes: started, recorded on disk, known again, ended whole.

Each job has a file ``qsubmit/local-jobs/ID.json`` in the site, so that an agent that starts anew knows its jobs; when
the job ends, the file moves to ``ended/``. A job is one process by pid and start time: neither another process with its
pid nor a reboot looks like a running job. Ids count up from 1 and are never used again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from deephyper_balsam.common import processes
from deephyper_balsam.common.clock import steady
from deephyper_balsam.common.process_id import ProcessId

ID_VARIABLE = "DEEPHYPER_BALSAM_SCHEDULER_ID"
PYTHON_VARIABLE = "DEEPHYPER_BALSAM_PYTHON"
STOP_GRACE_S = 14.0
# The wrapper lives through SIGTERM (by a trap: its child would inherit "ignore") and writes how the script ended.
_WRAPPER = (
    'trap : TERM INT; bash "$1" & child=$!; wait $child; code=$?; '
    "while kill -0 $child 2>/dev/null; do wait $child; code=$?; done; "
    "up=; read -r up _ 2>/dev/null < /proc/uptime; "
    'printf "%s %s %s\\n" "$code" "$(date +%s)" "$up" > "$2.tmp" && mv "$2.tmp" "$2"; exit $code'
)


@dataclass(frozen=True)
class BatchJob:
    """One local batch job.

    Attributes
    ----------
    id
        The scheduler id that Balsam keeps.
    process
        The wrapper of the job's script, leader of the job's session.
    script
        The job script.
    project, queue, num_nodes, wall_time_min
        As they were asked for.
    start_time, end_time
        Seconds since the epoch; `end_time` is None while the job runs.
    exit_code
        What the script ended with; None while it runs, or when nobody saw it.
    deleted
        Whether it was ended on request.
    began_s
        When it began, by a clock that is the same for all processes of the machine and that nobody can set
        (`deephyper_balsam.common.clock.steady`); None in files of an earlier version.
    """

    id: int
    process: ProcessId
    script: str
    project: str
    queue: str
    num_nodes: int
    wall_time_min: int
    start_time: float
    end_time: float | None = None
    exit_code: int | None = None
    deleted: bool = False
    began_s: float | None = None

    @classmethod
    def read(cls, path: Path) -> BatchJob | None:
        """Read a job's file; None when it is gone or broken."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**data, "process": ProcessId.from_dict(data["process"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began, whoever started it and whatever was done to the machine's clock since."""
        return time.time() - self.start_time if self.began_s is None else steady() - self.began_s

    def end_at(self, uptime_s: float) -> float | None:
        """Return when it ended (epoch), from the machine's uptime then; None where that cannot be.

        Some containers show an uptime of their own, which is no time of `steady`.
        """
        if self.began_s is None or not self.began_s - 1 <= uptime_s <= steady() + 1:
            return None
        return self.start_time + max(0.0, uptime_s - self.began_s)

    def write(self, path: Path) -> None:
        """Write the job's file under a temporary name and rename it."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(path)


class BatchJobs:
    """The batch jobs of the local site in `site_path`."""

    def __init__(self, site_path: Path) -> None:
        self.site_path = site_path
        self.folder = site_path / "qsubmit" / "local-jobs"
        self.ended = self.folder / "ended"

    def submit(
        self, script: Path, *, cwd: Path, project: str, queue: str, num_nodes: int, wall_time_min: int
    ) -> BatchJob:
        """Start a script now, its output beside it.

        Raises
        ------
        OSError
            When it cannot be started or recorded.
        """
        self.ended.mkdir(parents=True, exist_ok=True)
        job_id = 1 + max((int(path.stem) for path in self._files()), default=0)
        _, process = processes.start(
            ["bash", "-c", _WRAPPER, "bash", str(script), str(self._end_file(job_id))],
            cwd=cwd,
            env={**os.environ, ID_VARIABLE: str(job_id), PYTHON_VARIABLE: sys.executable},
            log=script.with_suffix(".output"),
        )
        job = BatchJob(
            job_id, process, str(script), project, queue, num_nodes, wall_time_min, time.time(), began_s=steady()
        )
        job.write(self.folder / f"{job_id}.json")
        return job

    def running(self) -> list[BatchJob]:
        """Return the jobs that run. It changes nothing."""
        return [job for job in self._open() if job.process.alive]

    def sweep(self) -> None:
        """File the jobs that ended since the last look, and end what they left running, as a batch system does."""
        for job in self._open():
            if not job.process.alive:
                processes.end(self._strays(job), grace_s=2)
                self._close(job)

    def get(self, job_id: int) -> BatchJob | None:
        """Return a job, running or ended."""
        return BatchJob.read(self.folder / f"{job_id}.json") or BatchJob.read(self.ended / f"{job_id}.json")

    def stop(self, job: BatchJob, grace_s: float = STOP_GRACE_S) -> None:
        """End a job: SIGTERM to what its wrapper started, so that a launcher hands its runs back; then kill all."""
        wrapper = job.process.find()
        deadline = time.monotonic() + grace_s
        told: set[int] = set()
        while wrapper is not None and time.monotonic() < deadline:
            # Again and again: a wrapper that has just begun has no child yet
            with contextlib.suppress(psutil.Error):
                for child in wrapper.children():
                    if child.pid not in told:
                        told.add(child.pid)
                        processes.send(child, signal.SIGTERM)
            if not processes.wait_gone([wrapper], 0.1):
                break
        left = [] if wrapper is None else processes.tree(wrapper)
        processes.end([*left, *self._strays(job)], grace_s=0, first=signal.SIGKILL)
        self._close(replace(job, deleted=True))

    def close_all(self, ended_at: float) -> None:
        """File every job as ended, where their processes are not ours: in a copy of the site, made at that moment."""
        for job in self._open():
            self.ended.mkdir(exist_ok=True)
            ended = replace(job, end_time=max(ended_at, job.start_time))
            ended.write(self.ended / f"{job.id}.json")
            (self.folder / f"{job.id}.json").unlink()
            self._end_file(job.id).unlink(missing_ok=True)

    def _open(self) -> list[BatchJob]:
        jobs = (BatchJob.read(path) for path in sorted(self.folder.glob("*.json")))
        return [job for job in jobs if job is not None]

    def _files(self) -> list[Path]:
        return [path for folder in (self.folder, self.ended) for path in folder.glob("[0-9]*.json")]

    def _end_file(self, job_id: int) -> Path:
        return self.folder / f"{job_id}.end"

    def _strays(self, job: BatchJob) -> list[psutil.Process]:
        """Every process that was started in the job, whoever its parent is now."""
        site_path = str(self.site_path)

        def belongs(process: psutil.Process) -> bool:
            environ = process.environ()
            return environ.get(ID_VARIABLE) == str(job.id) and environ.get("BALSAM_SITE_PATH") == site_path

        return processes.matching(belongs)

    def _close(self, job: BatchJob) -> None:
        end_file = self._end_file(job.id)
        exit_code, end_time = None, job.start_time + job.elapsed_s
        with contextlib.suppress(OSError, ValueError, IndexError):  # a wrapper that was killed writes half of it
            words = end_file.read_text().split()
            exit_code, end_time = int(words[0]), float(words[1])
            end_time = job.end_at(float(words[2])) or end_time
        if not (self.ended / f"{job.id}.json").exists():
            self.ended.mkdir(exist_ok=True)
            # `date` counts whole seconds: a short job must not end before it began
            end_time = max(end_time, job.start_time)
            replace(job, exit_code=exit_code, end_time=end_time).write(self.ended / f"{job.id}.json")
        (self.folder / f"{job.id}.json").unlink(missing_ok=True)
        end_file.unlink(missing_ok=True)
