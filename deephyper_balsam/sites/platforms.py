"""One machine as one node of a Balsam site: the classes that `site-configs/local/settings.yml` names."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import psutil
from balsam.platform.app_run.app_run import SubprocessAppRun, TimeoutExpired
from balsam.platform.compute_node.default import DefaultNode
from balsam.platform.scheduler.local import LocalProcessScheduler
from balsam.platform.scheduler.scheduler import DelayedSubmitFail, SchedulerSubmitError
from balsam.schemas import SchedulerJobLog, SchedulerJobStatus

from deephyper_balsam.sites import processes
from deephyper_balsam.sites.processes import ProcessId

SCHEDULER_ID_VARIABLE = "DEEPHYPER_BALSAM_SCHEDULER_ID"
PYTHON_VARIABLE = "DEEPHYPER_BALSAM_PYTHON"
STOP_GRACE_S = 14.0
_WALL_TIME_GRACE_S = 30.0
_NEVER_WORKED_S = 30.0
# The wrapper lives through SIGTERM (by a trap: its child would inherit "ignore") and writes how the script ended.
_WRAPPER = (
    'trap : TERM INT; bash "$1" & child=$!; wait $child; code=$?; '
    "while kill -0 $child 2>/dev/null; do wait $child; code=$?; done; "
    'printf "%s %s\\n" "$code" "$(date +%s)" > "$2.tmp" && mv "$2.tmp" "$2"; exit $code'
)


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
        value = os.environ.get(SCHEDULER_ID_VARIABLE)
        return int(value) if value else None


class LocalRun(SubprocessAppRun):  # type: ignore[misc]
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
    """Statuses that "know" the id None: Balsam's agent dies on a BatchJob deleted before it was submitted."""

    def __contains__(self, key: object) -> bool:
        return key is None or super().__contains__(key)


class LocalScheduler(LocalProcessScheduler):  # type: ignore[misc]
    """Runs each BatchJob at once as a process of this machine, and remembers it on disk.

    Each job has a file under the site's ``qsubmit/local-jobs``, so that an agent that starts anew knows its jobs. A job
    is one process by pid and start time: neither another process with its pid nor a reboot looks like a running job.
    Ids count up from 1 and are never used again.
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
        folder = jobs_folder(_site_path())
        try:
            (folder / "ended").mkdir(parents=True, exist_ok=True)
            scheduler_id = 1 + max((int(path.stem) for path in _records(folder)), default=0)
            _, process = processes.start(
                ["bash", "-c", _WRAPPER, "bash", str(script), str(folder / f"{scheduler_id}.end")],
                cwd=Path(cwd) if cwd else script.parent,
                env={**os.environ, SCHEDULER_ID_VARIABLE: str(scheduler_id), PYTHON_VARIABLE: sys.executable},
                log=script.with_suffix(".output"),
            )
            record = {
                "scheduler_id": scheduler_id,
                "process": process.to_dict(),
                "script": str(script),
                "project": project,
                "queue": queue,
                "num_nodes": num_nodes,
                "wall_time_min": wall_time_min,
                "start_time": time.time(),
            }
            _write_json(folder / f"{scheduler_id}.json", record)
        except OSError as error:
            raise SchedulerSubmitError(f"Cannot start {script}: {error}") from error
        return scheduler_id

    @classmethod
    def get_statuses(
        cls, project: str | None = None, user: str | None = None, queue: str | None = None
    ) -> dict[int, SchedulerJobStatus]:
        """Return the jobs that run. One over its wall time is ended first, as a batch system would do."""
        folder = jobs_folder(_site_path())
        statuses = _Statuses()
        for record in running_jobs(folder):
            elapsed_min = (time.time() - record["start_time"]) / 60
            if elapsed_min * 60 > record["wall_time_min"] * 60 + _WALL_TIME_GRACE_S:
                stop_job(record)
                _close(folder, record)
                continue
            scheduler_id = int(record["scheduler_id"])
            statuses[scheduler_id] = SchedulerJobStatus(
                scheduler_id=scheduler_id,
                state="running",
                queue=record["queue"],
                num_nodes=record["num_nodes"],
                wall_time_min=record["wall_time_min"],
                project=record["project"],
                time_remaining_min=max(0, int(record["wall_time_min"] - elapsed_min)),
                queued_time_min=0,
            )
        return statuses

    @classmethod
    def delete_job(cls, scheduler_id: int | None) -> str:
        """End the job: its launcher is asked to stop its runs in order, then whatever is left is killed."""
        folder = jobs_folder(_site_path())
        for record in running_jobs(folder):
            if record["scheduler_id"] == scheduler_id:
                stop_job(record)
                record["deleted"] = True
                _close(folder, record)
        return str(scheduler_id)

    @classmethod
    def parse_logs(cls, scheduler_id: int, job_script_path: Path | str | None) -> SchedulerJobLog:
        """Return when the job started and ended.

        Raises
        ------
        DelayedSubmitFail
            When the job failed before it could have done any work. Balsam then shows the BatchJob as ``submit_failed``;
            the reason is in the ``.output`` file beside its script.
        """
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((jobs_folder(_site_path()) / "ended" / f"{scheduler_id}.json").read_text())
            begin, end = float(record["start_time"]), float(record["end_time"])
            if record.get("exit_code") not in (0, None) and not record.get("deleted") and end - begin < _NEVER_WORKED_S:
                raise DelayedSubmitFail(
                    f"The job script ended with exit code {record['exit_code']}: {record['script']}"
                )
            return SchedulerJobLog(start_time=_utc(begin), end_time=_utc(end))
        return SchedulerJobLog()


def jobs_folder(site_path: Path) -> Path:
    """Return where the records of the site's local jobs are."""
    return site_path / "qsubmit" / "local-jobs"


def running_jobs(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the jobs that run; those that ended since the last look are filed under ``ended``."""
    running = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if ProcessId.from_dict(record["process"]).alive:
            running.append(record)
        else:
            _close(folder, record)
    return running


def stop_job(record: dict[str, Any], grace_s: float = STOP_GRACE_S) -> None:
    """End one job: SIGTERM to what its wrapper started, so that a launcher hands its runs back; then kill the rest."""
    members = job_processes(record)
    wrapper = ProcessId.from_dict(record["process"]).find()
    if wrapper is not None:
        with contextlib.suppress(psutil.Error):
            for child in wrapper.children():
                processes.send(child, signal.SIGTERM)
        processes.wait_gone([wrapper], grace_s)
    known = {process.pid: process for process in [*members, *job_processes(record)]}
    processes.end(known.values(), grace_s=0, first=signal.SIGKILL)


def job_processes(record: dict[str, Any]) -> list[psutil.Process]:
    """Return every process of the job: the tree of its wrapper, and what left the tree but is in its session."""
    process_id = ProcessId.from_dict(record["process"])
    root = process_id.find()
    if root is None:
        return []
    members = {process.pid: process for process in processes.tree(root)}

    def in_session(process: psutil.Process) -> bool:
        return os.getsid(process.pid) == process_id.pid

    members.update((process.pid, process) for process in processes.matching(in_session))
    return list(members.values())


def _close(folder: Path, record: dict[str, Any]) -> None:
    scheduler_id = record["scheduler_id"]
    end_file = folder / f"{scheduler_id}.end"
    record = {**record, "exit_code": None, "end_time": time.time()}
    with contextlib.suppress(OSError, ValueError):
        code, seconds = end_file.read_text().split()
        record.update(exit_code=int(code), end_time=float(seconds))
    (folder / "ended").mkdir(exist_ok=True)
    _write_json(folder / "ended" / f"{scheduler_id}.json", record)
    (folder / f"{scheduler_id}.json").unlink(missing_ok=True)
    end_file.unlink(missing_ok=True)


def _records(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.json")
    yield from (folder / "ended").glob("*.json")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.replace(path)


def _site_path() -> Path:
    return Path(os.environ["BALSAM_SITE_PATH"])


def _utc(seconds: float) -> datetime:
    """Balsam keeps times without a zone, in UTC."""
    return datetime.fromtimestamp(seconds, tz=timezone.utc).replace(tzinfo=None)


__all__ = ["LocalNode", "LocalRun", "LocalScheduler", "jobs_folder", "running_jobs", "stop_job"]
