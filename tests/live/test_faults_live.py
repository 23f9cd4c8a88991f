"""Searches that are broken on purpose: whatever is killed or lost, nothing is lost and nothing is done twice.

The long version is ``python -m tests.live.campaign``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import Search
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.gateway import Gateway

from .campaign import RUN, VICTIMS, Campaign, TableReader, Verdict, own_stack
from .conftest import stack_environment
from .proxy import FAULTS, Proxy
from .waiting import wait_for

pytestmark = pytest.mark.live

TWO = """
import sys
from deephyper_balsam import BalsamEvaluator, HpProblem
from deephyper_balsam.errors import SearchRunningError
problem = HpProblem("line")
problem.add_hyperparameter((0.0, 1.0), "x")
settings = {"problem": problem.to_dict(), "method": "random", "options": {}, "seed": 1}
evaluator = BalsamEvaluator(sys.argv[1] + ":run", "local")
print("ready", flush=True)
for line in sys.stdin:
    try:
        evaluator.open(line.strip(), dict(settings), max_evals=1)
        print("drives", flush=True)
    except SearchRunningError as error:
        print("refused", error, flush=True)
    if sys.stdin.readline().strip() == "leave":
        evaluator.close()
        print("left", flush=True)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="live faults "))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_a_driver_that_is_killed_twice_loses_and_repeats_nothing(stack: LocalStack, folder: Path) -> None:
    verdict = Campaign(stack, folder).search("killed", 8, ["driver", "driver"], seed=1)
    assert verdict.wrong == []
    assert len(verdict.killed) == 2
    assert verdict.evaluated == 8
    assert verdict.tables_read > 10


def test_whatever_else_is_killed_the_search_ends_with_what_was_asked(folder: Path) -> None:
    """On a stack of its own: others' searches must not be disturbed."""
    with own_stack() as own:
        verdict = Campaign(own, folder).search("all", 10, VICTIMS, seed=2)
    assert verdict.wrong == []
    assert [killed.split()[0] for killed in verdict.killed] == list(VICTIMS)
    assert verdict.evaluated == 10


def test_of_two_drivers_that_start_at_the_same_moment_exactly_one_drives(stack: LocalStack, folder: Path) -> None:
    run_file = folder / "line_run.py"
    run_file.write_text(RUN)
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(run_file)],
            env=stack_environment(stack),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]

    def say(process: subprocess.Popen[str], word: str) -> None:
        assert process.stdin is not None
        process.stdin.write(word + "\n")
        process.stdin.flush()

    def hear(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    try:
        assert [hear(process) for process in pair] == ["ready", "ready"]
        for number in range(20):
            first, second = pair if number % 2 else pair[::-1]
            say(first, f"race-{number}")
            say(second, f"race-{number}")
            said = {process: hear(process) for process in pair}
            assert sorted(words.split()[0] for words in said.values()) == ["drives", "refused"], said
            [winner] = [process for process, words in said.items() if words == "drives"]
            [loser] = [process for process in pair if process is not winner]
            assert f"process {winner.pid} on {os.uname().nodename}" in said[loser]
            say(loser, "next")
            say(winner, "leave")
            assert hear(winner) == "left"
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def test_lost_requests_lost_answers_errors_and_slowness_lose_and_repeat_nothing(
    stack: LocalStack, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from deephyper_balsam import BalsamEvaluator, HpProblem, Resources
    from deephyper_balsam.store.allocation_request import AllocationRequest

    assert stack.url is not None
    proxy = Proxy(stack.url, seed=4)
    (folder / "plane_run.py").write_text(RUN)
    problem = HpProblem("plane")
    problem.add_hyperparameter((-3.0, 3.0), "x")
    problem.add_hyperparameter((-3.0, 3.0), "y")
    reader = TableReader([folder], "proxied")
    reader.start()
    try:
        evaluator = BalsamEvaluator(
            f"{folder / 'plane_run.py'}:run",
            "local",
            resources=Resources(evals_per_node=3),
            allocation=AllocationRequest(1, wall_time_min=10),
            client_path=proxy.credentials(stack.client_path, folder / "client.yml"),
        )

        def begin_to_fail(progress: Progress) -> None:
            proxy.share = 0.15

        search = Search(problem, evaluator, "proxied", "random", seed=1, log_dir=folder, poll_s=0.3)
        search.search(max_evals=9, on_progress=begin_to_fail)
    finally:
        reader.close()
        proxy.share = 0.0
        proxy.close()
    assert set(proxy.met) == {*FAULTS, "nothing"}
    verdict = Verdict("proxied", [], wrong=reader.wrong)
    Campaign(stack, folder).judge(verdict, 9, folder, folder / "plane_run.calls")
    assert verdict.wrong == []


def test_sigterm_ends_a_driver_soon_while_runs_go_on_and_resume_collects_them(stack: LocalStack, folder: Path) -> None:
    campaign = Campaign(stack, folder)
    run_file = folder / "long_run.py"
    run_file.write_text(RUN.replace("time.sleep(", "time.sleep(8 + "))
    command = [
        "search",
        "run",
        "long",
        "--problem",
        str(folder / "plane.py"),
        "--run",
        str(run_file),
        "--site",
        "local",
    ]
    command += ["--method", "random", "--seed", "1", "--max-evals", "3", "--nodes", "1", "--evals-per-node", "3"]
    driver = campaign.start(command, folder / "first")

    def running() -> int:
        rows = Gateway(stack.client_path).jobs(trial_rows.trial_tags("long"))
        return sum(row["state"] == "RUNNING" for row in rows)

    try:
        wait_for(lambda: running() == 3, "three trials to run")
        driver.send_signal(signal.SIGTERM)
        began_at = time.monotonic()
        assert driver.wait(60) == 130
        took_s = time.monotonic() - began_at
        assert running() == 3  # it did not wait for them
    finally:
        driver.kill()
        driver.wait()
    assert took_s < 30
    resumed = campaign.start(["search", "resume", "long"], folder / "second")
    try:
        assert resumed.wait(120) == 0
    finally:
        resumed.kill()
        resumed.wait()
    calls = run_file.with_suffix(".calls").read_text()
    assert calls.count("began") == calls.count("ended") == 3, calls
    rows = {trial_rows.trial_number(row): row for row in Gateway(stack.client_path).jobs(trial_rows.trial_tags("long"))}
    assert sorted(rows) == [0, 1, 2]
    assert all("gathered" in row["data"] for row in rows.values())


def test_the_reader_of_tables_would_notice_half_a_table() -> None:
    from .campaign import torn

    assert torn("p:x,objective,job_id\n1,2,3\n") is None
    assert torn("p:x,objective,job_id\n1,2") is not None
    assert torn("") is not None
    assert torn("p:x,objective,job_id\n1,2\n") is not None
