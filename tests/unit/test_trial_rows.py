"""Trials as jobs: what goes into a row comes out of it, and every state and outcome has its meaning."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from balsam import schemas

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam import __version__
from deephyper_balsam.errors import InputError
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.encoding import pack
from deephyper_balsam.store.gateway import WAITING_STATES, Gateway
from deephyper_balsam.trial import Origin, Resources, Trial, TrialState

pytest_plugins = ["balsam_fixtures"]

TRIAL = Trial(7, {"x": 1.5, "act": "relu", "flag": True}, Origin("model", told=5, model=3))


def row(state: str = "STAGED_IN", data: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    made = trial_rows.trial_job(TRIAL, "s", 1, Resources(), asked_at=1000.0, eval_timeout_s=None)
    made["data"] = {**made["data"], **(data or {})}
    blank = {"id": 99, "last_update": "2024-01-01T00:00:00+00:00", "serialized_return_value": ""}
    return {**made, **blank, "serialized_exception": "", "state": state, **more}


OUTCOME = {"objective": 0.5, "failure": None, "metadata": {}, "start": 1002.0, "end": 1004.5, "host": "n1"}
FAILED = {**OUTCOME, "objective": None, "failure": "out of memory", "traceback": "Traceback ..."}

# --- there and back --------------------------------------------------------------------------------------------------


def test_a_trial_survives_its_way_through_balsam(gateway: Gateway, site: VirtualSite) -> None:
    app = gateway.create_app({"site_id": site.id, "name": "a", "serialized_class": "", "source_code": ""})
    trials = [TRIAL, Trial(8, {"x": 2}), Trial(9, {})]
    new = [trial_rows.trial_job(trial, "s", app["id"], Resources(), 1000.0, None) for trial in trials]
    gateway.create_jobs(new)
    assert [trial_rows.read_trial(row) for row in gateway.jobs(trial_rows.trial_tags("s"))] == trials


def test_a_job_carries_tags_folder_origin_time_limit_and_resources() -> None:
    needs = Resources(ranks_per_node=2, threads_per_rank=4, gpus_per_rank=0.5, evals_per_node=3, wall_time_min=9)
    made = trial_rows.trial_job(TRIAL, "digits-1", 4, needs, asked_at=1000.0, eval_timeout_s=60.0)
    assert made == {
        "app_id": 4,
        "workdir": "digits-1/000007",
        "tags": {"search": "digits-1", "trial": "7"},
        "serialized_parameters": pack(TRIAL.config),
        "data": {
            "schema": 1,
            "program": __version__,
            "asked": {"kind": "model", "told": 5, "model": 3, "at": 1000.0, "parameters": pack(TRIAL.config)},
            "eval_timeout_s": 60.0,
        },
        "num_nodes": 1,
        "ranks_per_node": 2,
        "threads_per_rank": 4,
        "threads_per_core": 1,
        "gpus_per_rank": 0.5,
        "node_packing_count": 3,
        "wall_time_min": 9,
        "launch_params": {},
    }
    schemas.ServerJobCreate(**made)


def test_a_job_without_a_time_limit_names_none() -> None:
    assert "eval_timeout_s" not in row()["data"]


def test_a_job_that_a_person_added_by_hand_has_the_origin_user() -> None:
    by_hand = row()
    by_hand["data"] = {}
    assert trial_rows.read_trial(by_hand).origin == Origin("user")


# --- states ----------------------------------------------------------------------------------------------------------

MEANING = {
    "CREATED": TrialState.READY,
    "AWAITING_PARENTS": TrialState.READY,
    "READY": TrialState.READY,
    "STAGED_IN": TrialState.READY,
    "PREPROCESSED": TrialState.READY,
    "RUNNING": TrialState.RUNNING,
    "RUN_DONE": TrialState.RUNNING,
    "RUN_ERROR": TrialState.RUNNING,
    "RUN_TIMEOUT": TrialState.READY,
    "RESTART_READY": TrialState.READY,
    "POSTPROCESSED": TrialState.RUNNING,
    "STAGED_OUT": TrialState.RUNNING,
    "JOB_FINISHED": TrialState.RUNNING,  # it left nothing: it will run once more
    "FAILED": TrialState.RUNNING,
}


def test_every_state_that_balsam_has_is_known() -> None:
    assert set(MEANING) == {state.value for state in schemas.JobState}
    assert set(WAITING_STATES) < set(MEANING)


@pytest.mark.parametrize("state", list(MEANING))
def test_a_state_without_a_result_means(state: str) -> None:
    assert trial_rows.read_state(row(state)) is MEANING[state]


TRIED = {"tries": [{"failure": "killed by SIGKILL", "host": "n1", "start": 1.0, "end": 2.0}]}
MACHINE = {"objective": None, "failure": "killed by SIGKILL", "fault": "machine", "host": "n2"}


@pytest.mark.parametrize("state", ["JOB_FINISHED", "FAILED"])
def test_a_run_that_left_nothing_for_the_second_time_has_failed(state: str) -> None:
    assert trial_rows.read_state(row(state, TRIED)) is TrialState.FAILED


@pytest.mark.parametrize("state", [*MEANING, "SOMETHING_NEW"])
def test_a_run_that_ended_by_the_machines_fault_runs_once_more_and_then_has_failed(state: str) -> None:
    assert trial_rows.read_state(row(state, {"result": MACHINE})) is TrialState.RUNNING
    assert trial_rows.read_state(row(state, {"result": MACHINE, **TRIED})) is TrialState.FAILED
    gathered = {"order": 0, "at": 3.0}  # by a driver that knew of no second tries
    assert trial_rows.read_state(row(state, {"result": MACHINE, "gathered": gathered})) is TrialState.FAILED


def test_a_second_run_keeps_why_the_first_ended_and_nothing_of_its_result(
    gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> None:
    submitted(gateway, site, 3)
    ended, held, _ = site.acquire(3)
    site.deliver(ended, None, "killed by SIGKILL", fault="machine", host="n7")
    site.end_run(ended, {"objective": None})
    site.deliver(held, None, "killed by SIGKILL", fault="machine")  # its launcher has not said so yet
    rows = [row for row in gateway.jobs(trial_rows.trial_tags("s")) if trial_rows.runs_again(row)]
    assert [row["id"] for row in rows] == [ended, held]
    again = trial_rows.run_again(gateway, {row["id"]: trial_rows.read_outcome(row) for row in rows}, rows)
    assert [row["id"] for row in again] == [ended]
    assert api.jobs[held]["state"] == "RUNNING"
    job = api.jobs[ended]
    assert (job["state"], job["serialized_return_value"], "result" in job["data"]) == ("RESTART_READY", "", False)
    [first] = trial_data.earlier_tries(job)
    assert (first["failure"], first["host"]) == ("killed by SIGKILL", "n7")
    assert trial_rows.read_state(again[0]) is trial_rows.read_state(job) is TrialState.READY
    assert trial_rows.table_row(job, 0.0, "lab")["m:retried_after"] == "killed by SIGKILL on n7"


@pytest.mark.parametrize("state", [*MEANING, "SOMETHING_NEW"])
def test_a_result_decides_whatever_state_balsam_is_in(state: str) -> None:
    assert trial_rows.read_state(row(state, {"result": OUTCOME})) is TrialState.DONE
    assert trial_rows.read_state(row(state, {"result": FAILED})) is TrialState.FAILED
    assert trial_rows.read_state(row(state, {"result": OUTCOME, "cancelled": 1.0})) is TrialState.DONE


def test_a_return_value_decides_for_a_finished_job() -> None:
    assert trial_rows.read_state(row("JOB_FINISHED", serialized_return_value=pack(OUTCOME))) is TrialState.DONE
    assert trial_rows.read_state(row("JOB_FINISHED", serialized_return_value=pack(FAILED))) is TrialState.FAILED


def test_a_withdrawn_trial_is_cancelled_once_balsam_agrees() -> None:
    assert trial_rows.read_state(row("FAILED", {"cancelled": 1.0})) is TrialState.CANCELLED
    assert trial_rows.read_state(row("RUNNING", {"cancelled": 1.0})) is TrialState.RUNNING
    assert trial_rows.read_state(row("PREPROCESSED", {"cancelled": 1.0})) is TrialState.READY


def test_an_unknown_state_counts_as_waiting_and_never_as_an_end() -> None:
    assert trial_rows.read_state(row("SOMETHING_NEW")) is TrialState.READY


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_the_runs_own_words_come_before_balsams() -> None:
    both = row("JOB_FINISHED", {"result": OUTCOME}, serialized_return_value=pack(FAILED))
    assert trial_rows.read_outcome(both) == OUTCOME
    assert trial_rows.read_outcome(row("JOB_FINISHED", serialized_return_value=pack(OUTCOME))) == OUTCOME


def test_an_exception_that_balsam_caught_is_the_reason() -> None:
    packed = schemas.serialize((ImportError("No module named 'deephyper_balsam'"), None))
    failure = trial_rows.read_outcome(row("FAILED", serialized_exception=packed))["failure"]
    assert failure == "ImportError: No module named 'deephyper_balsam'"


def test_a_run_that_left_nothing_names_its_folder() -> None:
    assert "see job.out in the folder s/000007" in trial_rows.read_outcome(row("FAILED"))["failure"]


def test_a_return_value_that_cannot_be_decoded_is_a_failure_that_says_so() -> None:
    outcome = trial_rows.read_outcome(row("JOB_FINISHED", serialized_return_value="AAAA"))
    assert outcome["objective"] is None
    assert "cannot be decoded here" in outcome["failure"]


def test_an_outcome_becomes_a_result() -> None:
    result = trial_rows.read_result(7, {**OUTCOME, "metadata": {"epochs": 3}})
    assert (result.number, result.objective, result.failure, result.host) == (7, 0.5, None, "n1")
    assert (result.started_at, result.ended_at, result.metadata) == (1002.0, 1004.5, {"epochs": 3})
    failed = trial_rows.read_result(7, FAILED)
    assert (failed.objective, failed.failure, failed.traceback) == (None, "out of memory", "Traceback ...")


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_line_of_a_trial_has_deephypers_columns_in_seconds_since_the_search_began() -> None:
    outcome = {**OUTCOME, "metadata": {"epochs": 3, "curve": [1, 2]}}
    done = row("JOB_FINISHED", {"result": outcome, "gathered": {"at": 1005.25, "order": 0}})
    assert trial_rows.table_row(done, zero=990.0, site="lab") == {
        "p:x": 1.5,
        "p:act": "relu",
        "p:flag": True,
        "objective": 0.5,
        "job_id": 7,
        "job_status": "DONE",
        "m:timestamp_submit": 10.0,
        "m:timestamp_start": 12.0,
        "m:timestamp_end": 14.5,
        "m:timestamp_gather": 15.25,
        "m:duration": 2.5,
        "m:balsam_job_id": 99,
        "m:site": "lab",
        "m:node": OUTCOME["host"],
        "m:failure": None,
        "m:epochs": 3,
        "m:curve": "[1, 2]",
    }


def test_a_waiting_trial_has_a_line_without_an_outcome() -> None:
    line = trial_rows.table_row(row(), 990.0, "lab")
    assert (line["job_status"], line["objective"], line["m:failure"]) == ("READY", None, None)
    assert line["m:timestamp_start"] is line["m:timestamp_end"] is line["m:timestamp_gather"] is None


def test_failed_and_withdrawn_trials_have_a_reason_and_no_objective() -> None:
    failed = trial_rows.table_row(row("JOB_FINISHED", {"result": FAILED}), 0.0, "lab")
    assert (failed["job_status"], failed["objective"], failed["m:failure"]) == ("FAILED", None, "out of memory")
    cancelled = trial_rows.table_row(row("FAILED", {"cancelled": 1.0}), 0.0, "lab")
    assert (cancelled["job_status"], cancelled["m:failure"]) == ("CANCELLED", "withdrawn before it ran")


def test_metadata_cannot_take_the_place_of_a_column() -> None:
    outcome = {**OUTCOME, "metadata": {"site": "moon", "timestamp_start": -1, "failure": "none"}}
    line = trial_rows.table_row(row("JOB_FINISHED", {"result": outcome}), 990.0, "lab")
    assert (line["m:site"], line["m:timestamp_start"], line["m:failure"]) == ("lab", 12.0, None)
    assert (line["m:metadata:site"], line["m:metadata:failure"]) == ("moon", "none")


# --- withdrawing -----------------------------------------------------------------------------------------------------


def test_only_what_no_node_has_begun_is_withdrawn(gateway: Gateway, site: VirtualSite, api: BalsamApi) -> None:
    app = gateway.create_app({"site_id": site.id, "name": "a", "serialized_class": "", "source_code": ""})
    trials = [Trial(n, {"x": n}) for n in range(4)]
    gateway.create_jobs([trial_rows.trial_job(trial, "s", app["id"], Resources(), 1.0, None) for trial in trials])
    running, ended = site.acquire(2)
    site.deliver(ended, 0.5)
    api.change_job(ended, state="RUN_TIMEOUT")
    api.change_job(ended, state="RESTART_READY")  # the states came late, and it has its result
    assert trial_rows.withdraw_waiting(gateway, "s", now=5.0) == {3, 4}
    states = {number: trial_rows.read_state(made).value for number, made in api.trials("s").items()}
    assert states == {0: "RUNNING", 1: "DONE", 2: "CANCELLED", 3: "CANCELLED"}
    assert api.jobs[running]["data"].get("cancelled") is None
    assert trial_rows.withdraw_waiting(gateway, "s", now=6.0) == set()


def test_what_a_launcher_already_holds_is_left_to_it(gateway: Gateway, site: VirtualSite, api: BalsamApi) -> None:
    [held] = submitted(gateway, site, 1)
    api.change_job(held, state="PREPROCESSED")
    api.jobs[held]["session_id"] = 1
    assert trial_rows.withdraw_waiting(gateway, "s", now=5.0) == set()
    assert api.jobs[held]["state"] == "PREPROCESSED"


# --- what a killed driver or launcher leaves behind ------------------------------------------------------------------


def submitted(gateway: Gateway, site: VirtualSite, count: int) -> list[int]:
    app = gateway.create_app({"site_id": site.id, "name": "a", "serialized_class": "", "source_code": ""})
    trials = [Trial(n, {"x": n}) for n in range(count)]
    return gateway.create_jobs(
        [trial_rows.trial_job(trial, "s", app["id"], Resources(), 1.0, None) for trial in trials]
    )


def test_a_running_job_that_no_launcher_holds_goes_back_to_the_queue(
    gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> None:
    submitted(gateway, site, 3)
    orphan, held, told = site.acquire(3)
    site.deliver(told, 0.5)
    for job_id in (orphan, told):
        api.jobs[job_id]["session_id"] = None
    trial_rows.mend(gateway, "s", gateway.jobs(trial_rows.trial_tags("s")))
    assert [api.jobs[job_id]["state"] for job_id in (orphan, held, told)] == ["RESTART_READY", "RUNNING", "RUNNING"]


def test_a_job_that_waits_although_its_result_is_in_is_finished(
    gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> None:
    submitted(gateway, site, 2)
    [told] = site.acquire(1)
    site.deliver(told, 0.5)
    site.time_out(told)
    trial_rows.mend(gateway, "s", gateway.jobs(trial_rows.trial_tags("s")))
    assert sorted(row["state"] for row in api.trials("s").values()) == ["JOB_FINISHED", "STAGED_IN"]


def test_a_driver_that_ends_gives_balsam_time_to_note_the_ends_of_runs(
    gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> None:
    submitted(gateway, site, 2)
    noted, missed = site.acquire(2)
    for job_id in (noted, missed):
        site.deliver(job_id, 0.5)
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            site.end_run(noted)

    trial_rows.settle(gateway, "s", patience_s=3.0, sleep=sleep)
    assert sum(pauses) == 3.0
    assert [api.jobs[job_id]["state"] for job_id in (noted, missed)] == ["JOB_FINISHED", "JOB_FINISHED"]
    messages = [event["data"].get("message") for event in gateway.events(to_state="JOB_FINISHED")]
    assert messages.count(trial_rows.RESULT_IS_IN) == 1
    trial_rows.settle(gateway, "s", patience_s=3.0, sleep=sleep)
    assert sum(pauses) == 3.0  # nothing is open, so nothing is waited for


# --- resources -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "nodes", "slots"),
    [({}, 4, 4), ({"num_nodes": 3}, 8, 2), ({"evals_per_node": 4}, 2, 8), ({"num_nodes": 2}, 1, 0)],
)
def test_slots_are_what_so_many_nodes_run_at_once(needs: dict[str, int], nodes: int, slots: int) -> None:
    assert Resources(**needs).slots(nodes) == slots


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"num_nodes": 0}, r"`num_nodes >= 1` must hold, but got \(num_nodes=0\)"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"threads_per_rank": -1}, "threads_per_rank"),
        ({"threads_per_core": 0}, "threads_per_core"),
        ({"evals_per_node": 0}, "evals_per_node"),
        ({"gpus_per_rank": -0.5}, r"gpus_per_rank=-0\.5"),
        ({"wall_time_min": -1}, "wall_time_min=-1"),
        ({"num_nodes": 2, "evals_per_node": 2}, "either spans nodes or shares one"),
    ],
)
def test_impossible_resources_are_refused_with_what_was_got(needs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Resources(**needs)
