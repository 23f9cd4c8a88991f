"""`search run`, `resume`, `status` and `ls` of searches at several sites, and of resources by configuration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.cli import main, search
from deephyper_balsam.driver.search import Search
from deephyper_balsam.store.allocation_request import AllocationRequest

pytest_plugins = ["balsam_fixtures"]

PROBLEM = """
from deephyper_balsam import HpProblem, Resources
problem = HpProblem("p")
problem.add_hyperparameter((1, 4), "nodes")
def run(job):
    return job["nodes"]
def sizes(config):
    return Resources(num_nodes=config["nodes"])
def broken(config):
    return config["absent"]
"""
BOTH = ("--problem", "p.py", "--site", "lab,theta", "--method", "random", "--max-evals", "4")


@dataclass
class Said:
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Search]]:
    """The searches that the commands would drive; they are opened, and left again."""
    made: list[Search] = []

    def drive(one: Search, max_evals: int | None, timeout: float | None, **_: Any) -> int:
        made.append(one)
        one.evaluator.open(one.name, one.settings, max_evals=max_evals, asked_for=one.asked_for)
        one.evaluator.close()
        return 0

    monkeypatch.setattr(search, "drive", drive)
    yield made
    for one in made:
        one.evaluator.gateway._client.session.close()


@pytest.fixture
def call(
    built: list[Search],
    api: BalsamApi,
    client_yml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Call:
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.py").write_text(PROBLEM)
    for name in ("lab", "theta"):
        VirtualSite(api, name)

    def run(*arguments: str) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["search", *arguments], prog_name="deephyper-balsam")
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in out + err
        return Said(ended.value.code, out, err)

    return run


def test_each_site_gets_what_is_meant_for_it(call: Call, built: list[Search]) -> None:
    said = call("run", "s", *BOTH, "--nodes", "lab=1,theta=8", "--queue", "theta=regular", "--wall-time-min", "30")
    assert said.code == 0, said
    [made] = built
    assert made.evaluator._requests == {
        "lab": AllocationRequest(1, wall_time_min=30),
        "theta": AllocationRequest(8, wall_time_min=30, queue="regular"),
    }


def test_one_value_holds_for_all_and_a_site_without_nodes_asks_for_nothing(call: Call, built: list[Search]) -> None:
    assert call("run", "s", *BOTH, "--nodes", "2").code == 0
    assert call("run", "t", *BOTH, "--nodes", "theta=2").code == 0
    assert built[0].evaluator._requests == {"lab": AllocationRequest(2), "theta": AllocationRequest(2)}
    assert built[1].evaluator._requests == {"lab": None, "theta": AllocationRequest(2)}


def test_a_file_names_sites_in_a_list_and_what_differs_in_a_mapping(call: Call, built: list[Search]) -> None:
    options = {"problem": "p.py", "site": ["lab", "theta"], "nodes": {"lab": 1, "theta": 4}, "max_evals": 3}
    Path("search.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert call("run", "s", "--file", "search.yaml").code == 0
    assert built[0].evaluator._requests == {"lab": AllocationRequest(1), "theta": AllocationRequest(4)}
    shown = call("run", "s", "--file", "search.yaml", "--dry-run")
    Path("again.yaml").write_text(shown.out, encoding="utf-8")
    assert call("run", "s", "--file", "again.yaml").code == 0
    assert built[1].evaluator._requests == built[0].evaluator._requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--nodes", "lab=1,cori=2"), ["--nodes names 'cori', which is no site of this search", "lab, theta"]),
        (("--nodes", "1", "--queue", "cori=debug"), ["--queue names 'cori'"]),
        (("--nodes", "lab=1,lab=2"), ["--nodes", "each site once"]),
        (("--nodes", "lab="), ["--nodes", "site=value"]),
        (("--nodes", "lab=0"), ["--nodes", "x>=1"]),
        (("--job-mode", "lab=both"), ["--job-mode", "mpi"]),
        (("--site", "lab,,theta"), ["Sites are one name, or several different ones"]),
        (("--site", "lab,cori"), ["no Balsam site 'cori'", "lab, theta"]),
        (("--resources", "p.py:sizes", "--num-nodes-per-eval", "2"), ["either --resources", "--num-nodes-per-eval"]),
        (("--resources", "p.py:absent"), ["has no 'absent'"]),
        (("--resources", "p.py:broken"), ["its resources cannot be told: KeyError: 'absent'"]),
    ],
)
def test_what_is_wrong_is_said_and_nothing_begins(
    call: Call, api: BalsamApi, options: tuple[str, ...], words: list[str]
) -> None:
    said = call("run", "s", *BOTH, *options)
    assert said.code == 2, said
    for word in words:
        assert word in said.err
    assert not api.jobs


def test_resume_changes_what_it_names_and_keeps_the_rest(call: Call, built: list[Search]) -> None:
    call("run", "s", *BOTH, "--nodes", "lab=1,theta=8", "--queue", "theta=regular")
    assert call("resume", "s", "--nodes", "theta=4").code == 0
    assert built[1].evaluator._requests == {
        "lab": AllocationRequest(1),
        "theta": AllocationRequest(4, queue="regular"),
    }
    assert call("resume", "s").code == 0
    assert built[2].evaluator._requests == built[0].evaluator._requests
    said = call("resume", "s", "--queue", "cori=debug")
    assert (said.code, "'cori', which is no site" in said.err) == (2, True)


def test_status_and_ls_show_the_sites(call: Call, api: BalsamApi) -> None:
    call("run", "s", *BOTH, "--nodes", "lab=1,theta=8")
    assert json.loads(call("ls", "--json").out)[0]["site"] == "lab,theta"
    said = call("status", "s")
    assert "at lab,theta" in said.out
    assert "  at lab: none\n  at theta: none" in said.out
    found = json.loads(call("status", "s", "--json").out)
    assert found["settings"]["allocation"]["theta"]["nodes"] == 8
    assert found["sites"] == {"lab": {}, "theta": {}}


def test_stop_extend_and_add_reach_such_a_search(call: Call) -> None:
    call("run", "s", *BOTH)
    assert call("extend", "s", "--max-evals", "9").code == 0
    assert call("add", "s", "nodes=3").code == 0


def test_resources_of_a_file_survive_a_resume(call: Call, built: list[Search]) -> None:
    assert call("run", "s", *BOTH, "--resources", "p.py:sizes", "--nodes", "4").code == 0
    assert call("resume", "s").code == 0
    for one in built:
        assert one.evaluator.needs.of({"nodes": 3}).num_nodes == 3


def test_what_a_search_was_begun_with_can_be_read_from_any_folder(
    call: Call, built: list[Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path.cwd()
    assert call("run", "s", *BOTH, "--resources", "p:sizes", "--log-dir", "out").code == 0
    Path("written.yaml").write_text(yaml.safe_dump(built[0].asked_for), encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert call("run", "s", "--file", str(here / "written.yaml")).code == 0
    assert built[1].evaluator.spec == built[0].evaluator.spec
    assert built[1].settings == built[0].settings
    assert built[1].folder.resolve() == (here / "out" / "s").resolve()


def test_a_command_that_names_an_inactive_hyperparameter_by_itself_is_told_how_to_leave_it_out(
    call: Call, built: list[Search]
) -> None:
    Path("p.py").write_text(
        PROBLEM + "from ConfigSpace import EqualsCondition\nproblem.add_hyperparameter((0.1, 0.9), 'momentum')\n"
        "problem.add_condition(EqualsCondition(problem.space['momentum'], problem.space['nodes'], 1))\n",
        encoding="utf-8",
    )
    for command, said in (("--m {{ momentum }}", True), ('{{ flag("momentum") }} {{ nodes }}', False)):
        Path("c.yaml").write_text(f"command: 't {command}'\nobjective: {{json: r.json}}\n", encoding="utf-8")
        told = call("run", f"s{said}", *BOTH, "--run", "c.yaml")
        assert told.code == 0
        assert ('{{ flag("momentum") }} for --momentum=value' in told.err) is said
