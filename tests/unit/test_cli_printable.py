"""What comes from a run, a configuration or another person reaches no terminal as it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.record import create_record
from deephyper_balsam.store.trial_rows import trial_job
from deephyper_balsam.trial import Resources, Trial

pytest_plugins = ["balsam_fixtures"]

Call = Callable[..., tuple[str, str]]
EVIL = "\x1b[2J\x1b]0;gone\x07\x9b31m\u202eback\r"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], client_yml: Path, tmp_path: Path) -> Call:
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit):
            main(["search", *arguments], prog_name="deephyper-balsam")
        return capfd.readouterr()

    return run


@pytest.fixture
def evil(gateway: Gateway, site: VirtualSite) -> str:
    """A search whose choices, failures and the words of whose driver are meant for a terminal."""
    problem = HpProblem("p" + EVIL)
    problem.add_hyperparameter([f"choice{EVIL}", "other"], "x")
    settings = {"problem": problem.to_dict(), "method": "random", "options": {}, "seed": 1, "site": site.name}
    settings |= {"num_workers": 1, "asked_for": {}, "run": {"kind": "function", "name": "f", "target": "f.py:run"}}
    create_record(gateway, "evil", settings, site.id, 1000.0)
    app = gateway.create_app({"site_id": site.id, "name": "evil", "serialized_class": "x", "source_code": ""})
    trials = [Trial(number, {"x": f"choice{EVIL}"}) for number in range(3)]
    ids = gateway.create_jobs([trial_job(trial, "evil", app["id"], Resources(), 1001.0, None) for trial in trials])
    site.acquire(3)
    site.finish(ids[0], 0.5)
    site.finish(ids[1], None, f"loss 1 {EVIL}")
    site.finish(ids[2], None, f"loss 2 {EVIL}")
    return "evil"


def obeyed(text: str) -> set[str]:
    """The characters of a text that a terminal would obey."""
    return {one for one in text if not one.isprintable() and one != "\n"}


@pytest.mark.parametrize(
    "command", [["status"], ["best"], ["ls"], ["utilization"], ["status", "--json"], ["best", "--json"]]
)
def test_no_command_prints_what_a_terminal_obeys(call: Call, evil: str, command: list[str]) -> None:
    name = [] if command == ["ls"] else [evil]
    out, err = call(command[0], *name, *command[1:])
    assert obeyed(out + err) == set()
    assert out
    if command in (["status"], ["best"]):
        assert r"choice\x1b]0;gone" in out  # click takes colours and movements out itself
    if command == ["status"]:
        assert "failed 2x: loss 1 " in out
        assert "(also with other numbers)" in out


def test_a_table_for_a_program_holds_what_was_there_and_one_for_a_terminal_does_not(
    call: Call, evil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = call("results", evil)
    assert f"loss 1 {EVIL}" in plain
    rows = json.loads(call("results", evil, "--json")[0])
    assert rows[0]["p:x"] == f"choice{EVIL}"
    monkeypatch.setattr("deephyper_balsam.cli.streams.is_terminal", lambda stream: True)
    assert obeyed(call("results", evil)[0]) == set()


def test_an_error_quotes_nothing_that_a_terminal_obeys(call: Call, evil: str) -> None:
    _, err = call("status", f"none{EVIL}")
    assert "Error" in err
    assert obeyed(err) == set()
