"""docs/machines/local.md, followed from top to bottom by a new user."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from deephyper_balsam.server.stack import LocalStack

from .conftest import leftovers

pytestmark = [pytest.mark.live, pytest.mark.slow]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "machines" / "local.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="docs live "))
    yield top
    LocalStack(top / "balsam").down()
    left = leftovers(LocalStack(top / "balsam"))
    shutil.rmtree(top, ignore_errors=True)
    assert not left, f"the page leaves processes behind: {left}"


def shape(line: str) -> tuple[str, ...]:
    """The first words of a line of output, without what differs from machine to machine."""
    plain = re.sub(r"(?:http\S*:/|')?/[\w./-]+.*", "PATH", line)
    return tuple(re.sub(r"\d[\d.]*", "#", word) for word in plain.split()[:4])


def stale(shown: list[str], output: str) -> list[str]:
    """The lines that a page shows and the commands do not print any more."""
    printed = {shape(line) for line in output.splitlines()}
    return [line for line in shown if shape(line) not in printed]


@pytest.mark.long
def test_the_sequence_of_the_local_page_leads_to_results(folder: Path) -> None:
    script = ["set -euo pipefail"]
    for language, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            file = folder / text.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        elif language == "sh":
            script.append(text.replace("--max-evals 12", "--max-evals 3").replace("--max-evals 16", "--max-evals 4"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env={**kept, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    samples = [text for language, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8")) if language == "text"]
    assert not stale([line for text in samples[1:4] for line in text.splitlines()], done.stdout)
    assert "Search cancer-1: 3 done." in done.stdout
    assert "Search cancer-1: 4 done." in done.stdout
    assert "cancer_run" in done.stdout
    frame = pd.read_csv(folder / "cancer-1" / "results.csv")
    assert list(frame["job_id"]) == [0, 1, 2, 3]
    assert frame["objective"].between(0, 1).all()
