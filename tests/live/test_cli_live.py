"""The commands that need a Balsam, with good and with bad input, on the real local one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deephyper_balsam.cli import main
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.gateway import Gateway

pytestmark = pytest.mark.live

GOOD = """
from deephyper_balsam import HpProblem
problem = HpProblem("good")
problem.add_hyperparameter((0.0, 1.0), "x")
def run(job):
    return job["x"]
"""


@dataclass
class Said:
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def call(
    balsam_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """Run the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "good.py").write_text(GOOD)

    def run(*arguments: str) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments), prog_name="deephyper-balsam")
        out, err = capfd.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Said(code or 0, out, err)

    return run


@pytest.fixture
def gateway(stack: LocalStack) -> Gateway:
    return Gateway(stack.client_path)


def everything(gateway: Gateway) -> dict[str, Any]:
    """What there is in this Balsam."""
    sites = [row["id"] for row in gateway.sites()]
    return {
        "sites": sites,
        "apps": sorted(row["id"] for row in gateway.apps()),
        "jobs": sorted(row["id"] for row in gateway.jobs({})),
        "batch jobs": sorted(row["id"] for row in gateway.batch_jobs(sites)),
    }


@pytest.fixture
def unchanged(gateway: Gateway) -> Iterator[None]:
    """Hold that the test makes nothing in Balsam."""
    before = everything(gateway)
    yield
    assert everything(gateway) == before


def refused(said: Said, code: int, *words: str) -> None:
    assert said.code == code, said
    assert len([line for line in said.err.splitlines() if line.startswith("Error: ")]) == 1, said.err
    assert "Traceback" not in said.out + said.err
    for word in words:
        assert word in said.err, f"{word!r} is not in: {said.err}"


@pytest.fixture(scope="module")
def begun(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A search of which nothing ran yet: begun, with three trials waiting, and left by its driver."""
    from deephyper_balsam import HpProblem
    from deephyper_balsam.optimizers import make_optimizer

    folder = tmp_path_factory.mktemp("begun")
    (folder / "good.py").write_text(GOOD)
    problem = HpProblem("good")
    problem.add_hyperparameter((0.0, 1.0), "x")
    evaluator = BalsamEvaluator(f"{folder / 'good.py'}:run", "local", client_path=stack.client_path)
    settings = {"problem": problem.to_dict(), "method": "random", "options": {}, "seed": 1}
    evaluator.open("begun", settings, max_evals=3)
    evaluator.submit(make_optimizer("random", problem, seed=1).ask(3))
    evaluator.close()
    return "begun"


# --- app --------------------------------------------------------------------------------------------------------------


def test_an_application_is_registered_once_and_listed(call: Call, gateway: Gateway, tmp_path: Path) -> None:
    said = call("app", "register", "good.py", "--site", "local", "--json")
    assert said.code == 0, said
    made = json.loads(said.out)
    assert made["name"] == "good_run"
    assert made["target"] == f"{tmp_path / 'good.py'}:run"
    again = call("app", "register", "good.py:run", "--site", "local")
    assert again.code == 0
    assert f"Application good_run (id {made['id']}) is registered at site local" in again.out
    listed = json.loads(call("app", "ls", "--json").out)
    assert [row["id"] for row in listed if row["name"] == "good_run"] == [made["id"]]
    text = call("app", "ls").out
    assert "good_run" in text
    assert "Ready to register: ackley, digits, digits_torch, shell_command" in text


def test_another_function_of_the_same_name_is_registered_beside_the_first(call: Call, tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    for place in (tmp_path, tmp_path / "same"):
        (place / "twice.py").write_text(GOOD)
    first = json.loads(call("app", "register", "twice.py", "--site", "local", "--json").out)
    second = json.loads(call("app", "register", "same/twice.py", "--site", "local", "--json").out)
    assert (first["name"], second["name"]) == ("twice_run", "twice_run_2")
    assert first["id"] != second["id"]


@pytest.mark.parametrize("target", ["ackley", "shell_command"])
def test_bundled_applications_are_registered_by_name(call: Call, target: str, balsam_env: dict[str, str]) -> None:
    made = json.loads(call("app", "register", target, "--site", "local", "--json").out)
    balsam = [str(Path(sys.executable).with_name("balsam")), "app", "ls"]
    listed = subprocess.run(balsam, env=balsam_env, capture_output=True, text=True, timeout=60)
    assert made["name"] in listed.stdout


# --- bad input --------------------------------------------------------------------------------------------------------

ENOUGH = ("--problem", "good.py", "--site", "local", "--max-evals", "3")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "command",
    [("app", "register", "good.py", "--site", "nowhere"), ("search", "run", "s", *ENOUGH, "--site", "nowhere")],
    ids=" ".join,
)
def test_an_unknown_site_is_refused_and_the_known_ones_named(call: Call, command: tuple[str, ...]) -> None:
    refused(call(*command), 2, "'nowhere'", "local", "site init")
    assert not Path("s").exists()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("command", ["status", "best", "results", "stop"])
def test_an_unknown_search_is_refused_and_the_known_ones_named(call: Call, begun: str, command: str) -> None:
    refused(call("search", command, "nosuch"), 2, "'nosuch'", begun)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "ambs"), ["method", '"random"']),
        (("--seed", "2"), ["seed"]),
        (("--problem", "digits"), ["problem"]),
        (("--run", "ackley"), ["run"]),
    ],
)
def test_a_name_of_another_search_is_refused_with_what_differs(
    call: Call, begun: str, gateway: Gateway, arguments: tuple[str, ...], words: list[str]
) -> None:
    before = everything(gateway)
    command = ("search", "run", begun, *ENOUGH, "--method", "random", *arguments)
    refused(call(*command), 2, repr(begun), "Choose another name", *words)
    assert not Path(begun).exists()
    assert everything(gateway) == before


@pytest.mark.usefixtures("unchanged")
def test_an_option_of_another_method_is_refused(call: Call) -> None:
    refused(call("search", "run", "s", *ENOUGH, "--method", "random", "--surrogate", "RF"), 2, "random", "surrogate")
    assert not Path("s").exists()


@pytest.mark.usefixtures("unchanged")
def test_a_folder_that_cannot_be_written_is_refused(call: Call) -> None:
    Path("file").write_text("", encoding="utf-8")
    refused(
        call("search", "run", "s", *ENOUGH, "--log-dir", "file/below"),
        2,
        "file/below/s",
        "Not a directory",
        "--log-dir",
    )
    assert Path("file").read_text(encoding="utf-8") == ""


@pytest.mark.usefixtures("unchanged")
def test_results_into_a_folder_that_cannot_be_written_are_refused(call: Call, begun: str) -> None:
    Path("file").write_text("", encoding="utf-8")
    refused(call("search", "results", begun, "-o", "file/below.csv"), 2, "file/below.csv", "cannot be written")


@pytest.mark.usefixtures("unchanged")
def test_a_command_that_names_unknown_hyperparameters_is_refused(call: Call) -> None:
    Path("command.yaml").write_text("command: 'echo {{ x }} {{ width }}'\nobjective: {regex: '(.*)'}", encoding="utf-8")
    refused(call("search", "run", "s", *ENOUGH, "--run", "command.yaml"), 2, "['width']", "['x']")


@pytest.mark.usefixtures("unchanged")
def test_a_login_that_the_server_does_not_know_is_told(
    call: Call, stack: LocalStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = yaml.safe_load(stack.client_path.read_text())
    (tmp_path / "client.yml").write_text(yaml.safe_dump({**settings, "token": "wrong"}))
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(tmp_path / "client.yml"))
    refused(call("search", "ls"), 3, "balsam login", str(tmp_path / "client.yml"))


# --- a search that is looked at ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
def test_a_dry_run_prints_a_file_of_options_that_gives_the_same_again(call: Call) -> None:
    options = (*ENOUGH, "--surrogate", "ET", "--kappa", "1.5", "--nodes", "1", "--log-dir", "logs")
    first = call("search", "run", "s", *options, "--dry-run")
    assert first.code == 0, first
    assert yaml.safe_load(first.out)["kappa"] == 1.5
    Path("search.yaml").write_text(first.out, encoding="utf-8")
    again = call("search", "run", "s", "--file", "search.yaml", "--dry-run")
    assert (again.code, again.out) == (0, first.out)
    other = call("search", "run", "s", "--file", "search.yaml", "--surrogate", "RF", "--dry-run")
    assert yaml.safe_load(other.out)["surrogate"] == "RF"
    assert not Path("logs").exists()


def test_searches_are_listed(call: Call, begun: str) -> None:
    listed = {row["name"]: row for row in json.loads(call("search", "ls", "--json").out)}
    assert listed[begun]["method"] == "random"
    assert listed[begun]["problem"] == "good"
    assert listed[begun]["driver"] is None
    assert begun in call("search", "ls").out


def test_a_search_without_results_is_told_as_such(call: Call, begun: str) -> None:
    said = call("search", "status", begun)
    assert said.code == 0
    assert "Trials: 3 ready" in said.out
    assert "Driver: none" in said.out
    assert "No trial has an objective yet." in said.out
    assert call("search", "best", begun).code == 1
    rows = json.loads(call("search", "results", begun, "--json").out)
    assert [(row["job_id"], row["job_status"], row["objective"]) for row in rows] == [
        (number, "READY", None) for number in range(3)
    ]


def test_results_go_to_the_screen_or_to_a_file(call: Call, begun: str) -> None:
    shown = call("search", "results", begun)
    assert shown.out.splitlines()[0].startswith("p:x,objective,job_id,job_status,m:timestamp_submit")
    assert call("search", "results", begun, "-o", "here/all.csv").code == 0
    assert Path("here/all.csv").read_text(encoding="utf-8") == shown.out
    assert call("search", "results", begun, "--legacy").out.strip() == "x,objective,elapsed_sec"
    assert [name for name in os.listdir("here") if name.startswith(".")] == []


def test_stopping_a_search_that_nobody_drives_withdraws_what_waits(call: Call, begun: str) -> None:
    said = call("search", "stop", begun)
    assert said.code == 0
    assert "Nobody drives begun; 3 waiting trials withdrawn." in said.out
    assert "Trials: 3 cancelled" in call("search", "status", begun).out
