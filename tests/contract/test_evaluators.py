"""The contract of submit and collect, for every evaluator; and what the Balsam one owes beyond it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluator_contract import SETTINGS, EvaluatorContract, Rig, drain, trials

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.local_session import InProcessEvaluator
from deephyper_balsam.driver.session import DEFAULT_LIMITS, FailureLimits
from deephyper_balsam.driver.simulated_session import SimulatedEvaluator, VirtualClock
from deephyper_balsam.errors import (
    InputError,
    NotLoggedInError,
    SearchExistsError,
    SearchRunningError,
    UnreachableError,
)
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.allocations import Allocations
from deephyper_balsam.store.notes import write_note
from deephyper_balsam.trial import Origin, Resources, Trial, TrialState

pytest_plugins = ["balsam_fixtures"]


def run(job: RunningJob) -> Any:
    return job["x"] if job["x"] >= 0 else "F_negative"


class BalsamRig(Rig):
    """`BalsamEvaluator` on the fake API, with an allocation of two nodes."""

    can_break = True
    evaluator: BalsamEvaluator

    def __init__(self, folder: Path, **options: Any) -> None:
        self.api = BalsamApi()
        self.site = VirtualSite(self.api)
        self.allocation = self.site.add_allocation(2)
        self.client_yml = self.api.write_client_yml(folder / "client.yml")
        self.running: dict[int, int] = {}
        limits = FailureLimits(max_cuts=options.pop("max_cuts", DEFAULT_LIMITS.max_cuts))
        self.evaluator = self.again(**options)
        self.evaluator.open("s", dict(SETTINGS), max_evals=100, limits=limits)
        self.evaluator.collect()

    def again(self, **options: Any) -> BalsamEvaluator:
        """Return an evaluator as another process would make it."""
        return BalsamEvaluator(run, "lab", client_path=self.client_yml, **options)

    def anew(self) -> BalsamEvaluator:
        """Return an evaluator that goes on with the search as the next driver does."""
        made = self.again()
        made.open("s", dict(SETTINGS))
        return made

    def begin(self) -> list[int]:
        for job_id in self.site.acquire(2 - len(self.running)):
            self.running[int(self.api.jobs[job_id]["tags"]["trial"])] = job_id
        return list(self.running)

    def end(self, number: int) -> None:
        x = Trial(number, self.site.config(self.running[number])).config["x"]
        self.api.let_pass(1)
        self.site.finish(self.running.pop(number), x if x >= 0 else None, None if x >= 0 else "negative")

    def break_next(self, call: str) -> None:
        if call == "submit":
            self.api.answer_next(503, method="POST", path="jobs/")
        elif call == "submit-lost":
            self.api.lose_next_answer("POST", "jobs/")
        elif call == "collect":
            self.api.answer_next(503, method="GET", path="jobs/")
        elif call == "collect-lost":
            self.api.lose_next_answer("PATCH", "jobs/")
        else:
            self.api.answer_next(503, method="PUT", path="jobs/")

    def close(self) -> None:
        self.evaluator.gateway._client.session.close()
        self.api.close()


def allocations(rig: BalsamRig) -> Allocations:
    """Return the allocations at the rig's only site."""
    assert rig.evaluator.sites is not None
    [site] = rig.evaluator.sites
    return site.allocations


class SimulatedRig(Rig):
    """`SimulatedEvaluator` whose trials take as many seconds as their number says, so that they end in order."""

    ends_in_order = True
    evaluator: SimulatedEvaluator

    def __init__(self, folder: Path) -> None:
        self.clock = VirtualClock()
        self.evaluator = SimulatedEvaluator(run, 2, self.clock, lambda trial, result: 1.0 + trial.number)
        self.evaluator.open("s", dict(SETTINGS), max_evals=100)

    def begin(self) -> list[int]:
        ends = {number: one.end_at for number, one in self.evaluator._running.items()}
        return [number for number in sorted(ends, key=ends.__getitem__) if ends[number] > self.clock.now]

    def end(self, number: int) -> None:
        self.clock.now = self.evaluator._running[number].end_at

    def close(self) -> None:
        self.evaluator.close()


WAITS_TO_BE_ENDED = """
import time
from pathlib import Path

def run(job):
    while not (Path(__file__).parent / f"end-{job.id}").exists():
        time.sleep(0.005)
    return job["x"] if job["x"] >= 0 else "F_negative"
"""


class LocalRig(Rig):
    """`InProcessEvaluator`, whose runs end when a file of theirs is there."""

    evaluator: InProcessEvaluator

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "held.py").write_text(WAITS_TO_BE_ENDED)
        self.evaluator = InProcessEvaluator(f"{folder / 'held.py'}:run", 2)
        self.evaluator.open("s", dict(SETTINGS), max_evals=100, folder=folder / "s")

    def begin(self) -> list[int]:
        self.evaluator._start()
        return sorted(self.evaluator._busy)

    def end(self, number: int) -> None:
        (self.folder / f"end-{number}").touch()
        deadline = time.monotonic() + 20
        while number not in self.evaluator._ready(0.05):
            assert time.monotonic() < deadline, f"trial {number} did not end"

    def close(self) -> None:
        self.evaluator.close()


RIGS: dict[str, Callable[[Path], Rig]] = {"balsam": BalsamRig, "simulated": SimulatedRig, "local": LocalRig}


class TestEveryEvaluator(EvaluatorContract):
    @pytest.fixture(params=RIGS)
    def rig(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
        made = RIGS[request.param](tmp_path)
        yield made
        made.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[BalsamRig]:
    made = BalsamRig(tmp_path)
    yield made
    made.close()


# --- submitting ------------------------------------------------------------------------------------------------------


def test_a_lost_answer_in_the_midst_of_many_batches_creates_nothing_twice(
    rig: BalsamRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deephyper_balsam.store import gateway

    monkeypatch.setattr(gateway, "_BULK_ROWS", 4)
    many = trials(*range(10))
    rig.api.lose_next_answer("POST", "jobs/")
    with pytest.raises(UnreachableError):
        rig.evaluator.submit(many)
    rig.api.answer_next(503, method="POST", path="jobs/")
    with pytest.raises(UnreachableError):
        rig.evaluator.submit(many)
    rig.evaluator.submit(many)
    assert sorted(rig.api.trials("s")) == list(range(10))


def test_a_login_that_expires_between_two_batches_creates_nothing_twice(
    rig: BalsamRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deephyper_balsam.store import gateway

    monkeypatch.setattr(gateway, "_BULK_ROWS", 2)
    rig.api.answer_after(1, 401, method="POST", path="jobs/")
    with pytest.raises(NotLoggedInError):
        rig.evaluator.submit(trials(0, 1, 2, 3))
    assert sorted(rig.api.trials("s")) == [0, 1]
    rig.evaluator.submit(trials(0, 1, 2, 3))
    assert sorted(rig.api.trials("s")) == [0, 1, 2, 3]


def test_a_submitted_trial_counts_at_once(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0, 1))
    assert rig.evaluator.counts[TrialState.READY] == 2
    assert rig.evaluator.line(1)["job_status"] == "READY"


def test_submitting_costs_one_request_however_many_trials(rig: BalsamRig) -> None:
    before = len(rig.api.requests)
    rig.evaluator.submit(trials(*range(200)))
    assert len(rig.api.requests) == before + 1


# --- what a launcher must have left to start a trial -----------------------------------------------------------------


def minutes(rig: BalsamRig) -> dict[int, int]:
    return {number: row["wall_time_min"] for number, row in sorted(rig.api.trials("s").items())}


def test_a_trial_needs_the_minutes_of_its_time_limit(tmp_path: Path) -> None:
    made = BalsamRig(tmp_path, eval_timeout=600.0)
    made.evaluator.submit(trials(0))
    assert minutes(made) == {0: 14}  # the allocation has 60
    made.close()


def test_without_a_time_limit_trials_need_what_runs_took_those_that_wait_already_included(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(*range(4)))
    [job_id] = rig.site.acquire(1)
    rig.site.finish(job_id, 1.0, start=1000.0, end=1500.0)
    rig.evaluator.collect()
    rig.evaluator.collect()
    rig.evaluator.submit(trials(4))
    assert minutes(rig) == {0: 0, 1: 12, 2: 12, 3: 12, 4: 12}
    before = len(rig.api.requests)
    rig.evaluator.collect()
    assert len(rig.api.requests) == before + 1  # nothing changed: nothing is said again


def test_near_the_end_of_the_last_allocation_nothing_new_is_asked_for(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0, 1))
    for job_id in rig.site.acquire(2):
        rig.site.finish(job_id, 1.0, start=1000.0, end=1100.0)
    rig.evaluator.collect()
    rig.evaluator.collect()
    assert rig.evaluator.capacity + rig.evaluator.backlog > 0
    allocations(rig)._ends_at[rig.allocation] -= 57 * 60
    assert rig.evaluator.capacity + rig.evaluator.backlog == 0


def test_a_time_limit_that_does_not_fit_the_allocation_is_refused_before_anything_begins() -> None:
    with pytest.raises(InputError, match=r"`wall_time_min` of 124 or more \(--wall-time-min 124\)"):
        BalsamEvaluator(run, "nowhere", eval_timeout=7200, allocation=AllocationRequest(1, wall_time_min=60))


@pytest.mark.parametrize(("running", "state"), [(True, "running"), (False, "pending_deletion")])
def test_an_allocation_is_left_when_asked_to_and_something_runs_in_it(
    tmp_path: Path, running: bool, state: str
) -> None:
    made = BalsamRig(tmp_path, allocation=AllocationRequest(1))
    made.site.end_allocation(made.allocation)
    allocations(made)._refreshed_at = 0.0
    made.evaluator.collect()
    made.evaluator.ensure_allocation()
    made.site.schedule()
    made.evaluator.submit(trials(0))
    if running:
        made.site.acquire(1)
    made.evaluator.collect()
    made.evaluator.close(leave_running=True)
    [batch] = [row for row in made.api.batch_jobs.values() if row["filter_tags"] == {"search": "s"}]
    assert batch["state"] == state
    made.close()


# --- collecting ------------------------------------------------------------------------------------------------------


def test_a_result_is_taken_before_balsam_knows_that_the_run_ended(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(3))
    [job_id] = rig.site.acquire(1)
    rig.site.deliver(job_id, 0.75, metadata={"epochs": 4})
    [result] = rig.evaluator.collect()
    assert (result.objective, result.metadata, rig.api.jobs[job_id]["state"]) == (0.75, {"epochs": 4}, "RUNNING")
    rig.site.end_run(job_id, rig.site.outcome(0.75))
    assert rig.evaluator.collect() == []
    assert rig.evaluator.counts[TrialState.DONE] == 1


def test_a_node_that_cannot_reach_the_api_delivers_by_the_return_value(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0, 1))
    one, other = rig.site.acquire(2)
    rig.site.finish_by_value(one, 0.5)
    rig.site.finish_by_value(other, None, "diverged")
    assert [(result.objective, result.failure) for result in rig.evaluator.collect()] == [
        (0.5, None),
        (None, "diverged"),
    ]


@pytest.mark.parametrize(
    ("returncode", "reason"),
    [
        (-9, "killed by SIGKILL (out of memory?)"),
        (139, "killed by SIGSEGV (a crash outside Python)"),
        (1, "the run ended with status 1 before it left a result"),
    ],
)
def test_a_run_that_left_nothing_runs_once_more_and_is_then_a_failure_with_its_last_words(
    rig: BalsamRig, returncode: int, reason: str
) -> None:
    rig.evaluator.submit(trials(0))
    [job_id] = rig.site.acquire(1)
    rig.site.crash(job_id, returncode, "Killed")
    assert rig.evaluator.collect() == []
    assert rig.evaluator.counts[TrialState.READY] == 1
    assert rig.evaluator.line(0)["m:retried_after"] == reason
    assert rig.site.acquire(1) == [job_id]
    rig.evaluator.collect()
    rig.site.crash(job_id, returncode, "Killed again")
    [result] = rig.evaluator.collect()
    assert (result.failure, result.traceback) == (reason, "Killed again")
    assert rig.evaluator.line(0)["m:failure"] == result.failure
    assert rig.evaluator.collect() == []


def test_a_second_try_that_succeeds_is_a_result_and_the_first_is_not_forgotten(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0))
    [job_id] = rig.site.acquire(1)
    rig.site.deliver(job_id, None, "killed by SIGKILL", fault="machine")
    assert rig.evaluator.collect() == []  # its launcher has not said that it ended
    assert rig.evaluator.counts[TrialState.RUNNING] == 1
    rig.site.end_run(job_id)
    assert rig.evaluator.collect() == []
    assert rig.site.acquire(1) == [job_id]
    rig.site.finish(job_id, 0.5)
    [result] = rig.evaluator.collect()
    assert result.objective == 0.5
    assert rig.evaluator.line(0)["m:retried_after"] == "killed by SIGKILL on node-1"


def test_a_second_try_is_not_lost_with_the_answer_that_granted_it(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0))
    [job_id] = rig.site.acquire(1)
    rig.site.crash(job_id)
    rig.api.lose_next_answer("PATCH", "jobs/")
    with pytest.raises(UnreachableError):
        rig.evaluator.collect()
    assert rig.evaluator.collect() == []
    assert len(rig.api.jobs[job_id]["data"]["tries"]) == 1
    assert rig.site.acquire(1) == [job_id]


def test_a_configurations_own_failure_is_never_run_again(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0))
    [job_id] = rig.site.acquire(1)
    rig.site.finish(job_id, None, "timed out after 5 s")
    assert [result.failure for result in rig.evaluator.collect()] == ["timed out after 5 s"]
    assert rig.site.acquire(1) == []


def test_an_exception_that_balsam_caught_is_the_reason(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0))
    for _ in range(2):
        [job_id] = rig.site.acquire(1)
        rig.site.finish_by_exception(job_id, ImportError("No module named 'deephyper_balsam'"))
        results = rig.evaluator.collect()
    assert [result.failure for result in results] == ["ImportError: No module named 'deephyper_balsam'"]


def test_a_node_that_fails_all_it_gets_is_named_and_known_to_the_next_driver(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(*range(4)))
    *bad, good = rig.site.acquire(4)
    for job_id in bad:
        rig.site.finish(job_id, None, "killed by SIGBUS", fault="machine", host="nid7")
    rig.evaluator.collect()
    assert "nid7" not in (rig.evaluator.notice or "")  # nothing has worked elsewhere either
    rig.site.finish(good, 1.0, host="nid8")
    rig.evaluator.collect()
    assert "failed all they got: nid7 (3x)" in (rig.evaluator.notice or "")
    again = rig.anew()
    assert again.health is not None
    assert again.health.suspects == ["nid7"]


def test_how_often_allocations_cut_a_run_is_written_down_with_its_result(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0))
    for _ in range(2):
        [job_id] = rig.site.acquire(1)
        rig.site.time_out(job_id)
        rig.evaluator.collect()
    rig.site.acquire(1)
    rig.site.finish(job_id, 1.0)
    rig.evaluator.collect()
    assert rig.api.jobs[job_id]["data"]["gathered"]["cuts"] == 2
    assert rig.evaluator.line(0)["m:cut_by_allocations"] == 2


def test_a_run_that_had_three_allocations_whole_and_may_have_more_is_named(tmp_path: Path) -> None:
    rig = BalsamRig(tmp_path, max_cuts=0)
    rig.evaluator.submit(trials(5))
    for minutes in (55, 56, 57):  # of 60
        [job_id] = rig.site.acquire(1)
        rig.api.let_pass(60 * minutes)
        rig.evaluator.collect()
        assert rig.evaluator.notice is None
        rig.site.time_out(job_id)
        rig.evaluator.collect()
    assert "cut by 3 whole allocations or more: trial 5 (57 min the last time)" in (rig.evaluator.notice or "")
    rig.close()


def test_a_run_cut_by_the_end_of_its_allocation_waits_and_is_run_again(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0))
    [job_id] = rig.site.acquire(1)
    rig.evaluator.collect()
    assert rig.evaluator.counts[TrialState.RUNNING] == 1
    rig.site.time_out(job_id)
    assert rig.evaluator.collect() == []
    assert rig.evaluator.counts[TrialState.READY] == 1
    assert rig.site.acquire(1) == [job_id]
    rig.site.finish(job_id, 1.0)
    assert [result.number for result in rig.evaluator.collect()] == [0]


def test_what_was_taken_in_is_written_down_in_its_order(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0, 1, 2))
    for number in (1, 0):
        rig.begin()
        rig.end(number)
        rig.evaluator.collect()
    orders = {number: row["data"].get("gathered", {}).get("order") for number, row in rig.api.trials("s").items()}
    assert orders == {1: 0, 0: 1, 2: None}


def test_after_a_lost_write_the_order_has_no_gap(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0, 1, 2))
    rig.begin()
    rig.end(1)
    rig.api.lose_next_answer("PATCH", "jobs/")
    with pytest.raises(UnreachableError):
        rig.evaluator.collect()
    rig.end(0)
    assert sorted(result.number or 0 for result in rig.evaluator.collect()) == [0, 1]
    drain(rig)
    assert sorted(row["data"]["gathered"]["order"] for row in rig.api.trials("s").values()) == [0, 1, 2]


def test_a_poll_reads_only_what_changed(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(*range(300)))
    rig.evaluator.collect()
    rig.api.let_pass(60)
    rig.begin()
    rig.end(0)
    rig.evaluator.collect()
    rig.api.requests.clear()
    for _ in range(5):
        rig.evaluator.collect()
    assert max(len(request.rows) for request in rig.api.asked("GET", "jobs/")) <= 3
    rig.api.let_pass(60)
    rig.end(1)
    rig.evaluator.collect()
    rig.api.requests.clear()
    assert rig.evaluator.collect() == []
    assert [row["tags"]["trial"] for row in rig.api.asked("GET", "jobs/")[0].rows] == ["1"]


def test_a_commit_that_lands_late_is_still_seen(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0, 1))
    rig.begin()
    rig.api.let_pass(30)
    rig.end(0)
    assert len(rig.evaluator.collect()) == 1
    rig.api.let_pass(-5)  # stamped before what was seen, and committed after
    rig.end(1)
    assert [result.number for result in rig.evaluator.collect()] == [1]


# --- how much to have under way --------------------------------------------------------------------------------------


def test_capacity_follows_the_allocations(rig: BalsamRig) -> None:
    allocations(rig)._look_s = 0
    rig.site.add_allocation(3)
    rig.evaluator.collect()
    assert rig.evaluator.capacity == 5
    rig.site.end_allocation(rig.allocation)
    rig.evaluator.collect()
    assert rig.evaluator.capacity == 3


def test_the_backlog_is_one_wave_first_then_what_ends_during_the_delay_and_never_far_ahead_of_the_model(
    rig: BalsamRig,
) -> None:
    assert rig.evaluator.backlog == 2
    assert rig.evaluator.sites is not None
    [lab] = rig.evaluator.sites
    lab.durations_s.extend([6000.0])
    assert rig.evaluator.backlog == 1
    lab.durations_s.extend([4.0] * 1000)
    assert rig.evaluator.backlog == 2
    assert lab.backlog(ended=100) == 3
    lab.durations_s.extend([0.01] * 1000)
    assert lab.backlog(ended=100) == 20


def test_while_no_allocation_runs_the_backlog_is_what_the_queued_ones_start_with(rig: BalsamRig) -> None:
    allocations(rig)._look_s = 0
    rig.site.end_allocation(rig.allocation)
    rig.evaluator.collect()
    assert (rig.evaluator.capacity, rig.evaluator.backlog) == (0, 1)
    rig.site.add_allocation(7, "queued")
    rig.evaluator.collect()
    assert (rig.evaluator.capacity, rig.evaluator.backlog) == (0, 7)


# --- beginning again -------------------------------------------------------------------------------------------------


def test_another_driver_knows_every_trial_every_result_in_order_and_gets_the_rest(rig: BalsamRig) -> None:
    rig.evaluator.submit([Trial(n, {"x": float(n)}, Origin("model", 4, 2)) for n in range(4)])
    for number in (1, 0):
        rig.begin()
        rig.end(number)
        rig.evaluator.collect()
    rig.begin()
    rig.end(2)  # while nobody looks
    rig.evaluator.close()
    later = rig.again()
    history = later.open("s", dict(SETTINGS), max_evals=100)
    assert [(trial.number, trial.origin) for trial in history.trials] == [(n, Origin("model", 4, 2)) for n in range(4)]
    assert [(result.number, result.objective) for result in history.results] == [(1, 1.0), (0, 0.0)]
    rig.evaluator = later
    assert [result.number for result in drain(rig)] == [2, 3]
    assert [row["data"]["gathered"]["order"] for row in rig.api.trials("s").values()] == [1, 0, 2, 3]


def test_other_settings_under_the_same_name_are_refused(rig: BalsamRig) -> None:
    rig.evaluator.close()
    for other in ({"method": "ambs"}, {"seed": 2}, {"problem": {"name": "q"}}, {"options": {"kappa": 3}}):
        with pytest.raises(SearchExistsError, match=f"another {next(iter(other))}"):
            rig.again().open("s", {**SETTINGS, **other}, max_evals=100)
    with pytest.raises(SearchExistsError, match="another run"):
        BalsamEvaluator(lambda job: 1.0, "lab", client_path=rig.client_yml).open("s", dict(SETTINGS), max_evals=100)


def test_without_a_seed_one_is_drawn_and_the_next_driver_accepts_it(rig: BalsamRig) -> None:
    unseeded = {**SETTINGS, "seed": None}
    first = rig.again().open("t", dict(unseeded), max_evals=100).settings["seed"]
    assert isinstance(first, int)
    assert rig.again().open("t", dict(unseeded), max_evals=100).settings["seed"] == first
    assert rig.again().open("s", dict(unseeded), max_evals=100).settings["seed"] == 1


def test_a_search_that_another_process_drives_is_refused(rig: BalsamRig) -> None:
    evaluator = rig.again()
    rig.evaluator.close()
    other = {"host": "login2", "pid": 1, "started": "boot:1", "began_at": 1.0, "driving_since": 1.0}
    write_note(evaluator.gateway, rig.site.id, "s", "driver", other)
    with pytest.raises(SearchRunningError, match="process 1 on login2"):
        evaluator.open("s", dict(SETTINGS), max_evals=100)


def test_jobs_of_something_else_under_the_tag_are_left_alone(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0))
    row = next(iter(rig.api.trials("s").values()))
    row["tags"] = {"search": "theirs", "trial": "0"}
    with pytest.raises(SearchExistsError, match="Jobs tagged search=theirs are in this Balsam already"):
        rig.again().open("theirs", dict(SETTINGS), max_evals=100)
    assert not any(job["tags"].get("record") == "theirs" for job in rig.api.jobs.values())


def test_one_evaluator_serves_one_search_after_the_other(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0, 1, 2))
    drain(rig)
    rig.evaluator.close()
    assert rig.evaluator.open("t", dict(SETTINGS), max_evals=100).trials == []
    assert sum(rig.evaluator.counts.values()) == 0
    assert rig.evaluator.lines == []
    rig.evaluator.submit(trials(0))
    assert [result.number for result in drain(rig)] == [0]
    assert len(rig.evaluator.lines) == 1


@pytest.mark.parametrize("name", ["", "a/b", "a b"])
def test_a_name_that_cannot_be_a_folder_is_refused_before_anything_is_made(rig: BalsamRig, name: str) -> None:
    before = len(rig.api.jobs)
    with pytest.raises(InputError, match="cannot name a search"):
        rig.again().open(name, dict(SETTINGS), max_evals=100)
    assert len(rig.api.jobs) == before


def test_a_time_limit_travels_with_each_trial_and_must_be_positive(rig: BalsamRig) -> None:
    evaluator = rig.again(eval_timeout=30, resources=Resources(evals_per_node=2))
    evaluator.open("t", dict(SETTINGS), max_evals=100)
    evaluator.submit(trials(0))
    row = rig.api.trials("t")[0]
    assert (row["data"]["eval_timeout_s"], row["node_packing_count"]) == (30, 2)
    for wrong in (0, -1):
        with pytest.raises(InputError, match=rf"`eval_timeout > 0` \(seconds\) must hold, but got {wrong}"):
            rig.again(eval_timeout=wrong)


def test_a_withdrawn_trial_that_a_node_runs_all_the_same_brings_its_result(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0))
    [job_id] = rig.site.acquire(1)
    rig.api.jobs[job_id].update(state="PREPROCESSED", session_id=None)  # a launcher takes it between our two requests
    assert rig.evaluator.cancel() == [0]
    rig.site.deliver(job_id, 0.5)
    assert [(result.number, result.objective) for result in rig.evaluator.collect()] == [(0, 0.5)]
    assert rig.evaluator.counts[TrialState.DONE] == 1
    assert rig.evaluator.counts[TrialState.CANCELLED] == 0


def test_the_table_after_cancel_is_as_balsam_has_it(rig: BalsamRig) -> None:
    rig.evaluator.submit(trials(0, 1, 2, 3))
    one, _ = rig.site.acquire(2)
    rig.site.deliver(one, 0.5)
    rig.evaluator.cancel()
    assert [line["job_status"] for line in rig.evaluator.lines] == ["DONE", "RUNNING", "CANCELLED", "CANCELLED"]
    assert [result.number for result in rig.evaluator.collect()] == [0]
