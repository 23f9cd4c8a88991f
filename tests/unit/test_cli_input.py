"""What the commands say to good and to bad input, as far as no Balsam is needed for it.

Bad input gives one message on stderr that says what was got and what to do, the exit code of its kind, no traceback,
and nothing anywhere is begun.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from deephyper_balsam.cli import main

GOOD = """
from deephyper_balsam import HpProblem
problem = HpProblem("good")
problem.add_hyperparameter((0.0, 1.0), "x")
def run(job):
    return job["x"]
"""
CLIENT = """
api_root: http://127.0.0.1:{port}
client_class: balsam.client.BasicAuthRequestsClient
token: {token}
token_expiry: {expiry}-11-23 23:16:01.628156
connect_timeout: 6.2
read_timeout: 120.0
retry_count: 10
"""


@dataclass
class Said:
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run the command in an empty folder and an empty home, with no login to any Balsam."""
    home = tmp_path / "home"
    home.mkdir()
    work = tmp_path / "work folder"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (work / "good.py").write_text(GOOD)

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
def down(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[int]:
    """A login to a Balsam that is not up."""
    with socket.socket() as taken:  # bound but not listening: nobody else gets the port, and it refuses
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        client = tmp_path / "client.yml"
        client.write_text(CLIENT.format(port=port, token="x", expiry=2100))
        monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client))
        yield port


def refused(said: Said, code: int, *words: str) -> None:
    """Hold that it was refused in one message with all these words."""
    assert said.code == code, said
    lines = [line for line in said.err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, said.err
    assert said.err.count("Error: ") == 1 or lines[0].count("Error: ") >= 1
    assert "Traceback" not in said.out + said.err
    for word in words:
        assert word in said.err, f"{word!r} is not in: {said.err}"


def untouched(folder: Path = Path()) -> None:
    """Hold that nothing was made in the folder where the command ran."""
    assert [path.name for path in folder.iterdir() if path.suffix not in (".py", ".yaml", "")] == []
    assert [path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


# --- problem ----------------------------------------------------------------------------------------------------------


def test_problem_show_lists_the_hyperparameters(call: Call) -> None:
    said = call("problem", "show", "digits")
    assert said.code == 0
    assert all(name in said.out for name in ("num_layers", "learning_rate", "log", "0.001", "momentum"))


def test_problem_show_json_is_the_problem(call: Call) -> None:
    from deephyper_balsam import HpProblem

    shown = json.loads(call("problem", "show", "ackley", "--json").out)
    assert HpProblem.from_dict(shown).hyperparameter_names == ("x0", "x1", "x2", "x3", "x4")


@pytest.mark.parametrize("target", ["good.py", "good.py:problem", "good", "good:problem"])
def test_problem_check_evaluates_one_configuration_here(call: Call, target: str) -> None:
    said = call("problem", "check", target)
    assert said.code == 0, said
    assert "Objective: 0.5" in said.out


def test_problem_check_tries_the_starting_point_first(call: Call) -> None:
    Path("start.py").write_text(GOOD + "problem.add_starting_point(x=0.25)", encoding="utf-8")
    outcome = json.loads(call("problem", "check", "start.py", "--json").out)
    assert outcome["configuration"] == {"x": 0.25}
    assert outcome["objective"] == 0.25


def test_problem_check_runs_a_shell_command(call: Call) -> None:
    said = call("problem", "check", "shell_command")
    assert said.code == 0, said
    assert "Objective: 0." in said.out


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('too wide')", "ValueError: too wide"),
        ("return float('nan')", "nan"),
        ("return None", "None"),
        ("return 'F_memory'", "memory"),
        ("import sys; sys.exit(3)", "sys.exit(3)"),
    ],
)
def test_problem_check_of_a_run_that_fails_says_why_and_exits_1(call: Call, body: str, reason: str) -> None:
    Path("bad.py").write_text(GOOD.replace("return job", body + "\n    return job"), encoding="utf-8")
    said = call("problem", "check", "bad.py")
    assert said.code == 1
    assert reason in said.out
    assert said.err == ""


BAD_PROBLEMS = {
    "empty space": ("", ['"p" has no hyperparameters', "add_hyperparameter"]),
    "contradictory space": (
        "x = problem.add_hyperparameter((1, 5), 'x')\n"
        "y = problem.add_hyperparameter((6, 9), 'y')\n"
        "problem.add_forbidden_clause(cs.ForbiddenLessThanRelation(x, y))",
        ["contradictory", "Remove a forbidden clause"],
    ),
    "starting point outside": (
        "problem.add_hyperparameter((1, 5), 'x')\nproblem.add_starting_point(x=77)",
        ["starting point", "[1, 5]", "77"],
    ),
    "range upside down": ("problem.add_hyperparameter((5, 1), 'x')", ["low=5", "high=1"]),
    "a condition on nothing": ("problem.add_condition(3)", ["condition", "3"]),
    "does not import": ("import no_such_package", ["no_such_package", "ModuleNotFoundError", "line 4"]),
    "raises": ("raise RuntimeError('no licence')", ["RuntimeError: no licence", "line 4"]),
    "not Python": ("def", ["SyntaxError", "line 4"]),
    "leaves Python": ("import sys; sys.exit('bye')", ["SystemExit: bye"]),
    "no HpProblem": ("problem = 3", ["is int", "HpProblem"]),
    "another name": ("space = problem; del problem", ["'problem'", "space"]),
}


@pytest.mark.parametrize("command", [("problem", "show"), ("problem", "check"), ("search", "run", "s", "--problem")])
@pytest.mark.parametrize("kind", BAD_PROBLEMS)
def test_a_bad_problem_is_refused(call: Call, kind: str, command: tuple[str, ...]) -> None:
    code, words = BAD_PROBLEMS[kind]
    Path("bad.py").write_text(
        "import ConfigSpace as cs\nfrom deephyper_balsam import HpProblem\nproblem = HpProblem('p')\n"
        + code
        + "\ndef run(job): return 1.0\n",
        encoding="utf-8",
    )
    more = ("--site", "local", "--max-evals", "3") if command[0] == "search" else ()
    refused(call(*command, "bad.py", *more), 2, "bad.py" if "has no" not in words[0] else "p", *words)
    untouched()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nosuch", ["'nosuch'", "digits"]),
        ("nosuch.py", ["nosuch.py does not exist", "digits"]),
        ("digits:nosuch", ["'nosuch'", "problem"]),
        ("no such thing", ["file.py:problem", "digits"]),
        ("nosuch.module:problem", ["'nosuch'"]),
        ("good.inner:problem", ["good.inner"]),
        (".", ["problem.py"]),
    ],
)
def test_an_unknown_problem_is_refused(call: Call, target: str, words: list[str]) -> None:
    refused(call("problem", "show", target), 2, *words)
    refused(call("search", "run", "s", "--problem", target, "--site", "local", "--max-evals", "3"), 2, *words)
    untouched()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nosuch.py:run", ["nosuch.py does not exist"]),
        ("good.py:nosuch", ["'nosuch'", "run"]),
        ("good.py:problem", ["HpProblem", "function"]),
        ("noarg.py", ["one argument", "()"]),
        ("broken.py", ["No module named 'no_such_package'"]),
        ("nosuch.yaml", ["nosuch.yaml does not exist"]),
    ],
)
def test_an_unknown_or_wrong_run_function_is_refused(call: Call, target: str, words: list[str]) -> None:
    Path("noarg.py").write_text("def run(): return 1", encoding="utf-8")
    Path("broken.py").write_text("import no_such_package", encoding="utf-8")
    refused(call("problem", "check", "good.py", "--run", target), 2, *words)
    refused(call("app", "register", target, "--site", "local"), 2, *words)
    arguments = ("--problem", "good.py", "--run", target, "--site", "local", "--max-evals", "3")
    refused(call("search", "run", "s", *arguments), 2, *words)
    untouched()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("command: [", ["no YAML"]),
        ("- a list", ["mapping", "command"]),
        ("command: echo 1\nobjective: {regex: '(.*)'}\nscore: 3", ["score", "maximize"]),
        ("command: echo 1", ["objective", "regex", "json"]),
        ("command: echo 1\nobjective: {regex: '('}", ["regex"]),
        ("command: echo 1\nobjective: {regex: 'a'}", ["one group"]),
    ],
)
def test_a_bad_shell_command_file_is_refused(call: Call, text: str, words: list[str]) -> None:
    Path("command.yaml").write_text(text, encoding="utf-8")
    refused(call("app", "register", "command.yaml", "--site", "local"), 2, "command.yaml", *words)
    untouched()


# --- search run -------------------------------------------------------------------------------------------------------


def search_run(call: Call, *arguments: str, name: str = "s") -> Said:
    return call("search", "run", name, *arguments)


ENOUGH = ("--problem", "good.py", "--site", "local", "--max-evals", "3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*ENOUGH, "--method", "magic"), ["--method", "'magic'", "ambs"]),
        ((*ENOUGH, "--surrogate", "SVM"), ["--surrogate", "'SVM'", "RF"]),
        ((*ENOUGH, "--max-eval-count", "3"), ["--max-eval-count"]),
        ((*ENOUGH, "--max-evals", "-3"), ["--max-evals", "-3", "x>=1"]),
        ((*ENOUGH, "--max-evals", "0"), ["--max-evals", "x>=1"]),
        ((*ENOUGH, "--max-evals", "many"), ["--max-evals", "'many'", "integer"]),
        ((*ENOUGH, "--timeout", "-1"), ["--timeout", "x>0"]),
        ((*ENOUGH, "--timeout", "nan"), ["--timeout", "nan", "finite"]),
        ((*ENOUGH, "--eval-timeout", "0"), ["--eval-timeout", "x>0"]),
        ((*ENOUGH, "--seed", "-1"), ["--seed", "x>=0"]),
        ((*ENOUGH, "--kappa", "-1"), ["--kappa", "x>=0"]),
        ((*ENOUGH, "--xi", "inf"), ["--xi", "finite"]),
        ((*ENOUGH, "--nodes", "-1"), ["--nodes", "x>=1"]),
        ((*ENOUGH, "--nodes", "1", "--wall-time-min", "0"), ["--wall-time-min", "x>=1"]),
        ((*ENOUGH, "--evals-per-node", "-2"), ["--evals-per-node", "x>=1"]),
        ((*ENOUGH, "--num-nodes-per-eval", "2", "--evals-per-node", "2"), ["spans nodes or shares one"]),
        ((*ENOUGH, "--gpus-per-rank", "-1"), ["--gpus-per-rank", "x>=0"]),
        ((*ENOUGH, "--ranks-per-node", "0"), ["--ranks-per-node", "x>=1"]),
        (ENOUGH[:4], ["--max-evals", "--timeout"]),
        (ENOUGH[2:], ["--problem"]),
        (ENOUGH[:2] + ENOUGH[4:], ["--site"]),
        ((*ENOUGH, "--file", "nosuch.yaml"), ["nosuch.yaml", "No such file"]),
    ],
)
def test_bad_options_of_a_search_are_refused(call: Call, arguments: tuple[str, ...], words: list[str]) -> None:
    refused(search_run(call, *arguments), 2, *words)
    untouched()


@pytest.mark.parametrize(
    "name", ["two words", "a/b", "../up", "", "ümlaut", "-dash", ".hidden", "x" * 65, "a:b", "a,b"]
)
def test_a_name_with_illegal_characters_is_refused(call: Call, name: str) -> None:
    said = call("search", "run", *ENOUGH, "--", name)
    refused(said, 2, repr(name), "letters, digits")
    untouched()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["no YAML"]),
        ("just text", ["mapping", "str"]),
        ("- problem: digits", ["mapping", "list"]),
        ("", ["mapping"]),
        ("max_evals: 3\nmax_evaluations: 3", ["max_evaluations", "max_evals", "surrogate"]),
        ("3: 4", ["'3'", "max_evals"]),
        ("max_evals: ten", ["max_evals", "'ten'", "integer"]),
        ("max_evals: 2.5", ["max_evals", "2.5"]),
        ("max_evals: -3", ["max_evals", "x>=1"]),
        ("max_evals: yes", ["max_evals", "True"]),
        ("timeout: .nan", ["timeout", "nan"]),
        ("method: magic", ["method", "'magic'", "ambs"]),
        ("site: {a: b}", ["site", "single value"]),
        ("method: [random, ga]", ["method", "single value"]),
        ("nodes: [1, 2]", ["nodes", "single value"]),
        ("nodes: {a: none}", ["nodes", "'none'", "integer"]),
    ],
)
def test_a_bad_file_of_options_is_refused(call: Call, text: str, words: list[str]) -> None:
    Path("search.yaml").write_text(text, encoding="utf-8")
    refused(search_run(call, *ENOUGH, "--file", "search.yaml"), 2, "search.yaml", *words)
    untouched()


def test_a_file_that_is_no_text_is_refused(call: Call) -> None:
    Path("search.yaml").write_bytes(b"\xff\xfe\x00")
    refused(search_run(call, *ENOUGH, "--file", "search.yaml"), 2, "search.yaml", "no YAML")


@pytest.mark.parametrize("missing", [("search", "run"), ("search", "status"), ("app", "register"), ("problem", "show")])
def test_a_missing_argument_is_named(call: Call, missing: tuple[str, ...]) -> None:
    refused(call(*missing), 2, "Missing argument")


@pytest.mark.parametrize(
    "unknown", [("nonsense",), ("search", "nonsense"), ("app", "nonsense"), ("problem", "nonsense")]
)
def test_an_unknown_command_is_refused(call: Call, unknown: tuple[str, ...]) -> None:
    refused(call(*unknown), 2, "'nonsense'")


# --- no Balsam --------------------------------------------------------------------------------------------------------

NEED_BALSAM = [
    ("app", "ls"),
    ("app", "register", "good.py", "--site", "local"),
    ("search", "ls"),
    ("search", "status", "s"),
    ("search", "best", "s"),
    ("search", "results", "s"),
    ("search", "stop", "s"),
    ("search", "run", "s", *ENOUGH),
    ("search", "run", "s", *ENOUGH, "--dry-run"),
]


@pytest.mark.parametrize("command", NEED_BALSAM, ids=" ".join)
def test_without_a_login_every_command_says_balsam_login(call: Call, command: tuple[str, ...]) -> None:
    refused(call(*command), 3, "Not logged in", "balsam login", ".balsam/client.yml")
    untouched()


@pytest.mark.parametrize("command", NEED_BALSAM, ids=" ".join)
def test_a_server_that_is_not_up_is_named_soon(call: Call, down: int, command: tuple[str, ...]) -> None:
    began = time.monotonic()
    refused(call(*command), 3, f"http://127.0.0.1:{down}", "does not answer")
    assert time.monotonic() - began < 15
    untouched()


def test_a_login_that_has_expired_is_told(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = tmp_path / "client.yml"
    client.write_text(CLIENT.format(port=1, token="x", expiry=2020))
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client))
    refused(call("search", "ls"), 3, "expired", "balsam login", str(client))


@pytest.mark.parametrize("text", ["{", "- 1", "api_root: http://127.0.0.1:1\nnonsense: 3", "\x00"])
def test_credentials_that_cannot_be_read_are_named(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    client = tmp_path / "client.yml"
    client.write_text(text)
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client))
    refused(call("search", "ls"), 3, str(client))


# --- quickstart -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-evals", "0"), ["--max-evals", "x>=1"]),
        (("--workers", "-1"), ["--workers", "x>=1"]),
        (("--method", "magic"), ["--method", "ambs"]),
        (("--seed", "-1"), ["--seed"]),
        (("--problem", "nosuch"), ["'nosuch'", "digits"]),
        (("--problem", "onlyproblem.py"), ["onlyproblem.py", "'run'"]),
        (("--dir", "file/below"), ["file/below", "Not a directory"]),
    ],
)
def test_quickstart_refuses_bad_input_before_it_starts_anything(
    call: Call, arguments: tuple[str, ...], words: list[str]
) -> None:
    Path("onlyproblem.py").write_text(GOOD.partition("def run")[0], encoding="utf-8")
    Path("file").write_text("", encoding="utf-8")
    refused(call("quickstart", *arguments), 2, *words)
    untouched()


def test_an_interrupted_command_exits_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deephyper_balsam.store.applications.resolve_problem", interrupted)
    said = call("problem", "show", "digits")
    assert said.code == 130
    assert said.err.strip() == "Interrupted."


def test_the_process_itself_ends_with_that_code_and_message(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("BALSAM_CLIENT_PATH", None)
    for arguments, code in ((["problem", "show", "nosuch"], 2), (["search", "ls"], 3), (["search", "nonsense"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "deephyper_balsam", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        refused(Said(done.returncode, done.stdout, done.stderr), code)
        assert done.stdout == ""


def test_options_from_a_file_are_those_of_the_command_line(call: Call) -> None:
    from deephyper_balsam.cli.search import run
    from deephyper_balsam.cli.search_settings import read_file

    text = {"problem": "digits", "max_evals": 30, "timeout": 60, "kappa": 1.5, "site": 1, "queue": None, "log_dir": "d"}
    Path("search.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    with run.make_context("run", ["s", *ENOUGH]) as context:
        read = read_file(Path("search.yaml"), [str(option.name) for option in context.command.params])
    assert read == {
        "problem": "digits",
        "max_evals": 30,
        "timeout": 60.0,
        "kappa": 1.5,
        "site": "1",
        "log_dir": Path("d"),
    }
