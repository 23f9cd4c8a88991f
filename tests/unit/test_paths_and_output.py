"""Options in a file, paths of every kind, and an output that does not take everything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from deephyper_balsam.cli import main
from deephyper_balsam.node.preflight import run_preflight

GOOD = """
from deephyper_balsam import HpProblem
problem = HpProblem("good")
problem.add_hyperparameter((0.0, 1.0), "x")
def run(job):
    return job["x"]
"""
ENOUGH = ("--problem", "good.py", "--site", "local", "--max-evals", "3")

Call = Callable[..., Any]


def refused(said: Any, code: int, *words: str) -> None:
    assert said.code == code, said
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run the command in a folder of its own, with no login to any Balsam."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BALSAM_CLIENT_PATH", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("good.py").write_text(GOOD, encoding="utf-8")

    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(main, list(arguments), prog_name="deephyper-balsam")
        return SimpleNamespace(code=done.exit_code, out=done.stdout, err=done.stderr)

    return run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_evals: yes", ["max_evals", "'yes'", "integer"]),
        ("max_evals: 2020-01-01", ["max_evals", "'2020-01-01'", "integer"]),
        ("seed: 010", ["seed", "010", "YAML reads as 8"]),
        ("seed: 0x10", ["seed", "'0x10'", "integer"]),
        ("timeout: 1:30:00", ["timeout", "'1:30:00'", "float"]),
        ("nodes: {a: 010}", ["nodes", "010", "YAML reads as 8"]),
        ("queue:", ["queue", "is blank"]),
        ("seed: ''", ["seed", "is blank"]),
        ("nodes: {a: }", ["nodes", "is blank"]),
        ("site: [a, '']", ["site", "is blank"]),
        ("seed: 3\nseed: 4", ["'seed' stands twice"]),
    ],
)
def test_what_yaml_reads_otherwise_than_it_is_written_is_refused(call: Call, text: str, words: list[str]) -> None:
    Path("search.yaml").write_text(text, encoding="utf-8")
    refused(call("search", "run", "s", *ENOUGH, "--file", "search.yaml"), 2, "search.yaml", *words)


@pytest.mark.parametrize(
    "program", ["sleep 300 & echo $! > {0}", "(while :; do echo x; sleep 1; done) & echo $! > {0}"]
)
def test_what_a_run_leaves_in_the_background_neither_holds_the_check_nor_outlives_it(
    tmp_path: Path, program: str
) -> None:
    line = program.format(tmp_path / "pid")
    text = f"import subprocess\ndef run(job):\n    subprocess.run({line!r}, shell=True)\n    return 1.0\n"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    spec = {"kind": "function", "target": f"{tmp_path}/mine.py:run", "search_path": []}
    assert run_preflight(spec, {}).outcome["objective"] == 1.0
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("written", ["on", "no", "2020-01-01", "010", "1.10", "12:30", "~x"])
def test_a_text_in_a_file_of_options_is_what_was_written(call: Call, written: str) -> None:
    from deephyper_balsam.cli.search import run
    from deephyper_balsam.cli.search_settings import read_file

    Path("search.yaml").write_text(f"queue: {written}\nproject: null\nnodes: {{{written}: 3}}\n", encoding="utf-8")
    with run.make_context("run", ["s", *ENOUGH]) as context:
        read = read_file(Path("search.yaml"), [str(option.name) for option in context.command.params])
    assert read == {"queue": written, "nodes": {written: 3}}


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(call: Call) -> Callable[..., dict[str, object]]:
    """Read a file of options from the current folder."""
    from deephyper_balsam.cli.search import run
    from deephyper_balsam.cli.search_settings import read_file

    def read(file: Path) -> dict[str, object]:
        with run.make_context("run", ["s", *ENOUGH]) as context:
            return read_file(file, [str(option.name) for option in context.command.params])

    return read


def test_paths_in_a_file_of_options_are_relative_to_the_file(
    settings: Callable[..., dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deephyper_balsam.store.applications import resolve_problem, resolve_run

    there = tmp_path / "there 12:30"
    (there / "pkg").mkdir(parents=True)
    (there / "mine.py").write_text(GOOD)
    (there / "pkg" / "__init__.py").touch()
    (there / "pkg" / "deep.py").write_text(GOOD.replace("good", "deep"))
    (there / "points.csv").write_text("x,objective\n0.5,1\n")
    file = there / "search.yaml"
    file.write_text("problem: mine.py\nrun: pkg.deep:run\nwarm_start: points.csv\nlog_dir: out\nsite: local\n")
    for place in (tmp_path, there, Path("/")):
        monkeypatch.chdir(place)
        named = file if place == Path("/") else Path(os.path.relpath(file))
        read = settings(named)
        assert resolve_problem(str(read["problem"])).name == "good"
        assert resolve_run(str(read["run"]))["search_path"] == [str(there)]
        assert Path(str(read["warm_start"])).read_text(encoding="utf-8")
        assert Path(str(read["log_dir"])).resolve() == there / "out"


def test_what_is_only_in_the_current_folder_or_comes_with_the_package_is_found_as_before(
    settings: Callable[..., dict[str, object]],
) -> None:
    from deephyper_balsam.store.applications import resolve_problem

    Path("settings").mkdir()
    for target, name in (("good.py:problem", "good"), ("digits", "digits"), ("good", "good")):
        Path("settings/search.yaml").write_text(f"problem: {target}\n", encoding="utf-8")
        assert resolve_problem(str(settings(Path("settings/search.yaml"))["problem"])).name == name


def test_a_path_that_is_nowhere_is_refused_as_seen_from_the_file(call: Call) -> None:
    Path("sub").mkdir()
    Path("sub/search.yaml").write_text("problem: nosuch.py\nsite: local\nmax_evals: 3\n", encoding="utf-8")
    refused(call("search", "run", "s", "--file", "sub/search.yaml"), 2, "sub/nosuch.py does not exist")


@pytest.mark.parametrize("suffix", ["", ":problem"])
def test_a_path_with_colons_names_a_problem(call: Call, suffix: str) -> None:
    folder = Path("run_12:30:00")
    folder.mkdir()
    (folder / "mine.py").write_text(GOOD)
    (folder / "problem.py").write_text(GOOD)
    (folder / "run.py").write_text(GOOD)
    assert call("problem", "show", f"{folder}/mine.py{suffix}").code == 0
    assert call("problem", "check", f"{folder}/mine.py{suffix}").code == 0
    assert call("problem", "check", str(folder)).code == 0
    refused(call("problem", "show", f"{folder}/nosuch.py{suffix}"), 2, "run_12:30:00/nosuch.py does not exist")


def test_a_shell_command_in_a_path_with_colons_runs(call: Call) -> None:
    folder = Path("a:b:c/d:run")
    folder.mkdir(parents=True)
    (folder / "problem.py").write_text(GOOD)
    (folder / "command.yaml").write_text("command: echo s={{ x }}\nobjective: {regex: 's=(.+)'}\n")
    assert call("problem", "check", str(folder)).code == 0
    assert call("problem", "check", str(folder), "--run", f"{folder}/command.yaml").code == 0


# --- the output ------------------------------------------------------------------------------------------------------


def process(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "deephyper_balsam", *arguments],
        env={**os.environ, "HOME": str(tmp_path), **environment},
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_an_output_that_lacks_a_sign_shows_its_number(tmp_path: Path, encoding: str) -> None:
    choices = GOOD.replace('(0.0, 1.0), "x")', '["\u5149", "\u03b1", "\u20ac\u0151"], "x")').replace('job["x"]', "1.0")
    (tmp_path / "good.py").write_text(choices, encoding="utf-8")
    for words in (["show"], ["check"], ["show", "--json"]):
        said = process(tmp_path, "problem", words[0], "good.py", *words[1:], PYTHONIOENCODING=encoding)
        assert said.returncode == 0, said.stderr
        assert rb"\u5149" in said.stdout
    said = process(tmp_path, "problem", "show", "n\u5149.py", PYTHONIOENCODING=encoding)
    assert said.returncode == 2
    assert b"Traceback" not in said.stderr
    assert rb"n\u5149.py does not exist" in said.stderr


@pytest.mark.parametrize(
    "words", ["problem show good.py", "problem show good.py --json", "--help", "modulefile", "--version"]
)
def test_a_full_disk_under_the_output_is_said_in_one_line(tmp_path: Path, words: str) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    line = f"{sys.executable} -m deephyper_balsam {words} > /dev/full"
    said = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 2
    assert said.stderr == "Error: The output cannot be written: No space left on device.\n"


def test_a_full_disk_under_both_outputs_ends_without_a_word_and_with_the_code(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    line = f"{sys.executable} -m deephyper_balsam problem show good.py > /dev/full 2> /dev/full"
    held_back = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for environment in (held_back, {**held_back, "PYTHONUNBUFFERED": "1"}):
        said = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, timeout=60, check=False)
        assert said.returncode == 2
