"""Text is UTF-8 for us, whatever the locale says: ours, that of commands, and what a run prints."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
_TEXT = ("text", "universal_newlines")

PROBLEM = """
from deephyper_balsam import HpProblem

problem = HpProblem("naïve")
problem.add_hyperparameter(["réglé", "日本"], "activation", default_value="日本")


def run(job):
    print("mesuré", job["activation"])
    if job["activation"] == "réglé":
        raise ValueError("échec")
    return 1.0
"""


def _calls() -> Iterator[tuple[Path, ast.Call]]:
    for folder in ("deephyper_balsam", "apps", "docs", "site-configs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path, node


def test_every_process_whose_text_we_read_has_an_encoding_named() -> None:
    nameless = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, call in _calls()
        if any(word.arg in _TEXT for word in call.keywords) and all(word.arg != "encoding" for word in call.keywords)
    ]
    assert nameless == []


def test_the_linter_asks_every_file_that_is_opened_for_its_encoding() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lint = settings.partition("[tool.ruff.lint]\n")[2].partition("\n[")[0]
    assert "preview = true" in lint
    assert '"PLW1514"' in lint


@pytest.mark.parametrize("name", ["plain.py", "réseau.py"])
def test_a_run_may_print_what_the_locale_cannot_say(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(PROBLEM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "deephyper_balsam", "problem", "check", name],
        cwd=tmp_path,
        env={**os.environ, **ASCII},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=120,
    )
    said = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, said
    assert "UnicodeEncodeError" not in said


def test_a_reason_comes_through_an_ascii_locale_whole(tmp_path: Path) -> None:
    file = tmp_path / "plain.py"
    file.write_text(PROBLEM, encoding="utf-8")
    spec = {"kind": "function", "target": f"{file}:run", "search_path": [str(tmp_path)]}
    task = {"spec": spec, "config": {"activation": "réglé"}, "left": str(tmp_path / "left.json")}
    done = subprocess.run(
        [sys.executable, "-m", "deephyper_balsam.node.preflight"],
        input=json.dumps(task).encode(),
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, **ASCII},
        check=True,
        timeout=120,
    )
    assert done.stdout.decode("utf-8") == "mesuré réglé\n"
    outcome = json.loads((tmp_path / "left.json").read_text(encoding="utf-8"))
    assert outcome["failure"] == "ValueError: échec"
