"""Slurm: the classes that the site configs `slurm`, `perlmutter-cpu`, `perlmutter-gpu` and `frontier` name.

They stand in for Balsam's own, which lose jobs: a failing ``sacct`` ends the agent's scheduler service, long account
names merge with the next column and drop the row, an unknown state is no state, and ``srun`` gets neither launch
parameters nor GPUs. The pages named below are those of https://slurm.schedmd.com.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from balsam.platform.compute_node import ComputeNode
from balsam.platform.scheduler.scheduler import SchedulerNonZeroReturnCode

from deephyper_balsam.launcher.patience import Word
from deephyper_balsam.sites.runs import AllocationRun, PinnedRun, cpu_ids, launch_options, launched
from deephyper_balsam.sites.scheduling import (
    UNLIMITED_MIN,
    Answer,
    BatchScheduler,
    Job,
    Request,
    State,
    id_in_last_line,
    local_seconds,
    minutes_told,
    queue_of,
    run_command,
)

# squeue.html, "JOB STATE CODES". A job that is suspended, or on its way to another state, still holds its allocation.
STATES = {
    "BOOT_FAIL": State.FINISHED,
    "CANCELLED": State.FINISHED,
    "COMPLETED": State.FINISHED,
    "COMPLETING": State.RUNNING,
    "CONFIGURING": State.RUNNING,
    "DEADLINE": State.FINISHED,
    "FAILED": State.FAILED,
    "NODE_FAIL": State.FINISHED,
    "OUT_OF_MEMORY": State.FINISHED,
    "PENDING": State.QUEUED,
    "PREEMPTED": State.FINISHED,
    "REQUEUED": State.QUEUED,
    "REQUEUE_FED": State.QUEUED,
    "REQUEUE_HOLD": State.QUEUED,
    "RESIZING": State.RUNNING,
    "RESV_DEL_HOLD": State.QUEUED,
    "REVOKED": State.FINISHED,
    "RUNNING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "SPECIAL_EXIT": State.QUEUED,
    "STAGE_OUT": State.RUNNING,
    "STOPPED": State.RUNNING,
    "SUSPENDED": State.RUNNING,
    "TIMEOUT": State.FINISHED,
}

# squeue.html, "--format": %o without a number has no width, so that nothing is cut or runs into its neighbour.
_COLUMNS = "%i|%T|%D|%l|%L|%V|%P|%q|%a|%j"
_TIME_FORM = "%Y-%m-%dT%H:%M:%S"
_TIMES = {"SLURM_TIME_FORMAT": "standard"}


def state_of(word: str) -> State:
    """Return our word for Slurm's (``CANCELLED by 0`` is ``CANCELLED``); UNKNOWN for one that the table lacks."""
    return STATES.get(word.split(" ")[0].rstrip("+"), State.UNKNOWN)


def submit_command(request: Request, queue_option: str) -> list[str]:
    """Return the ``sbatch`` command. The queue is given as `queue_option`: ``--partition`` or ``--qos``."""
    return [
        "sbatch",
        "--parsable",
        f"--job-name={request.name}",
        f"--output={_literal(str(request.output))}",
        f"--account={request.project}",
        f"{queue_option}={request.queue}",
        f"--nodes={request.num_nodes}",
        f"--time={request.wall_time_min}",
        *([] if request.after is None else [f"--dependency=afterany:{request.after}"]),
        str(request.script),
    ]


def _literal(path: str) -> str:
    """Sbatch replaces ``%`` in a file name (sbatch.html, "filename pattern")."""
    return path.replace("%", "%%")


def parse_submit(text: str) -> int:
    """Read ``ID`` or ``ID;CLUSTER`` (sbatch.html, ``--parsable``) from the last line.

    Raises
    ------
    ValueError
        When there is no id.
    """
    return id_in_last_line(text, ";")


def queue_command(user: str) -> list[str]:
    """Return the ``squeue`` command that lists the user's jobs."""
    return ["squeue", "--noheader", f"--user={user}", f"--format={_COLUMNS}"]


def parse_queue(text: str, now: float) -> list[Job]:
    """Read what `queue_command` printed, in any number of lines; a line that is no job of its own is passed over."""
    return [job for line in text.splitlines() if (job := _parse_line(line, now)) is not None]


def _parse_line(line: str, now: float) -> Job | None:
    fields = line.split("|", 9)
    if len(fields) != 10 or not fields[0].strip().isdigit():  # 12_3 or 12_[1-4] is a part of an array: never ours
        return None
    number, word, nodes, limit, left, submitted, partition, qos, account, name = fields
    since = local_seconds(submitted, _TIME_FORM)
    queue = partition if qos.strip() in ("", "(null)", "N/A", "normal") else qos
    return Job(
        id=int(number),
        state=state_of(word),
        queue=queue_of(name, queue),
        project=account,
        num_nodes=int(nodes) if nodes.isdigit() else 0,
        wall_time_min=_minutes(limit),
        time_remaining_min=_minutes(left),
        queued_time_min=0 if since is None else max(0, int((now - since) / 60)),
    )


def _minutes(text: str) -> int:
    if text.strip().upper() == "UNLIMITED":
        return UNLIMITED_MIN
    return minutes_told(text)  # NOT_SET, INVALID, Partition_Limit


def job_command(job_id: int) -> list[str]:
    """Return the ``scontrol`` command that shows one job, ended ones for as long as the controller keeps them."""
    return ["scontrol", "-o", "show", "job", str(job_id)]


def parse_job(text: str) -> Job | None:
    """Read the ``Name=value`` words of one job (scontrol.html); None when there is no job in them."""
    fields: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", text):
        fields.setdefault(key, value)  # the first: a path or comment further on may look like a field
    if "JobId" not in fields or "JobState" not in fields:
        return None
    code, _, signal = fields.get("ExitCode", "").partition(":")
    exit_code = (int(code) or 128 * bool(int(signal)) + int(signal)) if code.isdigit() and signal.isdigit() else None
    qos, partition = fields.get("QOS", ""), fields.get("Partition", "")
    return Job(
        id=int(fields["JobId"]),
        state=state_of(fields["JobState"]),
        queue=queue_of(fields.get("JobName", ""), partition if qos in ("", "(null)", "N/A", "normal") else qos),
        project=fields.get("Account", ""),
        num_nodes=int(fields.get("NumNodes", "").partition("-")[0] or 0),
        wall_time_min=_minutes(fields.get("TimeLimit", "")),
        start_time=local_seconds(fields.get("StartTime", ""), _TIME_FORM),
        end_time=local_seconds(fields.get("EndTime", ""), _TIME_FORM),
        exit_code=exit_code,
    )


def history_command(job_id: int) -> list[str]:
    """Return the ``sacct`` command that tells of a job which the controller has forgotten."""
    return ["sacct", "-X", "-n", "-P", "-o", "JobIDRaw,State,Start,End,ExitCode", "-j", str(job_id)]


def parse_history(text: str, job_id: int) -> Job | None:
    """Read what `history_command` printed."""
    for line in text.splitlines():
        number, word, start, end, code = [*line.split("|"), "", "", "", ""][:5]
        if number == str(job_id):
            exit_code = code.partition(":")[0]
            return Job(
                id=job_id,
                state=state_of(word),
                start_time=local_seconds(start, _TIME_FORM),
                end_time=local_seconds(end, _TIME_FORM),
                exit_code=int(exit_code) if exit_code.isdigit() else None,
            )
    return None


class SlurmScheduler(BatchScheduler):
    """Slurm for Balsam's agent, with partitions as queues. An accounting database is used where there is one."""

    queue_option: ClassVar[str] = "--partition"

    @classmethod
    def submit_command(cls, request: Request) -> list[str]:
        """Return the ``sbatch`` command."""
        return submit_command(request, cls.queue_option)

    @classmethod
    def parse_submit(cls, text: str) -> int:
        """Read the new id."""
        return parse_submit(text)

    @classmethod
    def list_jobs(cls, user: str) -> list[Job]:
        """Return what ``squeue`` shows of the user."""
        return parse_queue(cls.ask(queue_command(user), _TIMES), time.time())

    @classmethod
    def find(cls, job_id: int) -> Job | None:
        """Ask ``scontrol`` for one job."""
        answer = run_command(job_command(job_id), environment=_TIMES)
        if answer.code == 0:
            return parse_job(answer.output)
        if "invalid job id" in answer.said.lower():
            return None
        raise SchedulerNonZeroReturnCode(f"scontrol ended with {answer.code}: {answer.said}")

    @classmethod
    def known_queues(cls) -> set[str] | None:
        """Ask ``sinfo`` for the partitions."""
        answer = run_command(["sinfo", "--noheader", "--format=%R"])
        return None if answer.code else set(answer.output.split())

    @classmethod
    def history(cls, job_id: int, script: Path | None) -> Job | None:
        """Ask ``sacct``, which fails where there is no accounting database: then nobody knows."""
        answer = run_command(history_command(job_id), environment=_TIMES)
        return None if answer.code else parse_history(answer.output, job_id)

    @classmethod
    def delete_command(cls, job_id: int) -> list[str]:
        """Return the ``scancel`` command: SIGTERM to everything in the job, SIGKILL after the cluster's KillWait."""
        return ["scancel", str(job_id)]


class SlurmQosScheduler(SlurmScheduler):
    """Slurm whose queues are QOS, as at NERSC; the partition follows from the template's constraint."""

    queue_option: ClassVar[str] = "--qos"

    @classmethod
    def known_queues(cls) -> set[str] | None:
        """Return None: only the accounting database knows the QOS, and not each user may ask it."""
        return None


class SlurmNode(ComputeNode):  # type: ignore[misc]
    """A node of a Slurm job. All nodes of a job are taken to be like the one that the launcher or worker runs on."""

    cpu_ids: ClassVar[list[int]] = cpu_ids()
    gpu_ids: ClassVar[list[int | str]] = []
    # The GPUs of every node, in the order in which runs are given them; empty: those that Slurm says the job has
    gpu_order: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def get_job_nodelist(cls) -> list[SlurmNode]:
        """Return the nodes of this job.

        Raises
        ------
        RuntimeError
            Outside of a Slurm job, or when ``scontrol`` cannot list its nodes.
        """
        listed = os.environ.get("SLURM_JOB_NODELIST")
        if not listed:
            raise RuntimeError("$SLURM_JOB_NODELIST is not set: this is no Slurm job")
        answer = run_command(["scontrol", "show", "hostnames", listed])
        if answer.code:
            raise RuntimeError(f"scontrol show hostnames {listed} ended with {answer.code}: {answer.said}")
        gpus = list(cls.gpu_order) or list(range(gpus_on_node(os.environ)))
        return [cls(name, name, gpu_ids=gpus) for name in answer.output.split()]

    @staticmethod
    def get_scheduler_id() -> int | None:
        """Return this job's id."""
        value = os.environ.get("SLURM_JOB_ID", "")
        return int(value) if value.isdigit() else None


class FrontierNode(SlurmNode):
    """A node of Frontier: 64 cores, of which the system keeps the first of each eight, and eight GPUs.

    The n-th seven cores share their cache with the n-th GPU of the order here.
    """

    cpu_ids: ClassVar[list[int]] = [core for core in range(64) if core % 8]
    gpu_order: ClassVar[tuple[int, ...]] = (4, 5, 2, 3, 6, 7, 0, 1)


class PerlmutterGpuNode(SlurmNode):
    """A GPU node of Perlmutter: 64 cores and four GPUs. The n-th sixteen cores are nearest to the n-th GPU here."""

    cpu_ids: ClassVar[list[int]] = list(range(64))
    gpu_order: ClassVar[tuple[int, ...]] = (3, 2, 1, 0)


def gpus_on_node(environ: Any) -> int:
    """Return how many GPUs of this node belong to the job (sbatch.html: SLURM_GPUS_ON_NODE, SLURM_JOB_GPUS)."""
    count = environ.get("SLURM_GPUS_ON_NODE", "")
    if count.isdigit():
        return int(count)
    return len([gpu for gpu in environ.get("SLURM_JOB_GPUS", "").split(",") if gpu])


# What srun writes when it does not reach the controller
_NOT_REACHED = re.compile(
    r"^s(?:run|lurmstepd): (?:error|fatal): .*(?:Unable to contact slurm controller|Socket timed out on send/recv"
    r"|Zero Bytes were transmitted|Communication connection failure|Connection (?:refused|timed out))",
    re.MULTILINE,
)
# What it writes when the controller refuses a step, as for "Memory required by task is not available" just after it
# came back: excused only then
_REFUSED = re.compile(r"^srun: error: Unable to (?:create step|confirm allocation|allocate resources)\b", re.MULTILINE)


class _EndsWithSlurmJob(AllocationRun):
    """A run that ended with an error while Slurm ends its job counts as running until the launcher stops it.

    Slurm says that it ends a job before it signals anything in it.
    """

    messages: ClassVar[Any] = _NOT_REACHED
    refusals: ClassVar[Any] = _REFUSED
    probes: ClassVar[bool] = False  # srun itself needs what scontrol asks
    job_variable: ClassVar[str] = "SLURM_JOB_ID"
    ask_environment: ClassVar[Mapping[str, str] | None] = _TIMES

    @classmethod
    def ask_command(cls, job_id: int) -> list[str]:
        """Return the ``scontrol`` command."""
        return job_command(job_id)

    @classmethod
    def read_answer(cls, answer: Answer, job_id: int) -> Word:
        """Return what Slurm says: a job that is cancelled, over its time or preempted ends."""
        if answer.code:
            return Word.ENDS if "invalid job id" in answer.said.lower() else Word.AWAY
        word = re.search(r"\bJobState=(\w+)", answer.output)
        alive = word is None or word[1] in ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED")
        return Word.RUNS if alive else Word.ENDS

    def cut(self, code: int) -> bool:
        """Nothing is concluded from a signal: Slurm knows."""
        return False


class SlurmPinnedRun(_EndsWithSlurmJob, PinnedRun):
    """A run of serial mode, started by the worker on its own node, which takes no controller."""

    messages: ClassVar[Any] = None

    @classmethod
    def word(cls) -> Word:
        """What Slurm says of this job; its silence says nothing of a run on this node."""
        word = super().word()
        return Word.RUNS if word is Word.AWAY else word


class SlurmRun(_EndsWithSlurmJob):
    """A run started by ``srun``, on CPUs and GPUs that Balsam chose on the node.

    Steps share the allocation (``--overlap``): Balsam hands out the nodes' parts itself, and Slurm would make the steps
    wait for each other.
    """

    gpu_variable: ClassVar[str] = "CUDA_VISIBLE_DEVICES"
    gpu_order: ClassVar[str] = "CUDA_DEVICE_ORDER=PCI_BUS_ID"

    def _build_cmdline(self) -> str:
        hosts = list(self._node_spec.hostnames)
        words = [
            "srun",
            f"--nodes={len(hosts)}",
            f"--nodelist={','.join(hosts)}",
            f"--ntasks={self.get_num_ranks()}",
            f"--ntasks-per-node={self._ranks_per_node}",
            f"--cpus-per-task={self._cpus_per_task()}",
            "--overlap",
            "--export=ALL",
            "--kill-on-bad-exit=1",
            *self._binding(),
            *self._gpus(),
            *launch_options(self._launch_params, without=("cpu-bind",)),
        ]
        return launched(self, words, "SLURM_LOCALID")

    def _gpus(self) -> list[str]:
        """All of the node's: a step of a job that did not name its GPUs has none, nor has the worker of serial mode."""
        given = any(key.lstrip("-").startswith(("gpu", "gres")) for key in self._launch_params)
        count = gpus_on_node(os.environ)
        return [f"--gpus-per-node={count}"] if count and not given else []

    def _cpus_per_task(self) -> int:
        ranks, threads = max(1, int(self._ranks_per_node)), max(1, int(self._threads_per_rank))
        if self._node_spec.cpu_ids[0]:
            return threads
        # A whole node: the ranks of a run on several, or the worker of serial mode, which starts others
        node_cpus = int(os.environ.get("SLURM_CPUS_ON_NODE", "0") or 0)
        return max(threads, node_cpus // ranks)

    def _binding(self) -> list[str]:
        wanted = self._launch_params.get("cpu-bind", self._launch_params.get("cpu_bind"))
        if wanted:
            return [f"--cpu-bind={wanted}"]
        ids = list(self._node_spec.cpu_ids[0])
        each = len(ids) // self._ranks_per_node if self._ranks_per_node else 0
        if not each:
            return ["--cpu-bind=none"] if self._ranks_per_node == 1 else []
        masks = [sum(1 << int(i) for i in ids[rank * each : (rank + 1) * each]) for rank in range(self._ranks_per_node)]
        return ["--cpu-bind=mask_cpu:" + ",".join(hex(mask) for mask in masks)]


class SlurmAmdRun(SlurmRun):
    """The same on AMD GPUs."""

    gpu_variable: ClassVar[str] = "ROCR_VISIBLE_DEVICES"
    gpu_order: ClassVar[str] = ""


class SlurmAmdPinnedRun(SlurmPinnedRun):
    """A run of serial mode on AMD GPUs."""

    gpu_variable: ClassVar[str] = "ROCR_VISIBLE_DEVICES"
    gpu_environment: ClassVar[Mapping[str, str]] = {}
