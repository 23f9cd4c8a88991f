"""Whole searches on the real local Balsam: asynchrony in Balsam's own log, failures, resuming, stopping, quickstart."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway

from .conftest import leftovers, stack_environment
from .waiting import wait_for

pytestmark = pytest.mark.live

APPS = Path(__file__).parents[2] / "apps"
CLI = [sys.executable, "-m", "deephyper_balsam"]
LONG_S = 30.0
EVALS = 24

# The space stands in a file of its own: the run then imports nothing, and begins at once
PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
problem.add_hyperparameter((-3.0, 3.0), "y")
"""
RUN_UNEQUAL = f"""
import time
def run(job):
    time.sleep({LONG_S} if job.id == 0 else 0.2 + abs(job["x"] + job["y"]) / 4)
    return -(job["x"] ** 2) - job["y"] ** 2
"""
RUN_SOMETIMES_FAILS = """
import pathlib
def run(job):
    with open(pathlib.Path(__file__).with_name("calls.txt"), "a") as calls:
        print(job.id, file=calls)
    if job.id == 0:
        raise ValueError("too wide")
    if job.id == 1:
        return float("nan")
    if job.id == 2:
        return None
    if job.id == 3:
        print("BALSAM-RETURN-VALUE gASVAAAA")
        print("BALSAM-EXCEPTION nonsense", flush=True)
    if job.id == 4:
        return "F_out_of_memory"
    return job["x"]
"""
RUN_ALWAYS_FAILS = """
def run(job):
    raise RuntimeError("no licence")
"""
RUN_HELD = """
import pathlib, time
def run(job):
    hold = pathlib.Path(__file__).with_suffix(".hold")
    while job.id >= 2 and hold.exists():
        time.sleep(0.1)
    return job["x"]
"""


@dataclass
class Done:
    code: int
    out: str
    err: str


@dataclass
class World:
    """A folder to work in, and the environment of commands that reach the stack."""

    folder: Path
    env: dict[str, str]
    gateway: Gateway

    def file(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def start(self, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*CLI, *arguments],
            env=self.env,
            cwd=cwd or self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def cli(self, *arguments: str, cwd: Path | None = None, timeout_s: float = 120) -> Done:
        return end(self.start(*arguments, cwd=cwd), timeout_s)

    def balsam(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("balsam")), *arguments]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def trials(self, name: str) -> dict[int, dict[str, Any]]:
        """The jobs of a search by trial number; no number twice."""
        rows = [(int(row["tags"]["trial"]), row) for row in self.gateway.jobs({"search": name})]
        assert len(rows) == len(dict(rows))
        return dict(rows)

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("search", "status", name, "--json").out)
        return found


def end(process: subprocess.Popen[str], timeout_s: float = 120) -> Done:
    """Wait for a command; it is killed when it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert "Traceback" not in err, err
    return Done(process.returncode, out, err)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def world(stack: LocalStack) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="live search "))
    world = World(folder, stack_environment(stack), Gateway(stack.client_path))
    world.file("problem.py", PROBLEM)
    yield world
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def allocation(world: World) -> Iterator[int]:
    """A BatchJob that runs whatever search has work, so that not every test has to wait for one of its own."""
    site = world.gateway.site("local")
    batch_job = world.gateway.create_batch_job(
        {
            "site_id": site["id"],
            "num_nodes": 1,
            "wall_time_min": 30,
            "queue": "local",
            "project": "local",
            "job_mode": "mpi",
            "optional_params": {},
            "filter_tags": {},
        }
    )
    running = lambda: [row["id"] for row in world.gateway.batch_jobs([site["id"]], ["running"])]  # noqa: E731
    wait_for(lambda: batch_job["id"] in running(), "the allocation to run")
    yield batch_job["id"]
    world.gateway.end_batch_job(batch_job["id"])
    wait_for(lambda: batch_job["id"] not in running(), "the allocation to end")


@pytest.fixture(scope="module")
def shell_search(world: World, allocation: int) -> Iterator[subprocess.Popen[str]]:
    """The search of a shell command; it runs beside other tests, to save time."""
    arguments = ["--problem", str(APPS / "shell_command"), "--site", "local", "--evals-per-node", "4", "--seed", "5"]
    driver = world.start("search", "run", "command", *arguments, "--max-evals", "3")
    yield driver
    driver.kill()
    driver.communicate()


# --- one search with the model, looked at while it runs ---------------------------------------------------------------


@dataclass
class Watched:
    world: World
    done: Done
    seen: dict[str, str]  # what Balsam's own commands printed while it ran
    status: dict[str, Any]
    second: Done
    pid: int


@pytest.fixture(scope="module")
def watched(world: World) -> Watched:
    """AMBS on runs of unequal length, 3 at a time; trial 0 outlasts most of the others."""
    run = world.file("unequal.py", RUN_UNEQUAL)
    arguments = ["search", "run", "unequal", "--problem", "problem.py", "--run", run, "--site", "local", "--seed", "7"]
    arguments += ["--num-initial", "3", "--max-evals", str(EVALS), "--nodes", "1", "--evals-per-node", "3"]
    driver = world.start(*arguments)
    try:
        wait_for(
            lambda: any(row["state"] == "RUNNING" for row in world.trials("unequal").values()) or driver.poll(),
            "a trial to run",
        )
        commands = ("app ls", "job ls", "queue ls", "site ls", "job ls --tag search=unequal --tag trial=1")
        seen = {command: world.balsam(*command.split()) for command in commands}
        status = world.status("unequal")
        second = world.cli(*arguments)
        assert driver.poll() is None, "the search ended before it was looked at"
        done = end(driver)
    finally:
        driver.kill()
    return Watched(world, done, seen, status, second, driver.pid)


def test_a_search_runs_to_its_budget_and_says_what_it_found(watched: Watched) -> None:
    assert watched.done.code == 0, watched.done
    assert f"{EVALS} done" in watched.done.out
    assert "Best objective" in watched.done.out
    assert "best" in watched.done.err
    assert "left" in watched.done.err
    rows = read_csv(watched.world.folder / "unequal" / "results.csv")
    assert [int(row["job_id"]) for row in rows] == list(range(EVALS))
    assert all(row["job_status"] == "DONE" for row in rows)
    best = max(rows, key=lambda row: float(row["objective"]))
    assert f"(trial {best['job_id']})" in watched.done.out
    assert float(best["objective"]) == pytest.approx(-(float(best["p:x"]) ** 2) - float(best["p:y"]) ** 2)


def test_balsams_own_commands_show_a_search_that_runs(watched: Watched) -> None:
    assert "unequal_run" in watched.seen["app ls"]
    trials = [line for line in watched.seen["job ls"].splitlines() if "'search': 'unequal'" in line]
    assert len(trials) >= 3
    assert all("'trial': " in line and "unequal_run" in line for line in trials)
    assert any("RUNNING" in line for line in trials)
    tagged = [
        line for line in watched.seen["job ls --tag search=unequal --tag trial=1"].splitlines() if "unequal" in line
    ]
    assert len(tagged) == 1
    [batch_job] = [line for line in watched.seen["queue ls"].splitlines() if "'search': 'unequal'" in line]
    assert "running" in batch_job
    assert "local" in watched.seen["site ls"]
    assert "Yes" in watched.seen["site ls"]


def test_status_names_the_driver_and_the_trials_while_it_runs(watched: Watched) -> None:
    assert watched.status["driver"]["pid"] == watched.pid
    assert watched.status["states"]["RUNNING"] >= 1
    assert watched.status["settings"]["method"] == "ambs"


def test_a_second_driver_is_refused_by_host_and_process_of_the_first(watched: Watched) -> None:
    assert watched.second.code == 2
    assert f"process {watched.pid} on {os.uname().nodename}" in watched.second.err
    assert "search stop unequal" in watched.second.err
    assert watched.second.err.count("Error: ") == 1


@dataclass
class Span:
    """When Balsam saw a trial run, by its event log."""

    began: float
    ended: float


def spans(world: World, name: str) -> dict[int, Span]:
    """The runs of a search by trial number, once Balsam knows of every end; each ran exactly once."""
    number = {row["id"]: trial for trial, row in world.trials(name).items()}

    def read() -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        began: dict[int, list[float]] = {}
        ended: dict[int, list[float]] = {}
        for event in world.gateway.events(tags=[f"search:{name}"]):
            if event["to_state"] == "RUNNING":
                began.setdefault(number[event["job_id"]], []).append(parse_time(event["timestamp"]))
            elif event["from_state"] == "RUNNING":
                ended.setdefault(number[event["job_id"]], []).append(parse_time(event["timestamp"]))
        return began, ended

    # A run delivers its result itself, some time before Balsam's launcher sees it end
    wait_for(lambda: read()[0].keys() == read()[1].keys(), "Balsam to log the ends", 30)
    began, ended = read()
    assert all(len(times) == 1 for times in [*began.values(), *ended.values()]), (began, ended)
    return {trial: Span(began[trial][0], ended[trial][0]) for trial in began}


def test_new_configurations_start_while_others_run_and_after_some_ended(watched: Watched) -> None:
    runs = spans(watched.world, "unequal")
    assert sorted(runs) == list(range(EVALS))
    long = runs.pop(0)
    assert long.ended - long.began >= LONG_S - 1
    # While trial 0 ran, others began after others had ended, again and again: nothing waits for a generation
    inside = [run for run in runs.values() if long.began < run.began and run.ended < long.ended]
    assert len(inside) >= 4
    followers = [run for run in inside if any(other.ended < run.began for other in inside)]
    assert len(followers) >= 2
    # and two at a time beside it
    assert any(one is not two and one.began < two.began < one.ended for one in inside for two in inside)


def test_the_surrogate_learnt_results_while_other_runs_were_still_going(watched: Watched) -> None:
    runs, trials = spans(watched.world, "unequal"), watched.world.trials("unequal")
    asked = {number: row["data"]["asked"] for number, row in trials.items()}
    order = {row["data"]["gathered"]["order"]: number for number, row in trials.items()}
    long = runs[0]
    modelled = [number for number in sorted(asked) if asked[number]["kind"] == "model"]
    assert len(modelled) >= 6
    learnt = [asked[number]["model"] for number in modelled]
    assert learnt == sorted(learnt)
    assert learnt[0] > 0
    assert len(set(learnt)) >= 3
    assert all(asked[number]["model"] <= asked[number]["told"] for number in asked)
    # While trial 0 was running, a configuration was asked from a model that had learnt results that ended meanwhile,
    # and its run began; so the model was updated between, and nothing waited for trial 0.
    proofs = [
        number
        for number in modelled
        if asked[number]["at"] < long.ended
        and runs[number].began < long.ended
        and all(long.began < runs[order[i]].ended < asked[number]["at"] for i in range(asked[number]["model"]))
    ]
    assert len({asked[number]["model"] for number in proofs}) >= 2, (asked, runs)


def test_a_search_that_is_done_can_be_read_from_any_folder(watched: Watched, tmp_path: Path) -> None:
    world = watched.world
    best = json.loads(world.cli("search", "best", "unequal", "-n", "2", "--json", cwd=tmp_path).out)
    assert len(best) == 2
    assert best[0]["objective"] >= best[1]["objective"]
    rows = json.loads(world.cli("search", "results", "unequal", "--json", cwd=tmp_path).out)
    written = read_csv(world.folder / "unequal" / "results.csv")
    assert list(rows[0]) == list(written[0])
    assert [row["objective"] for row in rows] == [float(row["objective"]) for row in written]
    assert world.status("unequal")["driver"] is None
    assert list(tmp_path.iterdir()) == []


def test_the_allocation_that_the_search_asked_for_has_ended(watched: Watched) -> None:
    site = watched.world.gateway.site("local")
    mine = lambda: [  # noqa: E731
        row["state"]
        for row in watched.world.gateway.batch_jobs([site["id"]])
        if row["filter_tags"] == {"search": "unequal"}
    ]
    wait_for(lambda: mine() == ["finished"], "the BatchJob to be finished", 30)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shell_search")
def test_failures_are_states_with_reasons_and_the_search_goes_on(world: World, allocation: int) -> None:
    some = world.file("some.py", RUN_SOMETIMES_FAILS)
    every = world.file("every.py", RUN_ALWAYS_FAILS)
    common = [
        "--problem",
        "problem.py",
        "--site",
        "local",
        "--method",
        "random",
        "--seed",
        "1",
        "--evals-per-node",
        "4",
    ]
    first = world.start("search", "run", "some-fail", "--run", some, *common, "--max-evals", "8")
    second = world.start("search", "run", "all-fail", "--run", every, *common, "--max-evals", "3")
    done, none = end(first), end(second)

    assert done.code == 0, done
    assert "4 done, 4 failed" in done.out.replace("\n", " ")
    rows = {int(row["job_id"]): row for row in read_csv(world.folder / "some-fail" / "results.csv")}
    assert {number for number, row in rows.items() if row["job_status"] == "FAILED"} == {0, 1, 2, 4}
    assert rows[0]["m:failure"] == "ValueError: too wide"
    assert "nan" in rows[1]["m:failure"]
    assert "None" in rows[2]["m:failure"]
    assert rows[4]["m:failure"] == "out_of_memory"
    assert all(rows[number]["objective"] == "" for number in (0, 1, 2, 4))
    assert float(rows[3]["objective"]) == pytest.approx(float(rows[3]["p:x"]))  # Balsam's own words were printed

    trials = world.trials("some-fail")
    assert "raise ValueError" in trials[0]["data"]["result"]["traceback"]
    assert sorted(map(int, (world.folder / "calls.txt").read_text().split())) == list(range(8))  # and by itself
    states = lambda: {row["state"] for row in world.trials("some-fail").values()}  # noqa: E731
    wait_for(lambda: states() == {"JOB_FINISHED"}, "Balsam to finish the jobs", 90)  # to Balsam, no run failed
    assert sorted(spans(world, "some-fail")) == list(range(8))  # each exactly once, by Balsam's log

    assert none.code == 1, none
    assert "3 failed" in none.out
    assert "No trial has an objective" in none.out
    status = world.status("all-fail")
    assert status["failures"] == {"RuntimeError: no licence": 3}
    assert world.cli("search", "best", "all-fail").code == 1


# --- the Python API, resuming -----------------------------------------------------------------------------------------


def test_random_search_from_python_with_a_function_that_no_file_has(
    world: World, allocation: int, balsam_env: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from deephyper_balsam import BalsamEvaluator, HpProblem, RandomSearch, Resources

    caplog.set_level("INFO", logger="deephyper_balsam")
    problem = HpProblem("square")
    problem.add_hyperparameter((-2, 2), "x")
    problem.add_hyperparameter(["a", "b"], "kind")
    factor = 10.0

    def square(job: Any) -> dict[str, Any]:
        return {"objective": factor * job["x"] ** 2, "metadata": {"kind": job["kind"], "list": [1, 2]}}

    def search(max_evals: int, folder: Path, run: Callable[[Any], Any]) -> Any:
        evaluator = BalsamEvaluator(run, "local", resources=Resources(evals_per_node=4))
        return RandomSearch(problem, evaluator, "python", seed=3, log_dir=folder, poll_s=0.3).search(
            max_evals=max_evals
        )

    frame = search(3, tmp_path / "first", square)
    fixed = "objective job_id job_status m:timestamp_submit m:timestamp_start m:timestamp_end m:timestamp_gather"
    more = "m:duration m:balsam_job_id m:site m:node m:failure m:code m:kind m:list"
    columns = ["p:x", "p:kind", *fixed.split(), *more.split()]
    assert list(frame.columns) == columns
    rows = read_csv(tmp_path / "first" / "python" / "results.csv")
    assert list(rows[0]) == columns
    assert [float(row["objective"]) for row in rows] == [10 * int(row["p:x"]) ** 2 for row in rows]
    assert list(frame["m:kind"]) == list(frame["p:kind"])
    assert list(frame["objective"]) == [float(row["objective"]) for row in rows]
    assert set(rows[0]["m:site"].split()) == {"local"}
    for row in rows:
        times = [float(row[f"m:timestamp_{moment}"]) for moment in ("submit", "start", "end", "gather")]
        assert 0 <= times[0] <= times[1] <= times[2] <= times[3] < 120

    # Once more with a larger budget, in an empty folder: Balsam alone knows what was done
    # There are 10 configurations: it ends by itself when each was evaluated, and says so.
    again = search(50, tmp_path / "second", square)
    assert list(again["job_id"]) == list(range(10))
    assert again.iloc[:3].drop(columns="m:failure").equals(frame.drop(columns="m:failure"))
    assert len(set(zip(again["p:x"], again["p:kind"], strict=True))) == 10
    wait_for(lambda: sorted(spans(world, "python")) == list(range(10)), "Balsam to log each run exactly once")
    assert "Every configuration of the space has been evaluated" in caplog.text

    # and an anonymous function, under the same name, is another search
    from deephyper_balsam.errors import SearchExistsError

    with pytest.raises(SearchExistsError, match="run"):
        search(50, tmp_path / "third", lambda job: job["x"])


def test_a_shell_command_is_searched(world: World, shell_search: subprocess.Popen[str]) -> None:
    done = end(shell_search)
    assert done.code == 0, done
    rows = read_csv(world.folder / "command" / "results.csv")
    assert [row["job_status"] for row in rows] == ["DONE"] * 3
    assert all(0.5 < float(row["objective"]) <= 1 for row in rows)


# --- stopping ---------------------------------------------------------------------------------------------------------


def held_search(world: World, name: str, *more: str) -> list[str]:
    """A search whose first two runs end at once, and all others when the file NAME.hold is gone."""
    run = world.file(f"{name}.py", RUN_HELD)
    problem = str(world.folder / "problem.py")  # from any folder
    common = ["--problem", problem, "--run", run, "--site", "local", "--method", "random", "--seed", "2"]
    return ["search", "run", name, *common, "--evals-per-node", "2", *more]


def busy(world: World, name: str) -> bool:
    """Whether of a search something has ended, something runs, and something waits."""
    rows = list(world.trials(name).values())
    return (
        any("gathered" in row["data"] for row in rows)
        and any(row["state"] == "RUNNING" and "result" not in row["data"] for row in rows)
        and any(row["state"] == "PREPROCESSED" and not row.get("session_id") for row in rows)  # no launcher holds it
    )


def test_search_stop_ends_a_driver_elsewhere_and_withdraws_what_waits(
    world: World, allocation: int, tmp_path: Path
) -> None:
    world.file("stopped.hold", "")
    driver = world.start(*held_search(world, "stopped", "--max-evals", "60"))
    try:
        wait_for(lambda: busy(world, "stopped"), "the search to be busy")
        said = world.cli("search", "stop", "stopped", "--now", cwd=tmp_path)
        done = end(driver, 30)
    finally:
        driver.kill()
    assert said.code == 0, said
    assert f"process {driver.pid}" in said.out
    assert "Stopped." in said.out
    assert done.code == 0, done  # it was ended in order, and has a result
    rows = read_csv(world.folder / "stopped" / "results.csv")
    assert {row["job_status"] for row in rows} == {"DONE", "RUNNING", "CANCELLED"}
    (world.folder / "stopped.hold").unlink()
    # What ran goes on to its end, by itself, and counts
    wait_for(lambda: "RUNNING" not in world.status("stopped")["states"], "the last runs to end", 40)
    status = world.status("stopped")
    assert set(status["states"]) <= {"DONE", "CANCELLED"}  # what a launcher had fetched may run all the same
    assert status["states"]["DONE"] >= 4
    assert status["driver"] is None
    again = world.cli("search", "stop", "stopped")
    assert again.code == 0
    assert "Nobody drives stopped; 0 waiting trials withdrawn." in again.out


def test_sigint_ends_in_order_and_the_search_goes_on_in_an_empty_folder(world: World, tmp_path: Path) -> None:
    world.file("interrupted.hold", "")
    driver = world.start(*held_search(world, "interrupted", "--max-evals", "60", "--nodes", "1"))
    try:
        wait_for(lambda: busy(world, "interrupted"), "the search to be busy")
        driver.send_signal(signal.SIGINT)
        interrupted = end(driver, 30)
    finally:
        driver.kill()
    assert interrupted.code == 130, interrupted
    assert "Ending the search" in interrupted.err
    before = read_csv(world.folder / "interrupted" / "results.csv")
    assert {"DONE", "CANCELLED"} <= {row["job_status"] for row in before}
    (world.folder / "interrupted.hold").unlink()
    assert (world.folder / "interrupted" / "search.yaml").is_file()

    finished = [row for row in before if row["job_status"] == "DONE"]
    cancelled = {int(row["job_id"]) for row in before if row["job_status"] == "CANCELLED"}
    budget = len(finished) + 4
    resumed = world.cli(*held_search(world, "interrupted", "--max-evals", str(budget), "--nodes", "1"), cwd=tmp_path)
    assert resumed.code == 0, resumed
    after = {int(row["job_id"]): row for row in read_csv(tmp_path / "interrupted" / "results.csv")}
    assert sorted(after) == list(range(len(after)))  # the numbers go on, none is used twice
    # What a launcher had fetched before it was withdrawn may run all the same, and then counts
    done = {number for number, row in after.items() if row["job_status"] == "DONE"}
    assert {number for number, row in after.items() if row["job_status"] == "CANCELLED"} == cancelled - done
    assert budget <= len(done) <= budget + len(cancelled & done)
    for row in finished:  # not run again; a result that came in between is gathered by the next driver
        gathered = {"m:timestamp_gather": after[int(row["job_id"])]["m:timestamp_gather"]}
        assert after[int(row["job_id"])] == {**row, **gathered}
    points = [(row["p:x"], row["p:y"]) for row in after.values() if row["job_status"] == "DONE"]
    assert len(set(points)) == len(points)


# --- from one command -------------------------------------------------------------------------------------------------


def test_quickstart_leaves_its_files_and_no_process() -> None:
    folder = Path(tempfile.mkdtemp(prefix="live quickstart "))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
    environment["HOME"] = str(folder / "home")
    arguments = ["quickstart", "--dir", str(folder / "here"), "--max-evals", "4", "--problem", "ackley"]
    try:
        process = subprocess.Popen(
            [*CLI, *arguments],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        done = end(process, 180)
        assert done.code == 0, done
        assert "Best objective" in done.out
        assert len(read_csv(folder / "here" / "quickstart-1" / "results.csv")) == 4
        assert "<title>quickstart-1" in (folder / "here" / "quickstart-1" / "report.html").read_text(encoding="utf-8")
        assert leftovers(LocalStack(folder / "here" / "balsam")) == []
        assert sorted(path.name for path in folder.iterdir()) == ["here"]
    finally:
        LocalStack(folder / "here" / "balsam").down()
        shutil.rmtree(folder, ignore_errors=True)
