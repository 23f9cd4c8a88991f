"""The drivers of a search: resumed from Balsam alone, extended, stopped, added to; nothing lost and nothing twice."""

from __future__ import annotations

import contextlib
import copy
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, PlayingSite, VirtualSite

from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.loop import Driver
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import Search
from deephyper_balsam.driver.session import SearchHistory
from deephyper_balsam.errors import SearchExistsError, SettingsError, TakenOverError, UnknownSearchError
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store import driver_requests, lease
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.driver_requests import ADD, EXTEND, STOP, DriverRequest, send_request
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.notes import write_note
from deephyper_balsam.trial import Resources, Result, TrialState

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02, heartbeat_s=0.05)
"""The site of these tests is a fast one."""

Play = Callable[..., PlayingSite]


def run(job: Any) -> float:
    """Stand in for the user's function; on the fake site, `score` is called instead."""
    return float(job["x"])


def score(config: dict[str, Any]) -> float:
    return -((config["x"] - 3.0) ** 2) + config["n"]


@pytest.fixture
def problem() -> HpProblem:
    made = HpProblem("parabola")
    made.add_hyperparameter((-10.0, 10.0), "x", default_value=1.5)
    made.add_hyperparameter((1, 8), "n")
    return made


Make = Callable[..., Search]


@pytest.fixture
def make(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Iterator[Make]:
    made: list[BalsamEvaluator] = []

    def search(problem: HpProblem, method: str = "random", **options: Any) -> Search:
        made.append(
            BalsamEvaluator(
                run,
                "lab",
                resources=Resources(evals_per_node=2),
                eval_timeout=50,
                allocation=AllocationRequest(3, wall_time_min=7),
                client_path=client_yml,
                timing=QUICK,
            )
        )
        return Search(problem, made[-1], "s", method, seed=5, log_dir=tmp_path / "out", poll_s=0.01, **options)

    yield search
    for evaluator in made:
        evaluator.gateway._client.session.close()


@pytest.fixture
def resume(client_yml: Path, tmp_path: Path) -> Iterator[Callable[..., Search]]:
    made: list[Search] = []

    def search(**options: Any) -> Search:
        folder = tmp_path / f"empty-{len(made)}"
        made.append(Search.resume("s", log_dir=folder, client_path=client_yml, poll_s=0.01, **options))
        made[-1].evaluator.timing = QUICK
        return made[-1]

    yield search
    for one in made:
        one.evaluator.gateway._client.session.close()


class Driving:
    """A search that is driven in a thread."""

    def __init__(self, search: Search, **options: Any) -> None:
        self.search, self.seen = search, list[Progress]()
        self.answer: Any = None
        self.thread = threading.Thread(target=self._go, kwargs=options)
        self.thread.start()

    def _go(self, **options: Any) -> None:
        try:
            self.answer = self.search.search(on_progress=self.seen.append, **options)
        except Exception as error:
            self.answer = error

    def end(self) -> pd.DataFrame:
        self.thread.join(20)
        assert isinstance(self.answer, pd.DataFrame), self.answer
        return self.answer


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def answered(gateway: Gateway, request: DriverRequest) -> dict[str, Any]:
    """What became of a request."""

    def handled() -> dict[str, Any] | None:
        return next(one.handled for one in driver_requests.read_requests(gateway, "s") if one.id == request.id)

    wait_until(handled)
    found = handled()
    assert found is not None
    return found


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_search_is_rebuilt_from_balsam_alone(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, tmp_path: Path
) -> None:
    play(score)
    first = make(problem, "ambs", num_initial=4, kappa=2.5)
    frame = first.search(max_evals=8)
    again = resume()
    assert (again.problem, again.method, again.settings) == (first.problem, "ambs", first.settings)
    assert again.evaluator.needs.fixed == Resources(evals_per_node=2)
    assert again.evaluator.eval_timeout_s == 50
    assert again.evaluator._requests == {"lab": AllocationRequest(3, wall_time_min=7)}
    later = again.search()
    pd.testing.assert_frame_equal(later, frame)
    written = tmp_path / "empty-0" / "s"
    assert sorted(path.name for path in written.iterdir()) == ["results.csv", "search.log", "search.yaml"]


def test_a_recorded_run_function_need_not_be_there_to_resume(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    play(score)
    make(problem).search(max_evals=2)
    [record] = [row for row in api.jobs.values() if row["tags"].get("kind") == "search"]
    assert record["data"]["settings"]["run"]["kind"] == "function"
    for row in api.jobs.values():
        if row["tags"].get("kind") == "search":
            row["data"]["settings"]["run"]["target"] = "/on/the/machine/only.py:run"
    assert resume().evaluator.spec["target"] == "/on/the/machine/only.py:run"


def test_another_allocation_can_be_asked_for(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, api: BalsamApi, gateway: Gateway
) -> None:
    play(score)
    make(problem).search(max_evals=3)
    send_request(gateway, 1, "s", EXTEND, time.time(), max_evals=6)
    resume(allocation=AllocationRequest(2, wall_time_min=9)).search()
    assert [row["num_nodes"] for row in api.batch_jobs.values()] == [3, 2]


def test_an_unknown_search_cannot_be_resumed(resume: Callable[..., Search]) -> None:
    with pytest.raises(UnknownSearchError, match="no search 's' in this Balsam; there are: none"):
        resume()


def test_a_new_search_without_a_budget_is_refused_and_an_old_one_has_one(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    play(score)
    with pytest.raises(SettingsError, match="needs an end"):
        make(problem).search()
    assert not api.jobs
    make(problem).search(max_evals=3)
    assert len(make(problem).search()) == 3


def test_a_killed_driver_loses_and_repeats_nothing(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    class Killed(BaseException):
        """As if the process were gone: nothing after it is done."""

    play(score, step_s=0.03)
    for at in (3, 8, 14):
        made = resume() if api.jobs else make(problem)

        def die(progress: Progress, at: int = at, made: Search = made) -> None:
            if progress.evaluated >= at:
                made.leave_now()
                raise Killed

        with pytest.raises(Killed):
            made.search(max_evals=20 if at == 3 else None, on_progress=die, takeover=True)
    frame = resume().search(takeover=True)
    assert frame["job_id"].tolist() == list(range(20))
    assert set(frame["job_status"]) == {"DONE"}
    assert len(frame[["p:x", "p:n"]].drop_duplicates()) == 20
    assert sorted(row["data"]["gathered"]["order"] for row in api.trials("s").values()) == list(range(20))


def test_only_the_time_in_which_a_driver_was_at_work_counts(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, gateway: Gateway, api: BalsamApi
) -> None:
    play(score)
    make(problem).search(max_evals=3, timeout=50)
    for row in api.jobs.values():  # a week passes; it had driven for 30 s
        if row["tags"].get("kind") == "driver":
            now = row["data"]["left_at"]
            row["data"].update(driving_since=now - 600_030, left_at=now - 600_000, at=now - 600_000)
    send_request(gateway, 1, "s", EXTEND, time.time(), max_evals=5)
    seen: list[Progress] = []
    assert len(resume().search(on_progress=seen.append)) == 5
    assert 30 <= seen[0].elapsed_s < 40
    assert seen[0].timeout_s == 50


# --- extending -------------------------------------------------------------------------------------------------------


def test_a_search_is_extended_while_it_runs(
    make: Make, play: Play, problem: HpProblem, gateway: Gateway, api: BalsamApi
) -> None:
    play(score, step_s=0.05)
    driving = Driving(make(problem), max_evals=12)
    wait_until(lambda: driving.seen)
    said = answered(gateway, send_request(gateway, 1, "s", EXTEND, time.time(), max_evals=18))
    assert said["did"] == "the budget is 18 evaluations"
    assert len(driving.end()) == 18
    assert driving.seen[-1].max_evals == 18


def test_a_complete_search_is_extended_and_resumed(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, gateway: Gateway
) -> None:
    play(score)
    make(problem).search(max_evals=4)
    request = send_request(gateway, 1, "s", EXTEND, time.time(), max_evals=7)
    assert len(resume().search()) == 7
    assert answered(gateway, request)["did"] == "the budget is 7 evaluations"
    # The command that began it, given again, does not take it back; a larger one is larger
    assert len(make(problem).search(max_evals=4)) == 7
    assert len(make(problem).search(max_evals=9)) == 9
    assert len(resume().search()) == 9


@pytest.mark.parametrize(
    ("given", "extended", "expected"),
    [
        ([], [], (40, None)),
        ([(60, None)], [], (60, None)),
        ([(60, None), (20, None)], [], (20, None)),
        ([(None, 3.0)], [], (None, 3.0)),
        ([], [(100, None), (70, None)], (100, None)),
        ([(40, None)], [(100, None)], (100, None)),
        ([(20, 5.0)], [(30, 9.0)], (30, 9.0)),
        ([], [(None, 9.0)], (40, None)),
    ],
)
def test_the_budget_is_what_was_given_last_and_at_least_what_it_was_extended_to(
    given: list[Any], extended: list[Any], expected: tuple[Any, Any]
) -> None:
    leases = [lease.Lease(i, "h", 1, "", 0.0, max_evals=n, timeout_s=s) for i, (n, s) in enumerate(given)]
    wishes = [DriverRequest(i, EXTEND, 0.0, "u", max_evals=n, timeout_s=s) for i, (n, s) in enumerate(extended)]
    assert driver_requests.effective_budget({"max_evals": 40, "timeout": None}, leases, wishes) == expected


# --- adding ----------------------------------------------------------------------------------------------------------


def test_an_added_configuration_is_evaluated_next_and_its_number_is_answered(
    make: Make, play: Play, problem: HpProblem, gateway: Gateway, api: BalsamApi
) -> None:
    play(score, step_s=0.05)
    driving = Driving(make(problem), max_evals=60)
    wait_until(lambda: driving.seen and driving.seen[-1].evaluated >= 2)
    before = len(api.trials("s"))
    said = answered(gateway, send_request(gateway, 1, "s", ADD, time.time(), config={"x": 3.0, "n": 8}))
    number = said["trial"]
    assert said["did"] == f"submitted as trial {number}"
    assert before <= number < before + 18
    frame = driving.end()
    assert len(frame) == 60
    assert frame.loc[number, ["p:x", "p:n", "objective"]].tolist() == [3.0, 8, 8.0]
    assert api.trials("s")[number]["data"]["asked"]["kind"] == "user"


def test_what_is_added_while_nobody_drives_is_kept(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, gateway: Gateway
) -> None:
    play(score)
    make(problem).search(max_evals=4)
    first = send_request(gateway, 1, "s", ADD, time.time(), config={"x": 3.0, "n": 8})
    same = send_request(gateway, 1, "s", ADD, time.time(), config={"x": 3.0, "n": 8})
    wrong = send_request(gateway, 1, "s", ADD, time.time(), config={"x": 300.0, "n": 8})
    send_request(gateway, 1, "s", EXTEND, time.time(), max_evals=6)
    frame = resume().search()
    assert frame.loc[4, ["p:x", "p:n"]].tolist() == [3.0, 8]
    assert answered(gateway, first)["trial"] == 4
    assert answered(gateway, same)["did"] == "it is in line already"
    assert answered(gateway, wrong)["did"].startswith("refused: ")
    known = send_request(gateway, 1, "s", ADD, time.time(), config={"x": 3.0, "n": 8})
    resume().search()
    assert answered(gateway, known)["trial"] == 4


def test_starting_points_and_additions_that_were_withdrawn_are_asked_again(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, site: VirtualSite, gateway: Gateway
) -> None:
    problem.add_starting_point(x=1.0, n=1)
    site.add_allocation(1, "running")  # and nobody works in it
    driving = Driving(make(problem), max_evals=6)
    wait_until(lambda: driving.seen)
    added = send_request(gateway, 1, "s", ADD, time.time(), config={"x": 2.0, "n": 2})
    wait_until(lambda: driving.search.unmet_additions)
    site.add_allocation(1, "running")  # room for more
    number = answered(gateway, added)["trial"]
    driving.search.stop()
    frame = driving.end()
    assert set(frame["job_status"]) == {"CANCELLED"}
    play(score)
    later = resume().search()
    done = later[later["job_status"] == "DONE"]
    points = [tuple(point) for point in done[["p:x", "p:n"]].to_numpy()]
    assert points[:2] == [(1.0, 1), (2.0, 2)]
    assert len(set(points)) == len(points)
    assert answered(gateway, added)["trial"] > number


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_stop_withdraws_what_waits_and_waits_for_what_runs(
    make: Make, play: Play, problem: HpProblem, gateway: Gateway, api: BalsamApi
) -> None:
    hold = threading.Event()

    def held(config: dict[str, Any]) -> float:
        hold.wait(10)
        return score(config)

    play(held)
    driving = Driving(make(problem), max_evals=100)
    wait_until(lambda: driving.seen and driving.seen[-1].states[TrialState.RUNNING])
    request = send_request(gateway, 1, "s", STOP, time.time(), wait_s=30.0)
    said = answered(gateway, request)["did"]
    assert "waits up to 30 s for" in said
    wait_until(lambda: "stopping" in (driving.seen[-1].notice or ""))
    asked = len(api.trials("s"))
    hold.set()
    frame = driving.end()
    assert len(frame) == asked
    assert set(frame["job_status"]) == {"DONE", "CANCELLED"}


def test_a_stop_does_not_wait_longer_than_it_was_told(
    make: Make, play: Play, problem: HpProblem, gateway: Gateway
) -> None:
    hold = threading.Event()
    play(lambda config: float(hold.wait(10)))
    driving = Driving(make(problem), max_evals=100)
    try:
        wait_until(lambda: driving.seen and driving.seen[-1].states[TrialState.RUNNING])
        send_request(gateway, 1, "s", STOP, time.time(), wait_s=0.3)
        wait_until(lambda: not driving.thread.is_alive(), 15)
    finally:
        hold.set()
    assert "RUNNING" in set(driving.end()["job_status"])


def test_an_old_stop_does_not_end_the_next_driver(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, gateway: Gateway
) -> None:
    play(score)
    make(problem).search(max_evals=3)
    request = send_request(gateway, 1, "s", STOP, time.time(), wait_s=0.0)
    send_request(gateway, 1, "s", EXTEND, time.time(), max_evals=6)
    assert len(resume().search()) == 6
    assert "had ended before it" in answered(gateway, request)["did"]


def test_results_that_came_in_the_last_moment_are_in_the_table(
    make: Make, play: Play, site: VirtualSite, problem: HpProblem, api: BalsamApi
) -> None:
    search = make(problem)
    site.add_allocation(3)

    def finish_and_stop(progress: Progress) -> None:
        if progress.states[TrialState.READY]:
            for job_id in site.acquire(2):
                site.deliver(job_id, 0.5)
            search.stop()

    frame = search.search(max_evals=10, on_progress=finish_and_stop)
    assert frame["objective"].tolist()[:2] == [0.5, 0.5]
    assert sum("gathered" in row["data"] for row in api.trials("s").values()) == 2


def test_leaving_at_once_touches_nothing_more(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, site: VirtualSite
) -> None:
    site.add_allocation(3)
    search = make(problem)

    def leave(progress: Progress) -> None:
        if progress.states[TrialState.READY]:
            search.stop()
            search.leave_now()
            api.requests.clear()
            raise SystemExit(130)

    with pytest.raises(SystemExit):
        search.search(max_evals=10, on_progress=leave)
    assert api.requests == []


def test_a_driver_that_was_taken_over_leaves_files_trials_and_allocations_alone(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, gateway: Gateway, tmp_path: Path
) -> None:
    play(score, step_s=0.05)
    driving = Driving(make(problem), max_evals=1000)
    wait_until(lambda: driving.seen and driving.seen[-1].evaluated >= 2)
    [mine] = [row["id"] for row in list(api.jobs.values()) if row["tags"].get("kind") == "driver"]
    other = {"host": "login2", "pid": 1, "started": "b:1", "began_at": 1.0, "driving_since": 1.0, "takes_over": [mine]}
    write_note(gateway, 1, "s", "driver", other)
    driving.thread.join(10)
    assert isinstance(driving.answer, TakenOverError)
    assert not any("cancelled" in row["data"] for row in api.trials("s").values())
    assert {row["state"] for row in api.batch_jobs.values()} == {"running"}
    [left] = [row["data"] for row in api.jobs.values() if row["id"] == mine]
    assert left["why"] == "taken over"


# --- exactly once ----------------------------------------------------------------------------------------------------


def twin_of(api: BalsamApi, number: int, **change: Any) -> dict[str, Any]:
    """Make a second job of a trial, as a creation does whose answer was lost and which landed late."""
    with api.lock:
        row = copy.deepcopy(api.trials("s")[number])
        row.update(id=len(api.jobs) + 1, state="STAGED_IN", session_id=None, last_update=api.now(), **change)
        row["data"] = {"asked": row["data"]["asked"]}
        api.jobs[row["id"]] = row
        return row


def test_of_two_jobs_of_one_trial_the_next_driver_keeps_one_and_says_why(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, api: BalsamApi, gateway: Gateway
) -> None:
    play(score)
    make(problem).search(max_evals=4)
    twin = twin_of(api, 2)
    send_request(gateway, 1, "s", EXTEND, time.time(), max_evals=6)
    frame = resume().search()
    assert frame["job_id"].tolist() == list(range(6))
    assert len(api.trials("s")) == 6
    kept = api.trials("s")[2]["id"]
    aside = api.jobs[twin["id"]]
    assert aside["tags"] == {"set_aside": "s", "trial": "2"}
    assert aside["data"]["set_aside"]["kept"] == kept < twin["id"]
    assert aside["state"] == "FAILED"
    assert "result" not in aside["data"]


def test_a_second_job_that_appears_late_is_set_aside_by_the_driver_that_runs(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    play(score, step_s=0.02)
    driving = Driving(make(problem), max_evals=30)
    wait_until(lambda: driving.seen and driving.seen[-1].evaluated >= 3)
    twin = twin_of(api, 1)
    frame = driving.end()
    assert frame["job_id"].tolist() == list(range(30))
    assert api.jobs[twin["id"]]["tags"] == {"set_aside": "s", "trial": "1"}


def test_a_lost_answer_is_looked_after_once_more_when_it_cannot_land_any_more(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    play(score, step_s=0.05)
    api.answer_after(2, 503, method="POST", path="jobs/")  # the first trials
    search = make(problem)
    search.evaluator.timing = replace(QUICK, lost_answer_s=0.3)
    driving = Driving(search, max_evals=40)
    wait_until(lambda: driving.seen and driving.seen[-1].evaluated >= 1)
    twin = twin_of(api, 0)
    twin["last_update"] = twin["last_update"].replace(year=2020)  # stamped long before it was committed
    driving.end()
    assert api.jobs[twin["id"]]["tags"] == {"set_aside": "s", "trial": "0"}


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_the_times_when_balsam_did_not_answer_are_kept(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, gateway: Gateway
) -> None:
    play(score, step_s=0.05)
    driving = Driving(make(problem), max_evals=20)
    wait_until(lambda: driving.seen and driving.seen[-1].evaluated >= 2)
    api.away = True
    wait_until(lambda: "does not answer" in (driving.search.outage or ""))
    api.away = False
    assert len(driving.end()) == 20
    [left] = lease.read_leases(gateway, "s")["s"]
    [outage] = left.outages
    assert outage["to"] > outage["from"]
    assert "does not answer" in outage["why"]


def test_a_server_that_came_back_at_another_address_is_found(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, client_yml: Path, site: VirtualSite
) -> None:
    play(score, step_s=0.05)
    driving = Driving(make(problem), max_evals=20)
    wait_until(lambda: driving.seen and driving.seen[-1].evaluated >= 2)
    api.away = True
    with socket.socket() as moved:
        moved.bind(("127.0.0.1", 0))
        moved.listen(8)
        stop = threading.Event()
        relay = threading.Thread(target=_relay, args=(moved, api.url, stop), daemon=True)
        wait_until(lambda: "does not answer" in (driving.search.outage or ""))
        settings = client_yml.read_text(encoding="utf-8").replace(api.url, f"http://127.0.0.1:{moved.getsockname()[1]}")
        client_yml.write_text(settings, encoding="utf-8")
        relay.start()
        address = str(moved.getsockname()[1])
        wait_until(lambda: driving.search.evaluator.gateway._client.api_root.endswith(address))
        api.away = False
        assert len(driving.end()) == 20
        stop.set()
        relay.join()


def _relay(listener: socket.socket, url: str, stop: threading.Event) -> None:
    """Pass connections on to the server at `url`."""
    port = int(url.rpartition(":")[2])
    listener.settimeout(0.1)
    while not stop.is_set():
        try:
            near, _ = listener.accept()
        except TimeoutError:
            continue
        far = socket.create_connection(("127.0.0.1", port))
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def test_a_warm_start_is_learnt_first_and_survives_a_resume_from_balsam_alone(
    make: Make, resume: Callable[..., Search], play: Play, problem: HpProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = [Result(None, score({"x": x, "n": 8}), config={"x": x, "n": 8}) for x in (-8.0, -2.0, 2.5, 6.0)]
    warm.append(Result(None, None, failure="no memory", config={"x": 9.0, "n": 1}))
    play(score)
    first = make(problem, warm_start=warm, method="ambs", num_initial=4)
    before = first.search(max_evals=6)
    again = resume()
    told: list[int] = []
    begin = Driver._begin

    def watch(driver: Driver, history: SearchHistory) -> Any:
        optimizer, requests = begin(driver, history)
        told.append(optimizer.num_told)
        return optimizer, requests

    monkeypatch.setattr(Driver, "_begin", watch)
    after = again.search(max_evals=8)
    assert told == [5 + 6]
    assert len(after) == 8
    pd.testing.assert_frame_equal(after[["p:x", "p:n"]][:6], before[["p:x", "p:n"]])
    known = [(point.config["x"], point.config["n"]) for point in warm if point.config]
    assert not set(known) & set(zip(after["p:x"], after["p:n"], strict=True))


def test_another_warm_start_is_another_search(make: Make, play: Play, problem: HpProblem) -> None:
    play(score)
    make(problem, warm_start=[Result(None, 1.0, config={"x": 1.0, "n": 1})]).search(max_evals=2)
    with pytest.raises(SearchExistsError, match="another warm_start"):
        make(problem, warm_start=[Result(None, 2.0, config={"x": 1.0, "n": 1})]).search(max_evals=2)
