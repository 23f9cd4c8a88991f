"""PBS and PALS' ``mpiexec``: the classes that the site configs `polaris-pbs` and `aurora-pbs` name.

Balsam's own scheduler class gives up at the first state that it does not know, and the agent then calls the jobs after
it finished; it reads all times as Eastern ones, and misses users with long names. The formats are those of the
PBS Professional Reference Guide: qsub(1B), qstat(1B) with ``-F json``, qdel(1B).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from balsam.platform import compute_node as balsams
from balsam.platform.scheduler.scheduler import SchedulerNonZeroReturnCode

from deephyper_balsam.launcher.patience import Word
from deephyper_balsam.sites.runs import AllocationRun, PinnedRun, launch_options, launched
from deephyper_balsam.sites.scheduling import (
    Answer,
    BatchScheduler,
    Job,
    Request,
    State,
    id_in_last_line,
    local_seconds,
    minutes_told,
    queue_of,
    queues_of_qstat,
    run_command,
)

# PBS Reference Guide, "Job states" (job_state). FAILED is told from F by the exit status.
STATES = {
    "B": State.RUNNING,  # an array that has begun
    "E": State.RUNNING,  # exiting
    "F": State.FINISHED,
    "H": State.QUEUED,
    "M": State.QUEUED,  # moved to another server
    "Q": State.QUEUED,
    "R": State.RUNNING,
    "S": State.RUNNING,  # suspended
    "T": State.QUEUED,  # in transit
    "U": State.RUNNING,  # suspended for the workstation's user
    "W": State.QUEUED,
    "X": State.FINISHED,  # a part of an array
}
_TIME_FORM = "%a %b %d %H:%M:%S %Y"


def submit_command(request: Request) -> list[str]:
    """Return the ``qsub`` command. Nodes and wall time stand in the script: here they would replace its select."""
    return [
        "qsub",
        *("-N", request.name),
        *("-A", request.project),
        *("-q", request.queue),
        *("-v", environment_words(request.environment)),
        *("-o", str(request.output)),
        *("-j", "oe"),
        *("-k", "doe"),
        *(() if request.after is None else ("-W", f"depend=afterany:{request.after}")),
        str(request.script),
    ]


def environment_words(environment: Mapping[str, str]) -> str:
    """Return variables as ``-v`` takes them: between commas; a value with a comma, space or quote stands in quotes."""
    plain = re.compile(r"[^\s,'\"]*")
    return ",".join(
        f"{name}={value}" if plain.fullmatch(value) else f'{name}="{value}"' for name, value in environment.items()
    )


def parse_submit(text: str) -> int:
    """Read ``1234.server`` from the last line.

    Raises
    ------
    ValueError
        When there is no id.
    """
    return id_in_last_line(text, ".")


def queue_command(user: str) -> list[str]:
    """Return the ``qstat`` command that lists the ids of the user's jobs."""
    return ["qstat", "-u", user]


def parse_queue(text: str) -> list[str]:
    """Return the ids in the first column, in any case without the server's name, which may be cut."""
    found = (re.match(r"\s*(\d+)\.", line) for line in text.splitlines())
    return [match[1] for match in found if match]


def jobs_command(*job_ids: str, ended: bool = False) -> list[str]:
    """Return the ``qstat`` command that tells all of these jobs; with `ended` also of those that ended."""
    return ["qstat", *(["-x"] if ended else []), "-f", "-F", "json", *job_ids]


def parse_jobs(text: str, now: float) -> list[Job]:
    """Read what `jobs_command` printed; an entry that is no job of its own is passed over, the others are read.

    Raises
    ------
    ValueError
        When the text is no JSON.
    """
    data = json.loads(text, strict=False) if text.strip() else {}
    jobs = []
    for name, entry in (data.get("Jobs") or {}).items():
        number = name.partition(".")[0]
        if number.isdigit():  # 12[] and 12[3] are arrays: never ours
            jobs.append(_parse_entry(int(number), entry, now))
    return jobs


def _parse_entry(number: int, entry: Mapping[str, Any], now: float) -> Job:
    asked = entry.get("Resource_List") or {}
    limit = minutes_told(asked.get("walltime"))
    state = STATES.get(str(entry.get("job_state", "")), State.UNKNOWN)
    started = local_seconds(str(entry.get("stime", "")), _TIME_FORM)
    queued = local_seconds(str(entry.get("qtime", "")), _TIME_FORM)
    status = str(entry.get("Exit_status", ""))
    exit_code = int(status) if re.fullmatch(r"-?\d+", status) else None
    # Over 128 (a shell's word) or 256 (PBS's) a signal ended it, below 0 PBS itself
    if state is State.FINISHED and exit_code is not None and 0 < exit_code < 128:
        state = State.FAILED
    ended = None
    if not state.alive:
        ended = local_seconds(str(entry.get("obittime", entry.get("mtime", ""))), _TIME_FORM)
    ran_min = 0 if started is None else max(0, int((now - started) / 60))
    return Job(
        id=number,
        state=state,
        queue=queue_of(str(entry.get("Job_Name", "")), str(entry.get("queue", ""))),
        project=str(entry.get("Account_Name", entry.get("project", ""))),
        num_nodes=int(asked.get("nodect", 0) or 0),
        wall_time_min=limit,
        time_remaining_min=max(0, limit - ran_min),
        queued_time_min=0 if queued is None else max(0, int(((started or now) - queued) / 60)),
        start_time=started,
        end_time=ended,
        exit_code=exit_code,
    )


class PBSScheduler(BatchScheduler):
    """PBS for Balsam's agent."""

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
        """Return what ``qstat`` tells of the user's jobs. One that ends between its two questions is left out."""
        job_ids = parse_queue(cls.ask(queue_command(user)))
        if not job_ids:
            return []
        command = jobs_command(*job_ids)
        answer = run_command(command)
        if answer.code and "Unknown Job" not in answer.said:
            raise SchedulerNonZeroReturnCode(f"{' '.join(command)} ended with {answer.code}: {answer.said}")
        return parse_jobs(answer.output, time.time())

    @classmethod
    def find(cls, job_id: int) -> Job | None:
        """Ask ``qstat`` for one job, with its history where PBS keeps one."""
        command = jobs_command(str(job_id), ended=True)
        answer = run_command(command)
        if answer.code and "history" in answer.said.lower():  # PBS keeps none: only jobs that live are known
            command = jobs_command(str(job_id))
            answer = run_command(command)
        if answer.code and "Unknown Job" in answer.said:
            return None
        if answer.code:
            raise SchedulerNonZeroReturnCode(f"{' '.join(command)} ended with {answer.code}: {answer.said}")
        return next((job for job in parse_jobs(answer.output, time.time()) if job.id == job_id), None)

    @classmethod
    def known_queues(cls) -> set[str] | None:
        """Ask ``qstat -Q``."""
        return queues_of_qstat()

    @classmethod
    def delete_command(cls, job_id: int) -> list[str]:
        """Return the ``qdel`` command: SIGTERM to the job, then SIGKILL after the queue's kill delay."""
        return ["qdel", str(job_id)]


_AURORA_SOCKETS = (range(1, 52), range(53, 104))


class _Hosts:
    """Each host of ``$PBS_NODEFILE`` once: the file names one for each chunk and process."""

    @classmethod
    def get_job_nodelist(cls) -> list[Any]:
        """Return the nodes of this job.

        Raises
        ------
        RuntimeError
            Outside of a PBS job.
        """
        if not os.environ.get("PBS_NODEFILE"):
            raise RuntimeError("$PBS_NODEFILE is not set: this is no PBS job")
        nodes: list[Any] = super().get_job_nodelist()  # type: ignore[misc]
        return list({node.hostname: node for node in reversed(nodes)}.values())[::-1]


class PolarisNode(_Hosts, balsams.PolarisNode):  # type: ignore[misc]
    """A node of Polaris: 32 cores, four GPUs in the order that suits them."""


class AuroraNode(_Hosts, balsams.AuroraNode):  # type: ignore[misc]
    """A node of Aurora: two sockets of 52 cores, of which the system keeps the first, and three GPUs of two tiles each.

    A run has its cores on one socket, that of its tiles if it can; one of more cores than a socket has, half of each.
    """

    cpu_ids: ClassVar[list[int]] = [core for socket in _AURORA_SOCKETS for core in socket]

    def check_fit(self, num_cpus: int, num_gpus: int, occupancy: float) -> bool:
        """Whether a run of this size has room now."""
        fits: bool = super().check_fit(num_cpus, num_gpus, occupancy)
        return fits and len(aurora_cores(num_cpus, self.idle_cpus, self.idle_gpus[:num_gpus])) == num_cpus

    def assign(self, job_id: int, num_cpus: int = 0, num_gpus: int = 0, occupancy: float = 1.0) -> dict[str, Any]:
        """Give a run its part of the node."""
        chosen = aurora_cores(num_cpus, self.idle_cpus, self.idle_gpus[:num_gpus])
        self.idle_cpus: list[Any] = [
            *chosen,
            *(core for core in self.idle_cpus if core not in chosen),
        ]  # the first are taken
        given: dict[str, Any] = super().assign(job_id, num_cpus, num_gpus, occupancy)
        return given


def aurora_cores(count: int, idle: Iterable[int], tiles: Sequence[str] = ()) -> list[int]:
    """Choose `count` of the idle cores of a node of Aurora, on one socket if it has as many; an empty list: no room.

    Parameters
    ----------
    count
        How many cores are wanted.
    idle
        The cores that are free.
    tiles
        What the run gets of the GPUs, such as ``["3.0", "3.1"]``: the socket beside them comes first.
    """
    sockets = [sorted(set(idle) & set(cores)) for cores in _AURORA_SOCKETS]
    if count > len(_AURORA_SOCKETS[0]):
        parts = (-(-count // 2), count // 2)
        if any(len(cores) < part for cores, part in zip(sockets, parts, strict=True)):
            return []
        return [core for cores, part in zip(sockets, parts, strict=True) for core in cores[:part]]
    if tiles and int(tiles[0].partition(".")[0]) >= 3:
        sockets.reverse()
    return next((cores[:count] for cores in sockets if len(cores) >= count), [])


class PolarisRun(AllocationRun):
    """A run started by PALS' ``mpiexec``, on CPUs and GPUs that Balsam chose on the node."""

    job_variable: ClassVar[str] = "PBS_JOBID"
    gpu_variable: ClassVar[str] = "CUDA_VISIBLE_DEVICES"
    gpu_order: ClassVar[str] = "CUDA_DEVICE_ORDER=PCI_BUS_ID"
    node_cpus: ClassVar[int] = 32

    @classmethod
    def ask_command(cls, job_id: int) -> list[str]:
        """Return the ``qstat`` command."""
        return jobs_command(str(job_id))

    @classmethod
    def read_answer(cls, answer: Answer, job_id: int) -> Word:
        """Return what PBS says: a job in the state E or F ends, and so does one that it does not know any more."""
        if answer.code:
            return Word.ENDS if "Unknown Job" in answer.said else Word.AWAY
        try:
            entries = json.loads(answer.output, strict=False)["Jobs"].values()
            return Word.ENDS if any(entry["job_state"] in ("E", "F") for entry in entries) else Word.RUNS
        except (ValueError, KeyError, TypeError, AttributeError):
            return Word.AWAY

    def _build_cmdline(self) -> str:
        hosts = list(self._node_spec.hostnames)
        words = [
            "mpiexec",
            *("-n", str(self.get_num_ranks())),
            *("--ppn", str(self._ranks_per_node)),
            *("--hosts", ",".join(hosts)),
            *self._binding(),
            *launch_options(self._launch_params, without=("cpu-bind", "depth")),
        ]
        return launched(self, words, "PALS_LOCAL_RANKID")

    def _binding(self) -> list[str]:
        given = {key.lstrip("-").replace("_", "-"): str(value) for key, value in self._launch_params.items()}
        ids, ranks = list(self._node_spec.cpu_ids[0]), max(1, int(self._ranks_per_node))
        each = (len(ids) or self.node_cpus) // ranks
        depth = given.get("depth", str(max(1, int(self._threads_per_rank), 0 if ids else each)))
        if "cpu-bind" in given:
            bind = given["cpu-bind"]
        elif not each or (not ids and ranks == 1):
            bind = "none"  # the worker of serial mode needs the whole node
        elif not (ids := ids or self._cores_of_node(each * ranks)):
            bind = "depth"
        else:
            parts = (ids[rank * each : (rank + 1) * each] for rank in range(ranks))
            bind = "list:" + ":".join(",".join(map(str, part)) for part in parts)
        return ["--cpu-bind", bind, "--depth", depth]

    def _cores_of_node(self, count: int) -> list[int]:
        """Return the cores that ranks on whole nodes are bound to; none: `mpiexec` counts them itself."""
        return []


class AuroraRun(PolarisRun):
    """The same on Aurora: tiles of GPUs, and never the cores that are set aside for the system."""

    gpu_variable: ClassVar[str] = "ZE_AFFINITY_MASK"
    # A mask of tiles, such as 3.1, counts them so only in this hierarchy
    gpu_order: ClassVar[str] = "ZE_ENABLE_PCI_ID_DEVICE_ORDER=1 ZE_FLAT_DEVICE_HIERARCHY=COMPOSITE"
    node_cpus: ClassVar[int] = 102

    def _cores_of_node(self, count: int) -> list[int]:
        return aurora_cores(count, AuroraNode.cpu_ids)


class AuroraPinnedRun(PinnedRun):
    """A run of serial mode on Aurora."""

    gpu_variable: ClassVar[str] = "ZE_AFFINITY_MASK"
    gpu_environment: ClassVar[Mapping[str, str]] = {
        "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1",
        "ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE",
    }
