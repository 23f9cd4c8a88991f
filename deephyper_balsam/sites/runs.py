"""What our runs on compute nodes share: launch parameters as options, GPUs of one rank, CPU ids that a machine has."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from deephyper_balsam.launcher.patience import NeedsScheduler, Patient, Word
from deephyper_balsam.sites.local import LocalRun
from deephyper_balsam.sites.scheduling import ASK_S, Answer, run_command

# SIGTERM and SIGKILL, as Python and as a shell tells them
_SIGNALLED = (-15, 143, -9, 137)
_TOPOLOGY = Path("/sys/devices/system/cpu")


def launch_options(params: Mapping[str, Any], without: Iterable[str] = ()) -> list[str]:
    """Turn a job's ``launch_params`` into the launcher's options.

    ``{"mem": "4G"}`` becomes ``--mem=4G``, ``{"c": 2}`` becomes ``-c 2``, an empty value is an option without one.
    A name that begins with a dash is taken as it is. Underscores in a name count as dashes.

    Parameters
    ----------
    params
        Names and values.
    without
        Names that were used already, with dashes.
    """
    words: list[str] = []
    for key, value in params.items():
        name = key.lstrip("-").replace("_", "-")
        if name in without:
            continue
        option = key if key.startswith("-") else f"-{name}" if len(name) == 1 else f"--{name}"
        text = "" if value is None else str(value)
        if not text:
            words.append(option)
        elif option.startswith("--"):
            words.append(f"{option}={text}")
        else:
            words += [option, text]
    return words


def rank_script(
    command: str, gpu_ids: Sequence[str], gpus_per_rank: int, variable: str, local_rank: str, order: str = ""
) -> str:
    """Return the shell text that one rank runs: it sees only its own GPUs.

    It stands inside the launched command, since launchers overwrite such variables that are set outside.

    Parameters
    ----------
    command
        The rank's command.
    gpu_ids
        GPUs of the run on this node; none: the command alone.
    gpus_per_rank
        GPUs of each rank; 0 gives each rank all of the run's.
    variable
        What names them to the program, such as ``CUDA_VISIBLE_DEVICES``.
    local_rank
        The variable that holds the rank's number on its node.
    order
        Another assignment that belongs to it.
    """
    if not gpu_ids:
        return command
    ids = " ".join(shlex.quote(str(gpu)) for gpu in gpu_ids)
    first = f"${{{local_rank}:-0}} * {gpus_per_rank}"
    chosen = f'"${{g[*]:{first}:{gpus_per_rank}}}"' if gpus_per_rank else '"${g[*]}"'
    assignments = f"{order} {variable}={chosen}".strip()
    return f"g=({ids}); IFS=,; export {assignments}; unset IFS; {command}"


def launched(run: Any, words: Sequence[str], local_rank: str) -> str:
    """Return the command line by which a program of the batch system starts a run's ranks, each with its own GPUs.

    ``exec`` lets the launcher's signals reach that program, whatever preamble an application has.

    Parameters
    ----------
    run
        A run of Balsam's, with `gpu_variable` and `gpu_order`.
    words
        The program and its options.
    local_rank
        The variable that holds the rank's number on its node.
    """
    gpu_ids, each = list(run._node_spec.gpu_ids[0]), int(run._gpus_per_rank)
    text = rank_script(run._cmdline, gpu_ids, each, run.gpu_variable, local_rank, run.gpu_order)
    return f"exec {shlex.join(words)} bash -c {shlex.quote(text)}"


def cpu_ids(available: Iterable[int] | None = None, topology: Path = _TOPOLOGY) -> list[int]:
    """Return the CPU ids that this process may use: one of each core first, then their other hardware threads."""
    ids = sorted(os.sched_getaffinity(0) if available is None else available)

    def thread_of_core(cpu: int) -> int:
        try:
            siblings = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
        except OSError:
            return 0
        numbers: list[int] = []
        for part in siblings.strip().split(","):
            low, _, high = part.partition("-")
            numbers += range(int(low), int(high or low) + 1)
        return sorted(numbers).index(cpu) if cpu in numbers else 0

    return sorted(ids, key=lambda cpu: (thread_of_core(cpu), cpu))


class EndsWithAllocation(Patient):
    """A run that a scheduler ended together with its job did not fail: it is to start again in the next allocation.

    A scheduler signals the runs and the launcher at the same moment. A launcher that sees a run's end before its own
    signal would write an error down. So a run that a signal ended counts as running for `held_s` seconds more: the
    launcher stops it in that time, or the signal was for the run alone.
    """

    held_s: ClassVar[float] = 5.0
    _signalled_at: float | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs or may have been ended with its allocation."""
        code = super().poll()
        if code is None or not self.cut(int(code)):
            return None if code is None else int(code)
        return None

    def cut(self, code: int) -> bool:
        """Whether a run with this exit code is to count as running for now."""
        if code not in _SIGNALLED:
            return False
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
        return time.monotonic() - self._signalled_at < self.held_s


class AllocationRun(NeedsScheduler, EndsWithAllocation):
    """A run in a job of a batch system, which is asked about that job when the run ends with an error.

    Attributes
    ----------
    job_variable
        Where the system leaves the job's id in the environment.
    ask_environment
        What its answer needs in the environment.
    """

    job_variable: ClassVar[str]
    ask_environment: ClassVar[Mapping[str, str] | None] = None

    @classmethod
    def ask_command(cls, job_id: int) -> list[str]:
        """Return the command that tells about a job."""
        raise NotImplementedError

    @classmethod
    def read_answer(cls, answer: Answer, job_id: int) -> Word:
        """Return what such an answer says of the job."""
        raise NotImplementedError

    @classmethod
    def word(cls) -> Word:
        """What the batch system says of this job; where there is nobody to ask, that it runs."""
        number = os.environ.get(cls.job_variable, "").partition(".")[0]  # PBS: 123.server
        if not number.isdigit():
            return Word.RUNS
        answer = run_command(cls.ask_command(int(number)), environment=cls.ask_environment, timeout_s=ASK_S)
        return Word.RUNS if answer.code == 127 else cls.read_answer(answer, int(number))  # 127: no such program here


class PinnedRun(EndsWithAllocation, LocalRun):
    """A run on the node that this process is on: pinned to the CPUs that it was given, ended with all it started.

    It sees its own GPUs alone. Balsam's own names them to CUDA, whatever machine it is.
    """

    gpu_variable: ClassVar[str] = "CUDA_VISIBLE_DEVICES"
    gpu_environment: ClassVar[Mapping[str, str]] = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    _envs: dict[str, str]

    def _set_envs(self) -> None:
        environment = {**os.environ, **self._envs, "OMP_NUM_THREADS": str(self._threads_per_rank)}
        gpu_ids = self._node_spec.gpu_ids[0]
        if gpu_ids:
            environment.update(self.gpu_environment)
            environment[self.gpu_variable] = ",".join(map(str, gpu_ids))
        self._envs = environment

    def _pre_popen(self) -> None:
        wanted = set(self._node_spec.cpu_ids[0]) & os.sched_getaffinity(0)
        self._before = os.sched_getaffinity(0)
        if wanted:
            os.sched_setaffinity(0, wanted)

    def _post_popen(self) -> None:
        os.sched_setaffinity(0, self._before)
