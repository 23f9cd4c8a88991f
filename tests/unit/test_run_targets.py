"""What the user names as run function, shell command or problem, and the Balsam application that is made of it."""

from __future__ import annotations

import base64
import functools
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.errors import BalsamError, InputError, TargetError
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.worker import make_run_function
from deephyper_balsam.store.applications import (
    bundled,
    command_parameters,
    describe,
    make_application,
    register,
    resolve_problem,
    resolve_run,
)
from deephyper_balsam.store.gateway import Gateway

pytest_plugins = ["balsam_fixtures"]
pytestmark = pytest.mark.usefixtures("modules_as_they_were")


def run_of_this_module(job: RunningJob) -> float:
    return float(job["x"]) + 1


class Trainer:
    def __init__(self, bonus: float) -> None:
        self.bonus = bonus

    def __call__(self, job: RunningJob) -> float:
        return float(job["x"]) + self.bonus

    def method(self, job: RunningJob) -> float:
        return float(job["x"]) - self.bonus


def evaluated(spec: dict[str, Any], **parameters: Any) -> Any:
    """Call the run function of a spec as a node does."""
    return make_run_function(json.loads(json.dumps(spec)), Path.cwd())(RunningJob(0, parameters))


# --- files, modules, folders -----------------------------------------------------------------------------------------


def test_a_file_names_its_function_or_run_by_default(tmp_path: Path) -> None:
    file = tmp_path / "my train.py"
    file.write_text("def run(job): return job['x']\ndef other(job): return 2 * job['x']\n")
    spec = resolve_run(str(file))
    assert spec == {"kind": "function", "name": "my_train_run", "target": f"{file}:run", "search_path": []}
    assert evaluated(spec, x=2) == 2
    assert evaluated(resolve_run(f"{file}:other"), x=2) == 4


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "relative_run.py").write_text("def run(job): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    assert resolve_run("relative_run.py:run")["target"] == f"{tmp_path / 'relative_run.py'}:run"


def test_a_folder_holds_a_run_and_a_problem(tmp_path: Path) -> None:
    folder = tmp_path / "7 apps"
    folder.mkdir()
    (folder / "run.py").write_text("def run(job): return 1.0\n")
    (folder / "problem.py").write_text(
        "from deephyper_balsam import HpProblem\nproblem = HpProblem('mine')\n"
        "problem.add_hyperparameter((1, 8), 'units')\n"
    )
    assert resolve_run(str(folder))["name"] == "run_7_apps_run"
    assert resolve_problem(str(folder)).name == "mine"


def test_a_module_beside_the_user_is_found_and_its_folder_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_me.py").write_text("def run(job): return 5.0\n")
    monkeypatch.chdir(tmp_path)
    spec = resolve_run("beside_me:run")
    assert (spec["target"], spec["search_path"], spec["name"]) == ("beside_me:run", [str(tmp_path)], "beside_me_run")


@pytest.mark.parametrize("name", sorted(bundled()))
def test_every_bundled_application_has_a_problem(name: str) -> None:
    assert len(resolve_problem(name)) > 0


def test_a_bundled_application_can_be_a_shell_command() -> None:
    assert {"digits", "ackley", "shell_command"} <= set(bundled())
    spec = resolve_run("shell_command")
    assert spec["kind"] == "command"
    assert command_parameters(spec) <= set(resolve_problem("shell_command").hyperparameter_names)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("none.py:run", r"none\.py does not exist; name a Python file, a module, or one of ackley"),
        ("none.yaml", r"none\.yaml does not exist"),
        ("no_such_module_at_all:run", r"no module 'no_such_module_at_all' here.*no bundled application.*ackley"),
        ("no.such.module:run", r"no module 'no' here"),
        ("not a target", r"'not a target' names nothing to load: give file\.py:run"),
        ("", r"run\.py does not exist; name a Python file"),
        (":run", r"run\.py does not exist; name a Python file"),
        ("math:no_such", r"math has no 'no_such'; it defines "),
        ("math:pi", r"math:pi is float; a function that takes a job is needed"),
        ("{}/two.py:run", r"two\.py:run must take one argument, the job, but its signature is \(a, b\)"),
        ("{}/two.py:none", r"must take one argument, the job, but its signature is \(\)"),
        ("{}/two.py:keyword", r"must take one argument, the job, but its signature is \(\*, job\)"),
        ("{}/two.py:missing", r"has no 'missing'; it defines keyword, none, run"),
        ("{}/raises.py:run", r"raises\.py failed in .*raises\.py, line 2: RuntimeError: no GPU here"),
        ("{}", r"run\.py does not exist"),
    ],
)
def test_a_bad_run_target_is_said_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.py").write_text("def run(a, b): ...\ndef none(): ...\ndef keyword(*, job): ...\n")
    (tmp_path / "raises.py").write_text("def boom():\n    raise RuntimeError('no GPU here')\nboom()\n")
    with pytest.raises(TargetError, match=message) as caught:
        resolve_run(target.format(tmp_path))
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{}/p.py:number", r"p\.py:number is int; a search needs an HpProblem"),
        ("{}/p.py", r"has no 'problem'; it defines number"),
        ("{}/none", r"names nothing to load: give file\.py:problem"),
    ],
)
def test_a_bad_problem_target_is_said_in_one_message(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "p.py").write_text("number = 3\n")
    with pytest.raises(TargetError, match=message):
        resolve_problem(target.format(tmp_path))


@pytest.mark.parametrize("signature", ["job", "job, epochs=3", "*args", "job, **more", "job, /"])
def test_these_signatures_take_a_job(tmp_path: Path, signature: str) -> None:
    (tmp_path / "signed.py").write_text(f"def run({signature}): return 1.0\n")
    assert resolve_run(f"{tmp_path / 'signed.py'}:run")["kind"] == "function"


# --- callables -------------------------------------------------------------------------------------------------------


def test_a_function_of_a_module_goes_by_name() -> None:
    spec = resolve_run(run_of_this_module)
    assert spec["target"] == f"{__name__}:run_of_this_module"
    assert str(Path(__file__).parent) in spec["search_path"]
    assert "payload" not in spec
    assert evaluated(spec, x=1) == 2.0


def nested(bonus: float) -> Callable[[RunningJob], float]:
    def run(job: RunningJob) -> float:
        return float(job["x"]) * bonus

    return run


@pytest.mark.parametrize(
    ("function", "name", "expected"),
    [
        (lambda job: job["x"] * 10, "function", 20.0),
        (nested(3), "run", 6.0),
        (functools.partial(lambda bonus, job: job["x"] + bonus, 5), "partial", 7.0),
        (Trainer(0.5), "Trainer", 2.5),
        (Trainer(0.5).method, "method", 1.5),
    ],
    ids=["lambda", "nested", "partial", "callable object", "bound method"],
)
def test_what_no_module_names_goes_by_value(function: Any, name: str, expected: float) -> None:
    spec = resolve_run(function)
    assert spec["name"].startswith(f"{name}_")
    assert spec["name"].isidentifier()
    base64.b64decode(spec["payload"])
    assert evaluated(spec, x=2) == expected


def test_a_function_that_cannot_be_sent_says_to_put_it_into_a_file() -> None:
    held = (n for n in range(3))

    def run(job: RunningJob) -> float:
        return float(next(held))

    with pytest.raises(TargetError, match=r"run cannot be sent to a node \(.*put it into a file and give file\.py:"):
        resolve_run(run)


def test_a_callable_without_room_for_the_job_is_refused() -> None:
    with pytest.raises(TargetError, match=r"must take one argument, the job, but its signature is \(\)"):
        resolve_run(lambda: 1.0)


# --- shell commands --------------------------------------------------------------------------------------------------

GOOD = {"command": "train {{ x }} {{here}} {{ python }}", "objective": {"regex": r"acc=(\S+)"}}


def write_yaml(folder: Path, content: Any) -> str:
    file = folder / "command.yaml"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_the_yaml_of_a_command_becomes_a_spec(tmp_path: Path) -> None:
    target = write_yaml(tmp_path, {**GOOD, "name": "my cmd", "maximize": False, "environment": {"A": 1}})
    spec = resolve_run(target)
    assert spec == {
        "kind": "command",
        "name": "my_cmd",
        "target": target,
        "command": GOOD["command"],
        "objective": GOOD["objective"],
        "maximize": False,
        "environment": {"A": 1},
        "here": str(tmp_path),
    }
    assert command_parameters(spec) == {"x"}


def test_a_folder_with_a_command_needs_no_run_py_and_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "shelly"
    folder.mkdir()
    write_yaml(folder, GOOD)
    spec = resolve_run(str(folder))
    assert (spec["name"], spec["maximize"], spec["environment"]) == ("shelly", True, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"must be a mapping with a `command`; its keys may be command, environment, maximize, name, objective"),
        ("[1, 2]", r"must be a mapping with a `command`"),
        ("command: 3", r"must be a mapping with a `command`"),
        ("command: [", r"is no YAML"),
        ({**GOOD, "comand": "x", 3: 4}, r"has unknown keys \['3', 'comand'\]; known are command, environment"),
        ({"command": "train"}, r"`objective` must be either .*but got None"),
        ({"command": "train", "objective": "acc"}, r"`objective` must be either .*but got 'acc'"),
        ({"command": "train", "objective": {}}, r"`objective` must be either"),
        ({"command": "t", "objective": {"regex": "(a)", "json": "r"}}, r"`objective` must be either"),
        ({"command": "t", "objective": {"regex": "acc=("}}, r"the objective's regex is wrong: .*unterminated"),
        ({"command": "t", "objective": {"regex": r"acc=\d"}}, r"must have one group, the number, but has 0"),
        ({"command": "t", "objective": {"regex": r"(a)(b)"}}, r"but has 2"),
        ({"command": "t", "objective": {"regex": 5}}, r"the values of `objective` must be text"),
        ({"command": "t", "objective": {"json": "r.json", "kee": "a"}}, r"`objective` has unknown keys \['kee'\]"),
        ({**GOOD, "environment": ["A=1"]}, r"`environment` must be a mapping of names to values, but got \['A=1'\]"),
        ({**GOOD, "command": "t {{ x"}, r"`command` cannot be filled in: line 1: .*Jinja.*\{% raw %\}"),
        ({**GOOD, "command": "t {{ x | nofilter }}"}, r"No filter named 'nofilter'"),
        ({**GOOD, "command": "t {{ flag(x) }}"}, r'flag\(\) takes the name in quotes: flag\("x"\)'),
    ],
)
def test_a_bad_yaml_is_said_in_one_message(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        resolve_run(write_yaml(tmp_path, content))
    assert "command.yaml" in str(caught.value)


PLAIN = "command: train\nobjective: {json: r.json}\n"


@pytest.mark.parametrize("written", ['"false"', "'no'", "", "~", "1", "0", "[true]", "maybe", "'true'"])
def test_the_direction_is_true_or_false_and_nothing_that_looks_like_it(tmp_path: Path, written: str) -> None:
    with pytest.raises(
        TargetError, match=r"`maximize` must be true or false, without quotes \(false for a loss\), but got"
    ):
        resolve_run(write_yaml(tmp_path, f"{PLAIN}maximize: {written}\n"))


@pytest.mark.parametrize(("written", "read"), [("true", True), ("false", False), ("no", False), ("Yes", True)])
def test_yamls_own_words_for_true_and_false_are_taken(tmp_path: Path, written: str, read: bool) -> None:
    assert resolve_run(write_yaml(tmp_path, f"{PLAIN}maximize: {written}\n"))["maximize"] is read


MISREAD = [
    "2020-01-01",
    "010",
    "0x1f",
    "1_000",
    "12:30:00",
    "1.10",
    "true",
    "no",
    "on",
    "2020-01-01 10:00:00",
    ".5",
    "1.0e+5",
]


@pytest.mark.parametrize("written", [*MISREAD, "", "~", "null", "[a]", "{a: b}"])
def test_a_variable_that_yaml_reads_otherwise_is_refused_with_what_to_write(tmp_path: Path, written: str) -> None:
    with pytest.raises(TargetError, match=r"`environment`: RUN_DATE ") as caught:
        resolve_run(write_yaml(tmp_path, f"{PLAIN}environment:\n  RUN_DATE: {written}\n"))
    if written in MISREAD:
        assert f"write '{written}'" in str(caught.value)


@pytest.mark.parametrize("written", MISREAD)
def test_the_same_in_quotes_arrives_as_it_is(tmp_path: Path, written: str) -> None:
    spec = resolve_run(
        write_yaml(tmp_path, f"{PLAIN}environment: {{RUN_DATE: '{written}', N: 8, RATE: 0.5, W: word}}\n")
    )
    assert spec["environment"] == {"RUN_DATE": written, "N": 8, "RATE": 0.5, "W": "word"}


@pytest.mark.parametrize("name", ["NO", "on", "2020-01-01", "3", "'A-B'", "''", "'A=B'"])
def test_a_variables_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TargetError, match=r"`environment` has .* for a name\. Letters, digits and _ are allowed"):
        resolve_run(write_yaml(tmp_path, f"{PLAIN}environment:\n  {name}: x\n"))


@pytest.mark.parametrize("written", ["010", "no", "", "2020-01-01", "[a]"])
def test_an_applications_name_that_yaml_reads_otherwise_is_refused(tmp_path: Path, written: str) -> None:
    with pytest.raises(TargetError, match=r"`name` is "):
        resolve_run(write_yaml(tmp_path, f"{PLAIN}name: {written}\n"))


@pytest.mark.parametrize("twice", ["maximize: true\nmaximize: false", "environment: {A: 1, A: 2}", "command: other"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, twice: str) -> None:
    with pytest.raises(TargetError, match=r"stands twice"):
        resolve_run(write_yaml(tmp_path, f"{PLAIN}{twice}\n"))


def test_a_regex_in_double_quotes_that_lost_its_backslash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="Write it in single quotes"):
        resolve_run(write_yaml(tmp_path, 'command: train\nobjective: {regex: "\\bacc=(.+)"}\n'))


def test_a_blank_environment_has_no_variables(tmp_path: Path) -> None:
    assert resolve_run(write_yaml(tmp_path, f"{PLAIN}environment:\n  # none yet\n"))["environment"] == {}


def test_a_yaml_that_is_no_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "command.yaml").write_bytes(b"command: \xff\xfe")
    with pytest.raises(TargetError, match="is no YAML"):
        resolve_run(str(tmp_path / "command.yaml"))


# --- in Balsam -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "lambda", "command"])
def test_an_application_survives_balsams_way_into_another_process(tmp_path: Path, kind: str) -> None:
    from balsam.schemas import serialize

    if kind == "file":
        (tmp_path / "sent_run.py").write_text("def run(job): return job['x'] * 2\n")
        spec = resolve_run(f"{tmp_path / 'sent_run.py'}:run")
    elif kind == "lambda":
        spec = resolve_run(lambda job: job["x"] * 2)
    else:
        command = {"command": "echo acc=$((2 * {{ x }}))", "objective": {"regex": r"acc=(\S+)"}}
        spec = resolve_run(write_yaml(tmp_path, command))
    payload = tmp_path / "payload"
    payload.write_text(serialize(make_application(spec, 7, "Sent")))
    code = f"""
        import json
        from pathlib import Path
        from types import SimpleNamespace
        from balsam.schemas import deserialize
        cls = deserialize(Path({str(payload)!r}).read_text())
        sent = []
        client = SimpleNamespace(get=lambda url: {{"data": {{}}}}, bulk_patch=lambda url, rows: sent.extend(rows))
        cls._set_client(client)
        job = SimpleNamespace(id=5, data={{}}, tags={{"trial": "0"}}, num_nodes=1, ranks_per_node=1)
        value = cls(job).run(x=21)
        print("LAST", json.dumps([cls.__name__, cls.__doc__, cls.site, value, sent]))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    name, doc, site, value, sent = json.loads(ended.stdout.rpartition("LAST")[2])
    assert (name, doc, site) == ("Sent", describe(spec), 7)
    assert value["objective"] == 42.0
    assert sent == [{"id": 5, "data": {"result": value}}]


def test_registering_twice_finds_the_same_application(
    gateway: Gateway, site: VirtualSite, api: BalsamApi, tmp_path: Path
) -> None:
    (tmp_path / "once.py").write_text("def run(job): return 1.0\n")
    spec = resolve_run(f"{tmp_path / 'once.py'}:run")
    first = register(gateway, spec, "lab")
    assert register(gateway, spec, "lab") == first
    assert [app["name"] for app in api.apps.values()] == ["once_run"]
    assert api.apps[first[0]]["description"] == describe(spec)


def test_another_spec_of_the_same_name_gets_a_number_and_leaves_the_first_alone(
    gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> None:
    specs = [
        {"kind": "function", "name": "train_run", "target": f"/{n}/train.py:run", "search_path": []} for n in range(3)
    ]
    names = [register(gateway, spec, "lab")[1] for spec in specs]
    assert names == ["train_run", "train_run_2", "train_run_3"]
    assert [register(gateway, spec, "lab")[1] for spec in specs] == names
    assert [app["description"] for app in api.apps.values()] == [describe(spec) for spec in specs]


@pytest.mark.parametrize("other", ["train", "elsewhere"])
def test_two_searches_that_register_at_the_same_moment_do_not_disturb_each_other(
    other: str, gateway: Gateway, site: VirtualSite, api: BalsamApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, quicker = (
        {"kind": "function", "name": "train", "target": f"/{place}.py:run", "search_path": []}
        for place in ("train", other)
    )
    create = gateway.create_app

    def create_too_late(app: Any) -> Any:
        monkeypatch.setattr(gateway, "create_app", create)
        register(gateway, quicker, "lab")
        raise BalsamError('answered 400 Bad Request: {"detail":"An app with this site_id and name already exists"}')

    monkeypatch.setattr(gateway, "create_app", create_too_late)
    app_id, name = register(gateway, spec, "lab")
    assert name == ("train" if other == "train" else "train_2")
    assert api.apps[app_id]["description"] == describe(spec)
    assert len(api.apps) == (1 if other == "train" else 2)


def test_a_registration_that_balsam_refuses_is_told(
    gateway: Gateway, site: VirtualSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(app: Any) -> Any:
        raise BalsamError("answered 422")

    monkeypatch.setattr(gateway, "create_app", refuse)
    with pytest.raises(BalsamError, match="422"):
        register(gateway, {"kind": "function", "name": "t", "target": "/t.py:run", "search_path": []}, "lab")


def test_the_same_spec_at_two_sites_is_two_applications(gateway: Gateway, site: VirtualSite, api: BalsamApi) -> None:
    other = VirtualSite(api, "theta")
    spec = {"kind": "function", "name": "train", "target": "/train.py:run", "search_path": []}
    register(gateway, spec, "lab")
    register(gateway, spec, "theta")
    assert [app["site_id"] for app in api.apps.values()] == [site.id, other.id]
