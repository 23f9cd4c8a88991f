"""`search show` and `search delete` on the fake of Balsam's API."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite
from test_cli_requests import Call, begun, call, driven, problem, refused

from deephyper_balsam.store import allocation_chain
from deephyper_balsam.store.driver_requests import STOP, send_request
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import LeaseKeeper
from deephyper_balsam.store.notes import write_note
from deephyper_balsam.store.trial_rows import set_aside

pytest_plugins = ["balsam_fixtures"]
__all__ = ["begun", "call", "driven", "problem"]


# --- show ------------------------------------------------------------------------------------------------------------


def test_a_search_is_shown_with_what_it_was_asked_to_do(call: Call, begun: str) -> None:
    said = call("show", begun)
    assert said.code == 0, said
    for words in ("Search s", "random", "lab", "f.py:run", "max_evals", "layers", "optimizer"):
        assert words in said.out
    assert call("show", begun, "--json").json["method"] == "random"


def test_a_trial_is_shown_with_its_configuration_times_node_and_objective(call: Call, begun: str) -> None:
    said = call("show", begun, "0")
    assert said.code == 0, said
    for words in ("Trial 0 of s: DONE, objective 0.5", "layers", "node-1", "lab", "/sites/lab/data/s/000000"):
        assert words in said.out
    shown = call("show", begun, "0", "--json").json
    assert shown["configuration"]["layers"] == 3
    assert shown["ran_s"] == pytest.approx(0.5)
    assert shown["origin"] == {"kind": "random", "told": 0, "model": 0}


def test_a_trial_that_failed_is_shown_with_reason_traceback_and_what_it_printed(
    call: Call, begun: str, api: BalsamApi
) -> None:
    row = api.trials(begun)[1]
    traceback = '  File "train.py", line 3, in run\nValueError: diverged'
    row["data"]["result"].update(traceback=traceback, output="epoch 1\nloss nan\x1b[2J")
    said = call("show", begun, "1")
    for words in ("FAILED", "Failed: diverged", "line 3, in run", "loss nan\\x1b[2J", "cannot be read from here"):
        assert words in said.out, said.out
    assert "\x1b" not in said.out


def test_a_trial_that_waits_or_does_not_exist_is_said_to(call: Call, begun: str) -> None:
    assert "Trial 2 of s: READY" in call("show", begun, "2").out
    refused(call("show", begun, "7"), "no trial 7", "it has 3 so far")
    refused(call("show", "unknown"), "There is no search 'unknown'")


def test_earlier_tries_and_cuts_of_a_trial_are_shown(call: Call, begun: str, api: BalsamApi, site: VirtualSite) -> None:
    row = api.trials(begun)[2]
    row["data"]["tries"] = [{"failure": "killed by SIGKILL", "host": "node-9", "start": 1.0, "end": 2.0}]
    site.acquire(1)
    site.time_out(row["id"])
    said = call("show", begun, "2").out
    assert "run once more after: killed by SIGKILL on node-9" in said
    assert "cut at " in said


def test_what_a_run_recorded_and_what_was_decided_of_it_is_shown(call: Call, begun: str, api: BalsamApi) -> None:
    row = api.trials(begun)[0]
    row["data"]["result"].update(curve=[[float(n), n / 100] for n in range(1, 51)], stopped=True)
    went_on = {"stop": False, "rung": 9.0, "value": 0.09, "n": 2, "cutoff": None, "at": 1.0}
    row["data"]["rungs"] = [went_on, {"stop": True, "rung": 27.0, "value": 0.27, "n": 12, "cutoff": 0.31, "at": 2.0}]
    said = call("show", begun, "0").out
    assert "Recorded: objective by budget" in said
    assert "went on at budget 9 with 0.09: there were too few to compare with (2 others)" in said
    assert "stopped at budget 27 with 0.27: 0.31 was needed (12 others)" in said
    assert said.count("\n  ") < 45  # not all fifty records
    shown = call("show", begun, "0", "--json").json
    assert (len(shown["curve"]), shown["stopped"], len(shown["decisions"])) == (50, True, 2)


@pytest.mark.parametrize("lines", [3, 20_000])
def test_the_output_comes_from_the_folder_without_what_balsam_wrote(
    call: Call, begun: str, api: BalsamApi, site: VirtualSite, tmp_path: Path, lines: int
) -> None:
    api.sites[site.id]["path"] = str(tmp_path)
    folder = tmp_path / "data" / "s" / "000000"
    folder.mkdir(parents=True)
    packed = base64.b64encode(b"\x80" * 90_000).decode()
    printed = "".join(f"epoch {number}\n" for number in range(lines))
    (folder / "job.out").write_text(f"{printed}BALSAM-RETURN-VALUE {packed}\n", encoding="utf-8")
    shown = call("show", begun, "0", "--json").json
    assert shown["output_from"] == "folder"
    assert shown["output"].endswith(f"epoch {lines - 1}")
    assert packed[:200] not in shown["output"]
    assert len(shown["output"]) <= 4000


# --- delete ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(gateway: Gateway, site: VirtualSite, begun: str, api: BalsamApi) -> str:
    """The search with everything that may belong to one: a request, a snapshot, a job set aside, BatchJobs."""
    send_request(gateway, site.id, begun, STOP, 5.0, wait_s=0.0)
    write_note(gateway, site.id, begun, "snapshot", {"rows": "", "until": ""}, tag="snapshot")
    row = dict(api.trials(begun)[1])
    [copy] = gateway.create_jobs([{**_given(row), "workdir": "s/copy"}])
    set_aside(gateway, begun, [row], {1: copy}, 6.0)
    shape: dict[str, Any] = {"nodes": 1, "wall_time_min": 5, "queue": "q", "project": "p", "job_mode": "mpi"}
    gateway.create_batch_job(allocation_chain.batch_job(site.id, begun, chain=0, **shape))
    api.batch_jobs[site.add_allocation(state="queued", filter_tags={"search": begun})]
    return begun


def _given(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("app_id", "tags", "serialized_parameters", "data")}


@pytest.fixture
def other(gateway: Gateway, site: VirtualSite) -> int:
    """A job of somebody else."""
    app = gateway.apps(site.id)[0]["id"]
    [job_id] = gateway.create_jobs([{"app_id": app, "workdir": "other", "tags": {"search": "other", "trial": "0"}}])
    return job_id


def test_a_search_is_deleted_whole_and_nothing_else(call: Call, full: str, other: int, api: BalsamApi) -> None:
    said = call("delete", full, "--yes")
    assert said.code == 0, said
    assert "3 trials" in said.out
    assert "/sites/lab/data/s" in said.out
    assert list(api.jobs) == [other]
    assert [row["state"] for row in api.batch_jobs.values()] == ["pending_deletion"]  # what is in the queue
    refused(call("delete", full, "--yes"), "There is no search 's'")


@pytest.mark.parametrize("answer", ["", "n\n", "\n"])
def test_deletion_asks_and_takes_nothing_for_a_no(
    call: Call, full: str, api: BalsamApi, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    before = dict(api.jobs)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    said = call("delete", full)
    assert said.code == 2
    assert "Nothing of 's' was deleted" in said.err
    assert api.jobs == before


def test_deletion_goes_on_after_a_yes(call: Call, full: str, api: BalsamApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert call("delete", full).code == 0
    assert not api.jobs


def test_a_search_that_is_driven_is_not_deleted(call: Call, begun: str, driven: LeaseKeeper, api: BalsamApi) -> None:
    before = dict(api.jobs)
    refused(call("delete", begun, "--yes"), "is being driven", "search stop s")
    assert api.jobs == before


def test_trials_that_a_launcher_works_on_are_not_deleted_those_of_a_dead_one_are(
    call: Call, begun: str, api: BalsamApi, site: VirtualSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deephyper_balsam.store.deletion._SETTLE_S", 0.0)
    allocation = site.add_allocation()
    [job_id] = site.acquire(1)
    session = api.add_session(allocation, [job_id])
    refused(call("delete", begun, "--yes"), "Launchers hold 1 trial of", "search stop s --now")
    assert len(api.trials(begun)) == 3
    api.sessions[session]["heartbeat"] = api.now().replace(year=2020)
    said = call("delete", begun, "--yes")
    assert said.code == 0, said
    assert not [row for row in api.jobs.values() if row["tags"].get("search") == begun]


def test_a_job_set_aside_that_a_launcher_holds_is_no_endless_deletion(
    call: Call, full: str, api: BalsamApi, site: VirtualSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deephyper_balsam.store.deletion._SETTLE_S", 0.0)
    [aside] = [row["id"] for row in api.jobs.values() if "set_aside" in row["tags"]]
    api.change_job(aside, state="RUNNING")
    session = api.add_session(site.add_allocation(), [aside])
    refused(call("delete", full, "--yes"), "Launchers hold 1 trial of")
    api.sessions[session]["heartbeat"] = api.now().replace(year=2020)
    assert call("delete", full, "--yes").code == 0
    assert aside not in api.jobs


@pytest.mark.parametrize("after", range(6))
def test_a_deletion_that_was_cut_can_be_run_again(
    call: Call, full: str, other: int, api: BalsamApi, after: int
) -> None:
    api.answer_after(after, 500, method="DELETE")
    first = call("delete", full, "--yes")
    if first.code:
        assert first.code == 3
        assert "run the same command again" in first.err
        assert call("delete", full, "--yes").code == 0
    assert list(api.jobs) == [other]


def test_json_says_what_was_deleted_and_what_is_left(call: Call, full: str) -> None:
    said = call("delete", full, "--yes", "--json").json
    assert said["trials"] == 3
    assert said["left_on_disk"] == [{"site": "lab", "folder": "/sites/lab/data/s"}]
    assert len(said["batch_jobs_deleted"]) == 1


def test_nothing_is_deleted_when_no_job_is_named(gateway: Gateway, begun: str, api: BalsamApi) -> None:
    before = dict(api.jobs)
    gateway.delete_jobs({"search": begun}, [])
    assert api.jobs == before
