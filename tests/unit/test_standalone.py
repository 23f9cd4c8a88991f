"""A search with all that it needs in its allocation: when a stack is taken over, what is ended, what is submitted."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.errors import InputError
from deephyper_balsam.server import standalone
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.server.stack_state import State
from deephyper_balsam.server.standalone import Allocation, Standalone
from deephyper_balsam.sites.cobalt import CobaltScheduler
from deephyper_balsam.sites.configs import site_configs
from deephyper_balsam.sites.pbs import PBSScheduler
from deephyper_balsam.sites.scheduling import Job, Request
from deephyper_balsam.sites.scheduling import State as JobState
from deephyper_balsam.sites.slurm import SlurmScheduler

pytest_plugins = ["balsam_fixtures"]

MACHINES = [config.name for config in site_configs() if config.name != "local"]


class FakeScheduler:
    """A scheduler that knows these jobs."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs = {job.id: job for job in jobs}
        self.looks = 0

    def find(self, number: int) -> Job | None:
        return self.jobs.get(number)

    def has_ended(self, number: int) -> bool:
        self.looks += 1
        return number in self.jobs and not self.jobs[number].state.alive

    def delete_command(self, number: int) -> list[str]:
        return ["touch", f"deleted-{number}"]


def allocation(*jobs: Job, number: int = 7) -> Allocation:
    return Allocation(FakeScheduler(*jobs), number, 2)


@pytest.mark.parametrize(
    ("given", "started_ago_s", "limit_min", "left_min"),
    [(None, 60, 10, 9), (5, 60, 10, 5), (20, 60, 10, 9), (5, None, 0, 5), (5, 60, 0, 5)],
)
def test_the_time_that_is_left_is_the_least_of_what_is_known(
    given: int | None, started_ago_s: float | None, limit_min: int, left_min: int
) -> None:
    start = None if started_ago_s is None else time.time() - started_ago_s
    here = allocation(Job(7, JobState.RUNNING, wall_time_min=limit_min, start_time=start))
    assert here.left_s(given) == pytest.approx(60 * left_min, abs=2)


def test_where_nobody_tells_the_minutes_they_must_be_given() -> None:
    with pytest.raises(InputError, match="give -t"):
        allocation().left_s(None)


@pytest.fixture
def stack(tmp_path: Path) -> LocalStack:
    """A stack as a killed allocation left it: its record says that it runs on another host."""
    made = LocalStack(tmp_path / "balsam")
    made.files.make()
    state = State(host="nid000009")
    state.processes["api"] = standalone_process()
    made.files.save(state)
    (made.folder / "allocation.json").write_text('{"id": 6}')
    return made


def standalone_process() -> Any:
    from deephyper_balsam.common.process_id import ProcessId

    return ProcessId(1, "gone")


@pytest.mark.parametrize(
    ("state", "taken"), [(JobState.FAILED, True), (JobState.FINISHED, True), (JobState.RUNNING, False)]
)
def test_a_stack_is_taken_over_only_when_the_scheduler_says_that_its_allocation_is_over(
    stack: LocalStack, state: JobState, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "_OVER_WITHIN_S", 0.05)
    asked: dict[str, Any] = {}

    def up(**options: Any) -> None:
        asked.update(options)
        raise InputError("not in this test")

    monkeypatch.setattr(stack, "up", up)
    whole = Standalone(stack, "s", allocation(Job(6, state)), lambda: False)
    with pytest.raises(InputError, match="not in this test"):
        whole.run(lambda minutes: [], time.monotonic() + 600, config="slurm")
    assert asked == {"listen": "auto", "takeover": taken, "config": "slurm"}


def test_a_batch_job_that_the_scheduler_starts_again_takes_over_from_itself(stack: LocalStack) -> None:
    (stack.folder / "allocation.json").write_text('{"id": 7}')
    assert Standalone(stack, "s", allocation(Job(7, JobState.RUNNING)), lambda: False)._is_left()


def test_a_stack_that_ended_in_order_needs_nobodys_word(stack: LocalStack) -> None:
    stack.files.save(State())
    here = allocation(Job(6, JobState.FAILED))
    assert not Standalone(stack, "s", here, lambda: False)._is_left()
    assert here.scheduler.looks == 0


def test_what_allocations_before_left_in_balsam_is_ended_and_nothing_of_this_one(
    site: VirtualSite,
    gateway: Any,
    stack: LocalStack,
    client_yml: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = {"site_id": site.id, "num_nodes": 1, "wall_time_min": 9, "queue": "q", "project": "p", "job_mode": "mpi"}
    rows = [gateway.create_batch_job({**kinds, "optional_params": {}, "filter_tags": {}}) for _ in range(2)]
    for row, number in zip(rows, (6, 7), strict=True):
        gateway.adopt_batch_job(row["id"], number, "2026-01-01T00:00:00")
    ended: list[int] = []
    sessions = [
        {"id": 1, "site_id": site.id, "batch_job_id": None},
        {"id": 2, "site_id": site.id, "batch_job_id": rows[0]["id"]},
        {"id": 3, "site_id": site.id + 1, "batch_job_id": rows[0]["id"]},
    ]
    monkeypatch.setattr(gateway, "sessions", lambda: sessions)
    monkeypatch.setattr(gateway, "end_session", ended.append)
    monkeypatch.setattr(stack, "site", lambda: site)
    Standalone(stack, "s", allocation(), lambda: False)._clear(gateway)
    states = {row["id"]: row["state"] for row in gateway.batch_jobs([site.id])}
    assert [states[row["id"]] for row in rows] == ["finished", "running"]
    assert ended == [2]


@pytest.mark.parametrize(("code", "following", "shown"), [(0, 2, 0), (130, 2, 0), (130, 0, 130), (3, 2, 3), (1, 1, 1)])
def test_a_batch_job_that_ended_in_order_and_is_followed_counts_as_done(code: int, following: int, shown: int) -> None:
    assert standalone.exit_code(code, following) == shown


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (SlurmScheduler, "--dependency=afterany:41"),
        (PBSScheduler, "-W depend=afterany:41"),
        (CobaltScheduler, "--dependencies 41"),
    ],
)
def test_a_batch_job_waits_for_the_end_of_the_one_before(scheduler: Any, words: str, tmp_path: Path) -> None:
    request = Request(tmp_path / "a.sh", "p", "q", 2, 60, {}, 41)
    command = " ".join(scheduler.submit_command(request))
    assert f" {words} " in command
    free = " ".join(scheduler.submit_command(Request(tmp_path / "a.sh", "p", "q", 2, 60, {})))
    assert "depend" not in free


# --- search submit --standalone -------------------------------------------------------------------------------------

SUBMIT = ("search", "submit", "s", "--problem", "ackley", "--max-evals", "9", "--standalone")
SHAPE = ("-n", "16", "-t", "20")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Call the command line in an empty folder, with schedulers that note each command and give ids from 101 on."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    for name in ("sbatch",):
        text = f"""#!{sys.executable}
import json, os, pathlib, sys
log = pathlib.Path({str(tmp_path)!r}) / "log"
lines = log.read_text().splitlines() if log.exists() else []
log.write_text("\\n".join([*lines, json.dumps(sys.argv)]))
print(101 + len(lines))
"""
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(work)

    def call(*words: str) -> Result:
        return CliRunner().invoke(main, list(words))

    return call


def commands(tmp_path: Path) -> Sequence[list[str]]:
    log = tmp_path / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def last_words(script: str) -> list[str]:
    """Return the words of the command that a job script ends with."""
    command = script[script.rindex("exec ") :].replace("\\\n", " ")
    return shlex.split(command)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_script_of_every_machine_starts_all_of_it(
    machine: str, call: Callable[..., Result], tmp_path: Path
) -> None:
    queue = {"slurm": "regular", "frontier": "batch", "theta-knl-cobalt": "default"}.get(machine, "debug")
    nodes = ("-n", "2", "-t", "20") if queue == "debug" else SHAPE
    if machine == "theta-knl-cobalt":
        nodes = ("-n", "128", "-t", "20")
    asked = ("--config", machine, "-q", queue, "-A", "m1234", *nodes, "--chain", "3", "--spare-first-node")
    done = call(*SUBMIT, *asked, "--dry-run")
    assert done.exit_code == 0, done.output
    script = done.output[done.output.index("#!/bin/bash") :]
    words = last_words(script.partition("Nothing was")[0])
    folder = tmp_path / "work" / "s.balsam"
    assert words[1:6] == ["$python", "-m", "deephyper_balsam", "standalone", "--dir"]
    assert words[6:9] == [str(folder), "--config", machine]
    assert words[words.index("--chain") + 1] == "2"
    assert words[-1] == "s"
    assert "--spare-first-node" in words
    syntax = subprocess.run(["bash", "-n"], input=script.partition("Nothing was")[0], text=True, capture_output=True)
    assert syntax.returncode == 0, syntax.stderr
    assert not folder.exists()
    assert not commands(tmp_path)


def test_a_chain_is_submitted_at_once_each_after_the_one_before(call: Callable[..., Result], tmp_path: Path) -> None:
    done = call(*SUBMIT, "--config", "slurm", "-q", "regular", "-A", "m1", *SHAPE, "--chain", "3", "--kappa", "1.5")
    assert done.exit_code == 0, done.output
    assert "Submitted batch jobs 101, 102, 103: 16 nodes for 20 min, one after the other; 16 node-hours" in done.output
    folder = tmp_path / "work" / "s.balsam"
    sent = commands(tmp_path)
    assert [[word for word in words if "depend" in word] for words in sent] == [
        [],
        ["--dependency=afterany:101"],
        ["--dependency=afterany:102"],
    ]
    chains = [last_words(Path(words[-1]).read_text(encoding="utf-8")) for words in sent]
    assert [words[words.index("--chain") + 1] for words in chains] == ["2", "1", "0"]
    assert standalone.queued(folder) == [101, 102, 103]
    assert yaml.safe_load((folder / "search.yaml").read_text()) == {
        "problem": "ackley",
        "max_evals": 9,
        "kappa": 1.5,
        "log_dir": str(tmp_path / "work"),
    }
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_second_submission_while_the_first_lives_is_refused(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (*SUBMIT, "--config", "slurm", "-q", "regular", "-A", "m1", *SHAPE)
    assert call(*asked).exit_code == 0
    monkeypatch.setattr(SlurmScheduler, "has_ended", lambda number: False)
    again = call(*asked)
    assert again.exit_code == 2
    assert "Batch job 101" in again.output
    assert "scancel 101" in again.output
    assert len(commands(tmp_path)) == 1
    monkeypatch.setattr(SlurmScheduler, "has_ended", lambda number: True)
    assert call(*asked).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "nowhere", "-q", "regular", "-A", "m1"), "There is no site config 'nowhere'"),
        (("--config", "local"), "has no batch system"),
        (("--config", "perlmutter-gpu", "-q", "fast", "-A", "m1"), "fast is none of them: regular, debug"),
        (("--config", "perlmutter-gpu", "-q", "debug", "-A", "m1"), "takes 1 to 8 nodes"),
        (("--config", "slurm", "-q", "regular"), "-A says which"),
        ((), "needs --config"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    options: tuple[str, ...], message: str, call: Callable[..., Result], tmp_path: Path
) -> None:
    done = call(*SUBMIT, *SHAPE, *options)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not commands(tmp_path)
    assert not list((tmp_path / "work").iterdir())


def test_without_standalone_its_options_are_refused(call: Callable[..., Result]) -> None:
    done = call("search", "submit", "s", "--problem", "ackley", "--max-evals", "9", "--site", "x", "--config", "slurm")
    assert (done.exit_code, "are for --standalone" in done.output) == (2, True)


def test_outside_of_a_batch_job_standalone_says_so(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    done = call("standalone", "--config", "slurm", "s", "--problem", "ackley", "--max-evals", "3")
    assert (done.exit_code, "no batch job" in done.output) == (2, True)
    assert call("standalone", "--config", "slurm", "s").exit_code == 2
    assert not list((tmp_path / "work").iterdir())
