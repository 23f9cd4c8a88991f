"""The time of day is set forward or back while a search runs: durations and moments stay true."""

from __future__ import annotations

import ast
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import deephyper_balsam

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, PlayingSite, VirtualSite

from deephyper_balsam.common.clock import Moments, steady
from deephyper_balsam.common.process_id import ProcessId
from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver import placement
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import RandomSearch, Search
from deephyper_balsam.launcher.wall_time import LauncherEnd
from deephyper_balsam.monitor.liveness import AgentLiveness
from deephyper_balsam.node import worker
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.sites.local_batch import BatchJob, BatchJobs
from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.trial import Trial

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02)
"""The site of these tests is a fast one."""


@pytest.fixture
def search(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Search:
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    evaluator = BalsamEvaluator("ackley", "lab", allocation=AllocationRequest(2), client_path=client_yml, timing=QUICK)
    return RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.01)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, 86400.0 * 365])
def test_a_clock_that_is_set_ends_no_search_and_no_time_of_a_trial_is_absurd(
    jump_s: float, search: Search, play: Callable[..., PlayingSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    play(lambda config: float(config["x"]))
    real, began = time.time, steady()
    elapsed: list[float] = []

    def look(progress: Progress) -> None:
        elapsed.append(progress.elapsed_s)
        if progress.evaluated >= 4:
            monkeypatch.setattr(time, "time", lambda: real() + jump_s)

    frame = search.search(max_evals=14, timeout=600, on_progress=look)
    took_s = steady() - began
    assert (frame["job_status"] == "DONE").sum() == 14
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] <= took_s
    for column in ("submit", "start", "end", "gather"):
        # A run of the fake says that it lasted half a second, whatever it did
        assert frame[f"m:timestamp_{column}"].between(-1.0, took_s + 1.0).all(), column


def test_moments_go_only_forward_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    server = time.time() + 500.0
    moments = Moments(lambda: server)
    first = moments()
    assert first == pytest.approx(server, abs=1.0)
    for clock in (0.0, 4e9):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        assert first <= moments() < first + 60
    moments.not_before(first + 7200)
    assert first + 7200 <= moments() < first + 7300
    moments.not_before(first)
    assert first + 7200 <= moments()


def test_a_local_clock_that_agrees_with_the_server_is_taken_for_the_more_exact_one() -> None:
    now = time.time()
    assert Moments(lambda: now - 1.4)() >= now


def test_a_run_lasts_as_long_as_it_lasts_though_the_clock_is_set_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Any) -> float:
        monkeypatch.setattr(time, "time", lambda: 1.0)
        return 1.0

    outcome = worker.evaluate(run, RunningJob(0, {}))
    assert 0 <= outcome["end"] - outcome["start"] < 60


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (1010.0, 1020.0, (1010.0, 1020.0)),
        (990.0, 1000.0, (990.0, 1000.0)),  # some seconds between clocks are nothing
        (1000.0 - 3600, 1020.0 - 3600, (1080.0, 1100.0)),
        (1000.0 + 3600, 1020.0 + 3600, (1080.0, 1100.0)),
    ],
)
def test_times_of_a_node_whose_clock_is_wrong_are_moved(
    start: float, end: float, expected: tuple[float, float]
) -> None:
    found = trial_rows.in_our_time({"start": start, "end": end, "objective": 1.0}, 1000.0, 1100.0)
    assert (found["start"], found["end"]) == expected
    assert trial_rows.in_our_time({"objective": None}, 1000.0, 1100.0) == {"objective": None}


def test_sites_are_looked_at_again_though_the_clock_was_put_back(
    gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> None:
    watch = AgentLiveness(gateway, {site.id: gateway.site("lab")})
    now = api.now().timestamp()
    watch.look(now)
    api.requests.clear()
    watch.look(now - 3600)
    assert len(api.asked("GET", "sites/")) == 1


# --- a pipeline that stands ------------------------------------------------------------------------------------------


def test_trials_that_wait_while_places_are_free_are_said_until_one_begins(
    search: Search, site: VirtualSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    search.evaluator.timing = replace(QUICK, stands_s=0.0)
    monkeypatch.setattr(placement, "_STANDS_DELAYS", 0.0)
    site.add_allocation(3)
    evaluator = search.evaluator
    evaluator.open("s", search.settings, max_evals=9)
    evaluator.collect()
    evaluator.submit([Trial(number, {"x": number / 10}) for number in range(4)])
    for _ in range(3):
        evaluator.collect()
    assert "4 trials wait at lab and 3 places are free" in (evaluator.notice or "")
    assert "site check" in caplog.text
    running = site.acquire(3)
    for _ in range(3):
        evaluator.collect()
    assert "places are free" not in (evaluator.notice or "")  # all are taken: one waits its turn
    for job_id in running:
        site.finish(job_id, 1.0)
    evaluator.collect()
    assert "places are free" not in (evaluator.notice or "")


def test_a_pipeline_that_takes_its_usual_time_is_no_news(search: Search, site: VirtualSite) -> None:
    site.add_allocation(3)
    search.evaluator.open("s", search.settings, max_evals=9)
    search.evaluator.collect()
    search.evaluator.submit([Trial(0, {"x": 0.1})])
    for _ in range(3):
        search.evaluator.collect()
    assert search.evaluator.notice is None


# --- what other processes reckon with --------------------------------------------------------------------------------


def test_a_launcher_reckons_by_a_clock_that_nobody_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    end = LauncherEnd(60)
    left_s, startable = end.left_s, end.startable_min
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert left_s - 60 < end.left_s <= left_s
    assert startable - 1 <= end.startable_min <= startable


@pytest.mark.parametrize("jump_s", [86400.0, -86400.0])
def test_a_local_batch_job_lasts_as_long_as_it_lasts(
    jump_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "job.sh"
    script.write_text("sleep 0.2\n", encoding="utf-8")
    batch, began = BatchJobs(tmp_path), steady()
    job = batch.submit(script, cwd=tmp_path, project="p", queue="q", num_nodes=1, wall_time_min=1)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    (known,) = batch.running()  # as another agent reads it
    assert 0 <= known.elapsed_s <= steady() - began
    while batch.running():
        time.sleep(0.02)
    batch.sweep()
    ended = batch.get(job.id)
    assert ended is not None
    assert ended.end_time is not None
    assert 0 <= ended.end_time - ended.start_time <= steady() - began + 0.01  # the uptime has hundredths


def test_a_batch_jobs_end_by_an_uptime_that_cannot_be_is_not_believed(tmp_path: Path) -> None:
    began_s = steady() - 100
    job = BatchJob(1, ProcessId(1, "x"), "s", "p", "q", 1, 1, start_time=5000.0, began_s=began_s)
    assert job.end_at(began_s + 50) == pytest.approx(5050.0)
    assert job.end_at(3.0) is None  # of a container
    assert job.end_at(began_s + 1000) is None
    assert replace(job, began_s=None).end_at(began_s + 50) is None


# --- who subtracts times of day --------------------------------------------------------------------------------------

PACKAGE = Path(deephyper_balsam.__file__).parent
# Where it is right, and why
RIGHT = {
    "store/connection.py": "how far the server's clock is ahead of this one, as of now",
    "store/gateway.py": "how far the server's clock is ahead of this one, as of now",
    "common/clock.py": "where the clock that nobody sets begins, on a node",
    "server/credentials.py": "what is left of a token, by the clock of the host that gave it",
    "server/standalone.py": "when an allocation began, which the scheduler tells as a moment",
    "sites/checks.py": "how far two clocks differ, and the age of what another machine wrote",
    "sites/local_batch.py": "files of an earlier version have the time of day alone",
}
NOW = {"time.time", "datetime.now", "datetime.utcnow", "datetime.datetime.now", "datetime.datetime.utcnow"}


def times_of_day_subtracted(tree: ast.AST) -> list[int]:
    """Return the lines that subtract a time of day, told there or by a name of the same function."""

    def tells(node: ast.AST, names: set[str]) -> bool:
        return any(
            (isinstance(one, ast.Call) and ast.unparse(one.func) in NOW)
            or (isinstance(one, ast.Name) and one.id in names)
            for one in ast.walk(node)
        )

    found = set()
    for scope in ast.walk(tree):
        if not isinstance(scope, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        names = {
            target.id
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and tells(node.value, set())
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if isinstance(scope, ast.Module):
            names = set()
        found |= {
            node.lineno
            for node in ast.walk(scope)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)
            if tells(node.left, names) or tells(node.right, names)
        }
        if not isinstance(scope, ast.Module):  # a clock that a test replaces is for durations as a rule
            found |= {
                default.lineno
                for default in (*scope.args.defaults, *scope.args.kw_defaults)
                if default is not None and ast.unparse(default) in NOW
            }
    return sorted(found)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_durations_are_not_differences_of_times_of_day(file: Path) -> None:
    found = times_of_day_subtracted(ast.parse(file.read_text(encoding="utf-8")))
    if str(file.relative_to(PACKAGE)) in RIGHT:
        assert found, "it is named in RIGHT and subtracts none"
    else:
        assert not found, "take `clock.steady` for a duration, the server's clock for a moment"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("def f(x):\n    return time.time() - x", [2]),
        ("def f():\n    began = time.time()\n    g()\n    return now() - began", [4]),
        ("def f(x):\n    return (datetime.now(timezone.utc) - x).total_seconds()", [2]),
        ("def f(clock=time.time):\n    pass", [1]),
        ("def f(x):\n    return time.monotonic() - x", []),
        ("def f():\n    at = time.time()\n    return {'at': at}", []),
    ],
)
def test_the_look_for_times_of_day_sees_what_it_is_for(text: str, lines: list[int]) -> None:
    assert times_of_day_subtracted(ast.parse(text)) == lines
