"""`search stop|extend|add|resume|status|ls` on the fake of Balsam's API: what they record, and what they refuse."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.driver_requests import read_requests
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import LeaseKeeper
from deephyper_balsam.store.record import create_record
from deephyper_balsam.store.trial_rows import trial_job
from deephyper_balsam.trial import Origin, Resources, Trial

pytest_plugins = ["balsam_fixtures"]


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Said]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], client_yml: Path, tmp_path: Path) -> Call:
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: str) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["search", *arguments], prog_name="deephyper-balsam")
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in out + err
        return Said(ended.value.code, out, err)

    return run


@pytest.fixture
def problem() -> HpProblem:
    made = HpProblem("net")
    made.add_hyperparameter((1, 8), "layers", default_value=2)
    made.add_hyperparameter((1e-5, 1e-1, "log-uniform"), "rate", default_value=1e-3)
    made.add_hyperparameter([True, False], "bias")
    made.add_hyperparameter(["adam", "sgd"], "optimizer")
    return made


@pytest.fixture
def begun(gateway: Gateway, site: VirtualSite, problem: HpProblem, api: BalsamApi) -> str:
    """A search with trial 0 done, trial 1 failed and trial 2 waiting, that nobody drives."""
    settings = {
        "problem": problem.to_dict(),
        "method": "random",
        "options": {},
        "seed": 1,
        "run": {"kind": "function", "name": "f", "target": "f.py:run"},
        "site": "lab",
        "resources": asdict(Resources()),
        "eval_timeout": None,
        "num_workers": 1,
        "max_evals": 10,
        "timeout": None,
        "allocation": None,
        "asked_for": {},
    }
    create_record(gateway, "s", settings, site.id, 1000.0)
    app = gateway.create_app(
        {
            "site_id": site.id,
            "name": "f",
            "serialized_class": "x",
            "source_code": "",
            "description": "",
            "parameters": {},
            "transfers": {},
        }
    )
    trials = [Trial(n, problem.fill_in({"layers": n + 3}), Origin("random")) for n in range(3)]
    ids = gateway.create_jobs([trial_job(trial, "s", app["id"], Resources(), 1001.0, None) for trial in trials])
    site.acquire(2)
    site.finish(ids[0], 0.5)
    site.finish(ids[1], None, "diverged")
    return "s"


@pytest.fixture
def driven(gateway: Gateway, site: VirtualSite, begun: str) -> LeaseKeeper:
    return LeaseKeeper.claim(gateway, begun, site.id)


def refused(said: Said, *words: str) -> None:
    assert said.code == 2, said
    assert said.err.startswith("Error: ")
    for word in words:
        assert word in said.err, said.err


# --- add -------------------------------------------------------------------------------------------------------------


def test_a_configuration_is_added_in_the_types_of_its_hyperparameters_with_defaults(
    call: Call, begun: str, gateway: Gateway
) -> None:
    said = call("add", begun, "layers=7", "rate=1e-2", "bias=false")
    assert said.code == 0, said
    assert "Recorded" in said.out
    assert f"search resume {begun}" in said.out
    [request] = read_requests(gateway, begun)
    assert request.config == {"layers": 7, "rate": pytest.approx(0.01), "bias": False, "optimizer": "adam"}
    assert request.handled is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["layers"], ["PARAMETER=VALUE", "'layers'"]),
        (["depth=3"], ["no hyperparameter 'depth'", "layers, rate, bias, optimizer"]),
        (["layers=3", "layers=4"], ["'layers' is given twice"]),
        (["layers=30"], ["layers"]),
        (["layers=2.5"], ["layers"]),
        (["optimizer=rmsprop"], ["optimizer", "adam", "sgd"]),
    ],
)
def test_a_configuration_outside_the_space_is_refused_and_nothing_is_recorded(
    call: Call, begun: str, gateway: Gateway, words: list[str], said: list[str]
) -> None:
    refused(call("add", begun, *words), *said)
    assert read_requests(gateway, begun) == []


def test_what_was_evaluated_runs_or_waits_already_is_refused_by_its_number(
    call: Call, begun: str, gateway: Gateway
) -> None:
    refused(call("add", begun, "layers=3"), "is trial 0 of 's' already (DONE, objective 0.5)")
    refused(call("add", begun, "layers=4"), "is trial 1 of 's' already (FAILED)")
    refused(call("add", begun, "layers=5"), "is trial 2 of 's' already (READY)")
    assert call("add", begun, "layers=8").code == 0
    refused(call("add", begun, "layers=8"), "was added to 's' already")
    assert len(read_requests(gateway, begun)) == 1


# --- extend ----------------------------------------------------------------------------------------------------------


def test_an_extension_is_recorded_and_is_the_budget_from_then_on(call: Call, begun: str, gateway: Gateway) -> None:
    said = call("extend", begun, "--max-evals", "20", "--json")
    assert said.json["handled"] is None
    assert call("status", begun, "--json").json["max_evals"] == 20
    assert "not done yet: extend to 20 evaluations" in call("status", begun).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--max-evals, --timeout or both"]),
        (["--max-evals", "10"], ["must be larger than the budget", "which is 10, but got 10", "search stop s"]),
        (["--max-evals", "3"], ["which is 10, but got 3"]),
        (["--timeout", "50"], ["has no limit of that kind: leave --timeout out"]),
    ],
)
def test_what_extends_nothing_is_refused(
    call: Call, begun: str, gateway: Gateway, options: list[str], words: list[str]
) -> None:
    refused(call("extend", begun, *options), *words)
    assert read_requests(gateway, begun) == []


# --- stop ------------------------------------------------------------------------------------------------------------


def test_a_stop_without_a_driver_withdraws_what_waits_and_is_answered(
    call: Call, begun: str, gateway: Gateway, api: BalsamApi
) -> None:
    said = call("stop", begun)
    assert (said.code, said.out) == (0, "Nobody drives s; 1 waiting trials withdrawn.\n")
    [request] = read_requests(gateway, begun)
    assert request.handled is not None
    assert request.handled["did"] == "nobody drove; withdrew 1 waiting trials"
    assert "cancelled" in api.trials("s")[2]["data"]


def test_a_driver_that_does_not_answer_keeps_the_stop_in_mind(
    call: Call, driven: LeaseKeeper, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, api: BalsamApi
) -> None:
    from deephyper_balsam.cli import requests

    monkeypatch.setattr(requests, "_ANSWER_S", 0.1)
    monkeypatch.setattr(requests._answer, "__defaults__", (0.1,))
    said = call("stop", "s", "--now")
    assert f"Asked the driver (process {os.getpid()} on" in said.out
    assert "It has not answered yet" in said.out
    [request] = read_requests(gateway, "s")
    assert (request.what, request.wait_s, request.handled) == ("stop", 0.0, None)
    assert "cancelled" not in api.trials("s")[2]["data"]  # that is the driver's to do


@pytest.mark.parametrize("command", [["stop"], ["extend", "--max-evals", "3"], ["add"], ["resume"], ["status"]])
def test_an_unknown_search_is_answered_with_those_there_are(call: Call, begun: str, command: list[str]) -> None:
    more = ["layers=3"] if command == ["add"] else []
    refused(call(command[0], "digits", *command[1:], *more), "no search 'digits' in this Balsam; there are: s.")


# --- status, ls, resume ----------------------------------------------------------------------------------------------


def test_status_says_that_nobody_drives_and_how_to_go_on(call: Call, begun: str) -> None:
    said = call("status", begun)
    assert "Driver: none (deephyper-balsam search resume s goes on)" in said.out
    assert "Budget: 10 evaluations; 2 evaluated in 0s" in said.out


def test_status_shows_each_lease_and_how_it_ended(
    call: Call, begun: str, gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> None:
    LeaseKeeper.claim(gateway, begun, site.id).leave("interrupted")
    lost = LeaseKeeper.claim(gateway, begun, site.id)
    api.let_pass(100)
    LeaseKeeper.claim(gateway, begun, site.id)
    found = call("status", begun, "--json").json
    assert found["driver"]["pid"] == os.getpid()
    assert [lease["ended"] for lease in found["leases"]] == [
        "interrupted",
        "lost: it gave no sign of life any more",
        None,
    ]
    said = call("status", begun)
    assert f"Driver: {lost.lease.host}, process {os.getpid()}, last sign of life" in said.out
    assert said.out.count("  driven ") == 2
    [row] = call("ls", "--json").json
    assert row["driver"] == f"{lost.lease.host}:{os.getpid()}"


def test_status_shows_runs_that_were_cut_and_times_without_balsam(
    call: Call, begun: str, driven: LeaseKeeper, site: VirtualSite, api: BalsamApi
) -> None:
    [job_id] = site.acquire(1)
    site.time_out(job_id)
    driven.note_outage(driven.clock() - 65, "Balsam does not answer: refused")
    driven.leave("complete")
    found = call("status", begun, "--json").json
    assert [(cut["trial"], cut["why"]) for cut in found["interruptions"]] == [(2, "the end of its allocation")]
    said = call("status", begun).out
    assert "1 run was cut and began again (trial 2): the end of its allocation" in said
    assert "for 1m05s: Balsam does not answer: refused" in said


def test_ls_says_how_the_last_driver_ended(call: Call, begun: str, driven: LeaseKeeper) -> None:
    driven.leave("stopped by u@h")
    assert call("ls", "--json").json[0]["last"] == "stopped by u@h"
    assert "stopped by u@h" in call("ls").out


def test_resume_is_refused_while_another_drives(
    call: Call, begun: str, gateway: Gateway, site: VirtualSite, tmp_path: Path
) -> None:
    from deephyper_balsam.store.notes import write_note

    other = {"host": "login2", "pid": 4711, "started": "b:1", "began_at": 1.0, "driving_since": 1.0}
    write_note(gateway, site.id, begun, "driver", other)
    refused(call("resume", begun), "process 4711 on login2", "--takeover")
    assert list((tmp_path / "work").iterdir()) == []


def test_resume_with_parts_of_an_allocation_needs_one(call: Call, begun: str) -> None:
    refused(call("resume", begun, "--queue", "debug"), "asks for no allocations", "--nodes", "--queue")
