"""Runs that end while the batch system or a file system is away: charged to nobody, and no launcher dies of it."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_sites_runs import make

from deephyper_balsam.launcher import patience, wall_time
from deephyper_balsam.launcher.patience import Word, folder_is_away
from deephyper_balsam.launcher.serial_mode import fair_worker
from deephyper_balsam.node import failure_policy
from deephyper_balsam.sites import cobalt, local, pbs, runs, slurm
from deephyper_balsam.sites.scheduling import Answer, Statuses

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
import batch_system

KINDS = [slurm.SlurmRun, slurm.SlurmAmdRun, pbs.PolarisRun, pbs.AuroraRun, cobalt.ThetaRun]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(patience, "_clock", lambda: now[0])
    return now


def ended(cls: Any, tmp_path: Path, words: list[Word], code: str = "exit 1") -> Any:
    """A run of a batch system's class whose program has ended; the system's word is the last of `words`."""
    said = {"word": classmethod(lambda _cls: words[-1]), "_build_cmdline": lambda self: code, "_by_words": Counter()}
    made = type("Made", (cls,), {**said, "_answers": None, "_away_at": -1e9, "held_s": 0.0})
    run = make(made, tmp_path, cmdline=code)
    run.start()
    run._process.wait(30)
    return run


@pytest.mark.parametrize("cls", KINDS)
def test_a_run_that_fails_while_its_system_is_away_is_held_and_then_given_back(
    cls: Any, tmp_path: Path, clock: list[float]
) -> None:
    words = [Word.RUNS]
    run = ended(cls, tmp_path, words)
    words.append(Word.AWAY)
    for _ in range(4):
        assert run.poll() is None
        clock[0] += 60
    words.append(Word.RUNS)
    assert run.poll() == 1
    assert run.given_back


@pytest.mark.parametrize("cls", KINDS)
def test_a_run_whose_system_ends_its_allocation_is_left_to_the_launcher(
    cls: Any, tmp_path: Path, clock: list[float]
) -> None:
    words = [Word.RUNS]
    run = ended(cls, tmp_path, words)
    words += [Word.AWAY]
    assert run.poll() is None
    clock[0] += 60
    words += [Word.ENDS]
    assert run.poll() is None
    words += [Word.RUNS]
    clock[0] += 60
    assert run.poll() is None


@pytest.mark.parametrize("cls", KINDS)
def test_a_run_that_fails_while_all_is_well_has_failed(cls: Any, tmp_path: Path, clock: list[float]) -> None:
    run = ended(cls, tmp_path, [Word.RUNS], "exit 3")
    assert run.poll() == 3
    assert not run.given_back
    assert ended(cls, tmp_path, [Word.RUNS], "exit 0").poll() == 0


@pytest.mark.parametrize("cls", [pbs.PolarisRun, cobalt.ThetaRun])
def test_a_system_that_never_answers_here_excuses_nothing(cls: Any, tmp_path: Path, clock: list[float]) -> None:
    run = ended(cls, tmp_path, [Word.AWAY], "exit 4")
    assert run.poll() == 4
    assert not run.given_back


@pytest.mark.parametrize(
    ("line", "excused"),
    [
        ("srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller", True),
        ("srun: error: Unable to create step for job 7: Unable to contact slurm controller (connect failure)", True),
        ("srun: error: Unable to confirm allocation for job 7: Socket timed out on send/recv operation", True),
        ("srun: error: Unable to create step for job 7: Zero Bytes were transmitted or received", True),
        ("srun: error: Unable to create step for job 7: More processors requested than permitted", False),
        ("requests: Connection refused", False),
        ("srun: error: nid000001: task 0: Exited with exit code 1", False),
    ],
)
def test_what_srun_writes_tells_of_a_controller_that_is_back_already_but_not_for_ever(
    line: str, excused: bool, tmp_path: Path, clock: list[float]
) -> None:
    run = ended(slurm.SlurmRun, tmp_path, [Word.RUNS], f"echo '{line}'; exit 1")
    assert run.poll() == 1
    assert run.given_back is excused
    if excused:
        run._by_words[str(tmp_path)] = 3
        run.given_back = False
        clock[0] += 600
        run.poll()
        assert not run.given_back


@pytest.mark.parametrize(("after_s", "excused"), [(3.0, True), (600.0, False)])
def test_a_step_that_is_refused_just_after_the_controllers_return_is_charged_to_nobody(
    after_s: float, excused: bool, tmp_path: Path, clock: list[float]
) -> None:
    words = [Word.RUNS]
    (tmp_path / "second").mkdir()
    first = ended(slurm.SlurmRun, tmp_path, words)
    refused = "srun: error: Unable to create step for job 7: Memory required by task is not available"
    second = make(type(first), tmp_path / "second", cmdline="", outfile_path=tmp_path / "second" / "job.out")
    second._build_cmdline = lambda: f"echo '{refused}'; exit 1"
    words.append(Word.AWAY)
    assert first.poll() is None
    words.append(Word.RUNS)
    clock[0] += after_s
    second.start()
    second._process.wait(30)
    while second.poll() is None:
        clock[0] += 1
    assert second.given_back is excused


def test_an_outage_is_asked_for_once_not_by_each_run(tmp_path: Path, clock: list[float]) -> None:
    asked: list[float] = []
    words = [Word.RUNS]
    first = ended(slurm.SlurmRun, tmp_path, words)

    def word(cls: Any) -> Word:
        asked.append(clock[0])
        return Word.AWAY

    type(first).word = classmethod(word)
    others = [make(type(first), tmp_path, cmdline="") for _ in range(20)]
    for run in others:
        run._build_cmdline = lambda: "exit 1"
        run.start()
        run._process.wait(30)
    assert [run.poll() for run in (first, *others)] == [None] * 21
    assert len(asked) == 1
    clock[0] += 60
    assert [run.poll() for run in (first, *others)] == [None] * 21
    assert len(asked) == 2


# ---- what each system says of its own job


def test_slurms_word(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        (Answer(0, "JobId=1 JobState=RUNNING ", ""), Word.RUNS),
        (Answer(0, "JobId=1 JobState=COMPLETING ", ""), Word.ENDS),
        (Answer(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"), Word.AWAY),
        (Answer(124, "", "scontrol did not answer"), Word.AWAY),
        (Answer(1, "", "slurm_load_jobs error: Invalid job id specified"), Word.ENDS),
        (Answer(127, "", "cannot run scontrol"), Word.RUNS),
    ]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    for answer, word in answers:
        monkeypatch.setattr(runs, "run_command", lambda command, answer=answer, **_: answer)
        assert slurm.SlurmRun.word() is word
        assert slurm.SlurmPinnedRun.word() is (Word.RUNS if word is Word.AWAY else word)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm.SlurmRun.word() is Word.RUNS


@pytest.mark.parametrize(
    ("kind", "scheduler", "cls", "variable"),
    [
        ("pbs", pbs.PBSScheduler, pbs.PolarisRun, "PBS_JOBID"),
        ("cobalt", cobalt.CobaltScheduler, cobalt.ThetaRun, "COBALT_JOBID"),
    ],
)
def test_the_word_of_pbs_and_cobalt(
    kind: str, scheduler: Any, cls: Any, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in batch_system.install(tmp_path / "batch", kind).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(variable, raising=False)
    assert cls.word() is Word.RUNS  # no job of theirs
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#PBS -l select=1\n#PBS -l walltime=00:10:00\nsleep 300\n")
    script.chmod(0o755)
    number = scheduler.submit(script, "p", "prod", 1, 10, cwd=tmp_path)
    try:
        monkeypatch.setenv(variable, f"{number}.server" if kind == "pbs" else str(number))
        assert cls.word() is Word.RUNS
        (tmp_path / "batch" / "states.json").write_text(json.dumps({number: "E" if kind == "pbs" else "killing"}))
        assert cls.word() is Word.ENDS
        (tmp_path / "batch" / "down").touch()
        assert cls.word() is Word.AWAY
        (tmp_path / "batch" / "down").unlink()
    finally:
        scheduler.delete_job(number)
    monkeypatch.setenv("PATH", "/nowhere")
    assert cls.word() is Word.RUNS  # nobody to ask on this node


# ---- the file system


@pytest.mark.parametrize("cls", [local.LocalRun, runs.PinnedRun, slurm.SlurmPinnedRun])
def test_a_run_whose_folder_is_away_is_started_when_it_is_back(
    cls: Any, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = tmp_path / "run"
    run = make(cls, away, cwd=away, outfile_path=away / "job.out", cmdline="echo here", ranks_per_node=1)
    run.start()
    assert run.poll() is None
    clock[0] += 60
    assert run.poll() is None
    away.mkdir()
    clock[0] += 60
    assert run.poll() is None
    assert run.wait(timeout=30) == 0
    assert run.poll() == 0
    assert (away / "job.out").read_text(encoding="utf-8") == "here\n"


def test_a_folder_that_does_not_come_back_is_an_error_and_such_a_run_can_be_ended(
    tmp_path: Path, clock: list[float]
) -> None:
    away = tmp_path / "run"
    runs_ = [make(runs.PinnedRun, away, cwd=away, outfile_path=away / "job.out", cmdline="true") for _ in range(2)]
    for run in runs_:
        run.start()
        assert run.poll() is None
    stopped, waiting = runs_
    stopped.terminate()
    assert stopped.wait(timeout=1) == -15
    clock[0] += 400
    assert waiting.poll() is None  # tried once more
    assert waiting.poll() == 12345
    waiting.terminate()  # whatever stands in the place of a process
    assert not waiting.given_back
    assert waiting.tail_output() == ""


def test_a_run_that_fails_while_its_file_system_is_away_goes_back_to_the_queue(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(runs.PinnedRun, tmp_path, cmdline="exit 1", ranks_per_node=1)
    run.start()
    run._process.wait(30)
    monkeypatch.setattr(patience, "folder_is_away", lambda folder: True)
    assert run.poll() is None
    clock[0] += 60
    assert run.poll() is None
    monkeypatch.setattr(patience, "folder_is_away", lambda folder: False)
    clock[0] += 60
    assert run.poll() == 1
    assert run.given_back


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_errors_of_a_network_file_system_count_as_away_and_a_removed_folder_does_not(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALSAM_SITE_PATH", str(tmp_path))
    (tmp_path / "settings.yml").touch()
    assert not folder_is_away(tmp_path)
    assert not folder_is_away(tmp_path / "removed by its user")
    (tmp_path / "settings.yml").unlink()
    assert folder_is_away(tmp_path / "data")  # the site itself is not there: not mounted

    def listdir(path: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(patience.os, "listdir", listdir)
    assert folder_is_away(tmp_path)


# ---- what the launchers make of it


def test_mpi_mode_gives_a_run_back_and_says_why() -> None:
    class Launcher:
        def check_run(self, run: Any) -> dict[str, Any]:
            return {"state": run.state, "state_timestamp": 7, "state_data": {"returncode": 1}}

    launcher = wall_time.fair_launcher(Launcher)()
    given_back = SimpleNamespace(state="RUN_ERROR", given_back=True)
    why = {"message": failure_policy.GIVEN_BACK}
    assert launcher.check_run(given_back) == {"state": "RUN_TIMEOUT", "state_timestamp": 7, "state_data": why}
    assert launcher.check_run(SimpleNamespace(state="RUN_ERROR", given_back=False))["state"] == "RUN_ERROR"
    assert launcher.check_run(SimpleNamespace(state="RUNNING"))["state"] == "RUNNING"


def test_serial_mode_says_so_too() -> None:
    class Worker:
        def __init__(self) -> None:
            self.app_runs = {1: SimpleNamespace(given_back=True), 2: SimpleNamespace(given_back=False)}
            self.cleaned: list[int] = []

        def cleanup_proc(self, id: int) -> None:
            self.cleaned.append(id)

        def handle_error(self, id: int, retcode: int) -> Any:
            return retcode, "said"

    worker = fair_worker(Worker)()
    assert worker.handle_error(1, 1) == (wall_time.GIVEN_BACK, "")
    assert worker.cleaned == [1]
    assert worker.handle_error(2, 1) == (1, "said")

    put: list[Any] = []

    class Master:
        sig_handler = SimpleNamespace(is_set=lambda: False)
        status_updater = SimpleNamespace(put=lambda job, state, **said: put.append((job, state, said["state_data"])))

        def update_job_states(self, done: Any, errors: Any, started: Any) -> None:
            put.extend(("failed", log) for log in errors)

    wall_time.precise_master(Master)().update_job_states([], [(1, wall_time.GIVEN_BACK, ""), (2, 1, "said")], [])
    assert put == [("failed", (2, 1, "said")), (1, "RUN_TIMEOUT", {"message": failure_policy.GIVEN_BACK})]


# ---- a BatchJob withdrawn before it was submitted


class Service:
    """Balsam's scheduler service with one BatchJob."""

    def __init__(self, statuses: Any, state: str) -> None:
        from balsam.site.service.scheduler import SchedulerService

        self.deleted: list[Any] = []
        self.job = SimpleNamespace(
            id=1, state=state, scheduler_id=None, status_info=None, filter_tags={}, start_time=None, end_time=None
        )
        service: Any = SchedulerService.__new__(SchedulerService)
        objects = SimpleNamespace(filter=lambda **_: [self.job], bulk_update=lambda jobs: None)
        service.client = SimpleNamespace(BatchJob=SimpleNamespace(objects=objects))
        service.scheduler = SimpleNamespace(get_statuses=lambda **_: statuses(), delete_job=self.deleted.append)
        service.site_id, service.username, service.filter_tags = 1, "u", {}
        service.update_site_info = lambda jobs: None
        service.run_cycle()


@pytest.mark.parametrize(
    "statuses", [lambda: Statuses([], slurm.SlurmScheduler), local._Statuses], ids=["batch systems", "local"]
)
def test_a_batch_job_withdrawn_before_it_was_submitted_is_finished_at_the_next_look(statuses: Any) -> None:
    service = Service(statuses, "pending_deletion")
    assert service.job.state == "finished"
    assert service.deleted == []
