"""Jobs of a search that people delete, end or give back by Balsam's own commands, while it is driven."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import Search
from deephyper_balsam.errors import BalsamError
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.encoding import pack
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.trial import TrialState

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.0, deleted_jobs_s=0.0)
"""The site of these tests is a fast one."""

Make = Callable[..., Search]


@pytest.fixture
def make(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Make:
    def search(method: str = "random", **options: Any) -> Search:
        problem = HpProblem("line")
        problem.add_hyperparameter((0.0, 1.0), "x")
        evaluator = BalsamEvaluator(
            "ackley", "lab", allocation=AllocationRequest(3), client_path=client_yml, timing=QUICK
        )
        return Search(problem, evaluator, "s", method, seed=1, log_dir=tmp_path, poll_s=0.001, **options)

    return search


class Hand:
    """Moves the site one step at each look, and lets somebody meddle as soon as there is something to meddle with.

    `meddle` returns what it changed; runs end only after it has changed something, or from the beginning.
    """

    def __init__(self, site: VirtualSite, meddle: Callable[[], Any], *, ends_runs: bool = False) -> None:
        self.site, self.meddle, self.ends_runs, self.looks_since = site, meddle, ends_runs, 0
        self.done = False
        self.running: list[int] = []

    def __call__(self, progress: Progress) -> None:
        if not self.site.schedule():
            return
        with self.site.api.lock:
            jobs = self.site.api.jobs
            self.running = [job_id for job_id in self.running if job_id in jobs and jobs[job_id]["state"] == "RUNNING"]
        self.running += self.site.acquire(3 - len(self.running))
        if not self.done:
            self.done = bool(self.meddle())
        elif self.looks_since < 3:
            self.looks_since += 1
        if self.ends_runs or self.looks_since == 3:
            for job_id in self.running:
                if job_id in self.site.api.jobs:
                    self.site.finish(job_id, self.site.config(job_id)["x"])
            self.running = []


def delete(api: BalsamApi, states: set[str]) -> list[int]:
    """Do what `balsam job rm --tag search=s --state ...` does; the numbers of the trials."""
    with api.lock:
        gone = [row for row in api.jobs.values() if "trial" in row["tags"] and row["state"] in states]
        for row in gone:
            del api.jobs[row["id"]]
        return [int(row["tags"]["trial"]) for row in gone]


WAITING = {"STAGED_IN", "PREPROCESSED", "RESTART_READY"}


@pytest.mark.parametrize("states", [WAITING, {"RUNNING"}, {*WAITING, "RUNNING"}], ids=["waiting", "running", "both"])
@pytest.mark.parametrize("method", ["random", "ambs", "ga"])
def test_trials_whose_jobs_were_deleted_are_made_again_with_their_numbers_and_configurations(
    states: set[str], method: str, make: Make, site: VirtualSite, api: BalsamApi, caplog: pytest.LogCaptureFixture
) -> None:
    before: dict[int, Any] = {}
    gone: list[int] = []

    def meddle() -> list[int]:
        before.update({number: site.config(row["id"]) for number, row in api.trials("s").items()})
        gone.extend(delete(api, states))
        return gone

    frame = make(method).search(max_evals=9, on_progress=Hand(site, meddle))
    assert gone
    assert set(frame["job_status"]) == {"DONE"}
    assert frame["job_id"].tolist() == list(range(9))
    for number in gone:
        assert site.config(api.trials("s")[number]["id"]) == before[number]
    said = [record.getMessage() for record in caplog.records if "they are made again" in record.getMessage()]
    assert len(said) == 1
    assert ", ".join(map(str, sorted(gone))) in said[0]


def test_trials_deleted_while_the_search_is_ending_are_withdrawn(
    make: Make, site: VirtualSite, api: BalsamApi, gateway: Gateway
) -> None:
    search = make()
    frame = search.evaluator.open("s", search.settings, max_evals=9)
    assert frame.trials == []
    optimizer = search.evaluator
    from deephyper_balsam.trial import Trial

    site.add_allocation(1)
    optimizer.collect()
    optimizer.submit([Trial(0, {"x": 0.5}), Trial(1, {"x": 0.25})])
    site.acquire(1)
    optimizer.collect()
    assert optimizer.cancel() == [1]
    assert delete(api, {"RUNNING"}) == [0]
    assert optimizer.upkeep() == [0]
    assert optimizer.counts[TrialState.CANCELLED] == 2
    assert optimizer.line(0)["m:failure"] == "its job was deleted in Balsam"
    assert optimizer.upkeep() == []


def test_a_look_that_finds_all_jobs_costs_one_small_request(make: Make, site: VirtualSite, api: BalsamApi) -> None:
    from deephyper_balsam.trial import Trial

    search = make()
    search.evaluator.open("s", search.settings, max_evals=9)
    search.evaluator.submit([Trial(number, {"x": number / 10}) for number in range(5)])
    search.evaluator.collect()
    api.requests.clear()
    assert search.evaluator.upkeep() == []
    assert [(request.method, len(request.rows)) for request in api.requests] == [("GET", 1)]


def test_a_driver_that_goes_on_after_jobs_were_deleted_knows_what_is_there(
    make: Make, site: VirtualSite, api: BalsamApi, client_yml: Path, tmp_path: Path
) -> None:
    first = make()
    hand = Hand(site, lambda: True, ends_runs=True)

    def stop_at_four(progress: Progress) -> None:
        hand(progress)
        if progress.evaluated >= 4:
            first.stop()

    first.search(max_evals=12, on_progress=stop_at_four)
    assert len(delete(api, {"JOB_FINISHED"})) >= 4
    second = Search.resume("s", log_dir=tmp_path, client_path=client_yml, poll_s=0.001)
    second.evaluator.timing = QUICK
    frame = second.search(on_progress=hand)
    assert (frame["job_status"] == "DONE").sum() == 12


@pytest.mark.parametrize("state", ["FAILED", "JOB_FINISHED"])
@pytest.mark.parametrize("was", ["waiting", "running"])
def test_a_trial_whose_job_is_ended_by_hand_has_failed_with_that_reason_and_is_not_run_again(
    state: str, was: str, make: Make, site: VirtualSite, api: BalsamApi
) -> None:
    ended: list[int] = []

    def meddle() -> list[int]:
        wanted = WAITING if was == "waiting" else {"RUNNING"}
        for number, row in api.trials("s").items():
            if row["state"] in wanted:
                api.change_job(row["id"], state=state)
                ended.append(number)
        return ended

    frame = make(max_failures=0).search(max_evals=9, on_progress=Hand(site, meddle))
    assert ended
    failed = frame[frame["job_status"] == "FAILED"]
    assert failed["job_id"].tolist() == sorted(ended)
    assert failed["m:failure"].str.startswith("ended by hand in Balsam (").all()
    assert "m:retried_after" not in frame or frame["m:retried_after"].isna().all()


def test_trials_that_are_given_back_although_they_have_ended_take_no_node_again(
    make: Make, site: VirtualSite, api: BalsamApi, caplog: pytest.LogCaptureFixture
) -> None:
    back: list[int] = []

    def meddle() -> list[int]:
        for row in api.trials("s").values():
            if "gathered" in row["data"]:
                api.change_job(row["id"], state="RESTART_READY")
                back.append(row["id"])
        return back

    frame = make().search(max_evals=12, on_progress=Hand(site, meddle, ends_runs=True))
    assert back
    assert (frame["job_status"] == "DONE").sum() == 12
    assert "no trial is evaluated twice" in caplog.text
    assert {api.jobs[job_id]["state"] for job_id in back} == {"JOB_FINISHED"}


def test_jobs_of_others_that_carry_the_tag_of_the_search_are_none_of_its_trials(
    make: Make, site: VirtualSite, api: BalsamApi, gateway: Gateway
) -> None:
    def meddle() -> bool:
        row = next(iter(api.trials("s").values()))
        copied = {key: row[key] for key in ("app_id", "serialized_parameters", "num_nodes", "ranks_per_node")}
        gateway.create_jobs([{**copied, "workdir": "mine", "tags": {"search": "s"}, "data": {}}])
        api.change_job(max(api.jobs), state="JOB_FINISHED")
        return True

    hand = Hand(site, meddle)
    search = make()

    def trials(name: str) -> Any:
        return {
            int(row["tags"]["trial"]): row
            for row in api.jobs.values()
            if row["tags"].get("search") == name and "trial" in row["tags"]
        }

    api.trials = trials  # type: ignore[method-assign]
    frame = search.search(max_evals=6, on_progress=hand)
    assert (frame["job_status"] == "DONE").sum() == 6


def test_a_change_of_many_jobs_leaves_out_one_that_is_gone(api: BalsamApi, gateway: Gateway, make: Make) -> None:
    from deephyper_balsam.trial import Trial

    search = make()
    search.evaluator.open("s", search.settings, max_evals=9)
    search.evaluator.submit([Trial(number, {"x": number / 10}) for number in range(3)])
    ids = [row["id"] for row in api.trials("s").values()]
    del api.jobs[ids[1]]
    assert gateway.write_data({job_id: {"a": 1} for job_id in ids}) == {ids[1]}
    assert [api.jobs[job_id]["data"] for job_id in (ids[0], ids[2])] == [{"a": 1}] * 2


def test_a_driver_whose_own_note_was_deleted_stops_and_says_so(make: Make, site: VirtualSite, api: BalsamApi) -> None:

    search = make()

    def meddle() -> bool:
        for row in list(api.jobs.values()):
            if "record" in row["tags"]:
                del api.jobs[row["id"]]
        return True

    search.evaluator.timing = replace(QUICK, heartbeat_s=0.0)
    with pytest.raises(BalsamError, match="The note of this driver is gone"):
        search.search(max_evals=50, on_progress=Hand(site, meddle))


@pytest.mark.parametrize("was", ["waiting", "running", "restarted"])
def test_a_trial_whose_parameters_were_changed_has_failed_with_the_configuration_that_was_asked(
    was: str, make: Make, site: VirtualSite, api: BalsamApi, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[int, Any] = {}

    def meddle() -> list[int]:
        wanted = {"RUNNING"} if was == "running" else WAITING
        for number, row in api.trials("s").items():
            if row["state"] in wanted and not asked:
                asked[number] = site.config(row["id"])
                if was == "restarted":
                    api.change_job(row["id"], state="RUNNING")
                    site.time_out(row["id"])
                api.change_job(row["id"], serialized_parameters=pack({"x": 0.123}))
        return list(asked)

    frame = make(max_failures=0).search(max_evals=9, on_progress=Hand(site, meddle))
    [(number, config)] = asked.items()
    failed = frame[frame["job_status"] == "FAILED"]
    assert failed["job_id"].tolist() == [number]
    assert failed["p:x"].tolist() == [config["x"]]
    assert "parameters of its job were changed in Balsam" in failed["m:failure"].iloc[0]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("parameters of its job were changed" in said for said in warned) == 1


def test_parameters_that_were_changed_while_nobody_drove_are_noticed_by_the_next_driver(
    make: Make, site: VirtualSite, api: BalsamApi, client_yml: Path, tmp_path: Path
) -> None:
    first = make()
    hand = Hand(site, lambda: True, ends_runs=False)

    def stop_at_once(progress: Progress) -> None:
        hand(progress)
        if hand.running:
            first.stop()

    first.search(max_evals=6, on_progress=stop_at_once)
    number, row = next((number, row) for number, row in api.trials("s").items() if row["state"] == "RUNNING")
    x = site.config(row["id"])["x"]
    api.change_job(row["id"], serialized_parameters=pack({"x": 17.0}))
    second = Search.resume("s", log_dir=tmp_path, client_path=client_yml, poll_s=0.001)
    second.evaluator.timing = QUICK
    frame = second.search(on_progress=hand).set_index("job_id")
    assert frame["job_status"][number] == "FAILED"
    assert frame["p:x"][number] == x


def test_a_result_that_came_before_its_allocation_ended_is_no_meddling(
    make: Make, site: VirtualSite, api: BalsamApi, caplog: pytest.LogCaptureFixture
) -> None:
    cut: list[int] = []

    def meddle() -> list[int]:
        running = [row for row in api.trials("s").values() if row["state"] == "RUNNING"]
        for row in running:
            if "gathered" in row["data"]:
                site.time_out(row["id"])
                cut.append(row["id"])
            elif "result" not in row["data"]:
                site.deliver(row["id"], 1.0)
        return cut

    frame = make().search(max_evals=6, on_progress=Hand(site, meddle))
    assert cut
    assert set(frame["job_status"]) == {"DONE"}
    assert {api.jobs[job_id]["state"] for job_id in cut} == {"JOB_FINISHED"}
    assert "given back" not in caplog.text


def test_only_trials_that_lost_their_job_are_said_to_have_lost_it(
    make: Make, api: BalsamApi, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    from deephyper_balsam.driver.reconcile import Reconciler
    from deephyper_balsam.trial import Trial

    search = make()
    search.evaluator.open("s", search.settings, max_evals=9)
    search.evaluator.submit([Trial(number, {"x": number / 10}) for number in range(4)])
    known = {number: row["id"] for number, row in api.trials("s").items()}
    for number in (0, 1):
        api.change_job(known[number], state="JOB_FINISHED")
    look = Reconciler(gateway, "s", timing=QUICK)
    given = api.jobs[known[2]]
    copied = {key: given[key] for key in ("app_id", "serialized_parameters", "tags", "data")}
    [twin] = gateway.create_jobs([{**copied, "workdir": "twin"}])
    assert look.missing(known, [2, 3]) == []
    del api.jobs[twin]  # set aside, it carries the tag no more
    assert look.missing(known, [2, 3]) == []
    assert "deleted" not in caplog.text
    del api.jobs[known[3]]
    assert look.missing(known, [2, 3]) == [3]
    assert "deleted" not in caplog.text
    del known[3]
    del api.jobs[known[0]]
    assert [look.missing(known, [2]) for _ in range(2)] == [[], []]
    assert caplog.text.count("The jobs of 1 trial that has ended were deleted") == 1


def test_what_balsam_knows_of_failed_runs_is_asked_for_all_of_a_look_at_once(
    make: Make, site: VirtualSite, api: BalsamApi
) -> None:
    from deephyper_balsam.trial import Trial

    search = make()
    search.evaluator.open("s", search.settings, max_evals=99)
    search.evaluator.collect()
    search.evaluator.submit([Trial(number, {"x": number / 100}) for number in range(50)])
    for job_id in site.acquire(50):
        site.crash(job_id, 1, "gone")
    api.requests.clear()
    search.evaluator.collect()
    assert len(api.asked("GET", "events/")) <= 3
    for job_id in site.acquire(50):
        site.crash(job_id, 1, "gone")
    api.requests.clear()
    results = search.evaluator.collect()
    assert {result.failure for result in results} == {"the run ended with status 1 before it left a result"}
    assert len(results) == 50
    assert len(api.asked("GET", "events/")) <= 3
