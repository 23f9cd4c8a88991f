"""`problem new` makes what works at once; `problem check` finds what would fail on a node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deephyper_balsam.cli import main

SPACE = """
from deephyper_balsam import HpProblem
problem = HpProblem("p")
problem.add_hyperparameter((0.0, 1.0), "x")
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("deephyper_balsam.node.preflight._ONE_MACHINE", ())


def check(run: str, *options: str) -> dict[str, Any]:
    folder = Path("mine")
    folder.mkdir(exist_ok=True)
    (folder / "problem.py").write_text(SPACE)
    (folder / "run.py").write_text(run)
    said = CliRunner().invoke(main, ["problem", "check", "mine", "--json", *options])
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
    found: dict[str, Any] = json.loads(said.stdout)
    assert said.exit_code == (0 if found["objective"] is not None else 1)
    return found


def test_a_good_function_gives_no_finding() -> None:
    found = check("def run(job):\n    open('notes.txt', 'w').write('kept in its own folder')\n    return job['x']\n")
    assert (found["objective"], found["findings"]) == (0.5, [])
    assert not Path("notes.txt").exists()


FINDINGS = {
    "prints instead of returning": ("def run(job):\n    print('loss: 0.25')\n", "`return` the number"),
    "a relative path": (
        "def run(job):\n    return float(open('data.txt').read())\n",
        "opens 'data.txt' from the current folder",
    ),
    "a module of the current folder": (
        "def run(job):\n    import helper_of_mine\n    return 1.0\n",
        "helper_of_mine lies in the current folder",
    ),
    "a module that nobody has": (
        "def run(job):\n    import no_such_module\n    return 1.0\n",
        "no_such_module is not installed",
    ),
    "what __main__ has": ("def run(job):\n    from __main__ import settings\n    return 1.0\n", "from `__main__`"),
    "what only a script sets": (
        "def run(job):\n    return rate\n\nif __name__ == '__main__':\n    rate = 3.0\n",
        "`rate` is set only under",
    ),
    "records and never asks": (
        "def run(job):\n    for epoch in (1, 2):\n        job.record(epoch, 0.5)\n    return job.objective\n",
        "never asks `job.stopped()`",
    ),
    "budgets that go back": (
        "def run(job):\n    for epoch in (1, 2, 1):\n        job.record(epoch, 0.5)\n    return job.stopped() or 1.0\n",
        "it recorded at 2 and then at 1",
    ),
    "a GPU": ("def run(job):\n    raise RuntimeError('No CUDA GPUs are available')\n", "It needs a GPU"),
}


@pytest.mark.parametrize("kind", FINDINGS)
def test_what_would_fail_on_a_node_is_one_finding(kind: str) -> None:
    Path("data.txt").write_text("3.0", encoding="utf-8")
    Path("helper_of_mine.py").write_text("", encoding="utf-8")
    run, words = FINDINGS[kind]
    findings = check(run)["findings"]
    assert len(findings) == 1, findings
    assert words in findings[0]
    assert "\n" not in findings[0]


def test_a_module_found_through_pythonpath_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "far_module.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    [finding] = check("def run(job):\n    import far_module\n    return 1.0\n")["findings"]
    assert "through PYTHONPATH" in finding


def test_a_file_written_outside_is_named_and_the_evaluation_is_good(tmp_path: Path) -> None:
    found = check(f"def run(job):\n    open({str(tmp_path / 'all.log')!r}, 'a').write('x')\n    return 1.0\n")
    assert found["objective"] == 1.0
    [finding] = found["findings"]
    assert f"writes {tmp_path / 'all.log'}" in finding


def test_gpus_that_this_machine_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has GPUs")
    [finding] = check("def run(job):\n    return 1.0\n", "--gpus-per-rank", "1")["findings"]
    assert "`gpus_per_rank`, --gpus-per-rank 1, asks for GPUs" in finding


def test_a_folder_that_other_nodes_do_not_see_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("deephyper_balsam.node.preflight._ONE_MACHINE", (str(tmp_path),))
    [finding] = check("def run(job):\n    return 1.0\n")["findings"]
    assert "lies on this machine alone" in finding


def test_a_process_that_ends_itself_is_a_failure_that_says_so() -> None:
    found = check("import os\ndef run(job):\n    os._exit(3)\n")
    assert "status 3" in found["failure"]


def test_a_new_problem_can_be_checked_and_its_test_passes() -> None:
    made = CliRunner().invoke(main, ["problem", "new", "mine"])
    assert made.exit_code == 0, made.output
    assert {path.name for path in Path("mine").iterdir()} == {
        "README.md", "problem.py", "run.py", "search.yaml", "test_problem.py",
    }  # fmt: skip
    said = CliRunner().invoke(main, ["problem", "check", "mine", "--json"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["findings"] == []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd="mine", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize(("name", "words"), [("there", "exists already"), ("3d", "cannot name a problem")])
def test_a_new_problem_overwrites_nothing(name: str, words: str) -> None:
    Path("there").mkdir()
    said = CliRunner().invoke(main, ["problem", "new", name])
    assert said.exit_code == 2
    assert words in said.stderr
    assert not list(Path("there").iterdir())
