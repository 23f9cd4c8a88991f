"""The code of the documentation, run: each Python block in the order of its page; shell, YAML and JSON are read."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite
from docs_blocks import PAGES, ROOT, Block, blocks

from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.targets import load_object
from deephyper_balsam.store.applications import resolve_problem, resolve_run

pytest_plugins = ["balsam_fixtures"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _analysis(folder: Path, api: BalsamApi) -> None:
    table = pd.DataFrame({"p:x": [1.0, 2.0], "objective": [0.1, 0.3], "job_id": [0, 1], "job_status": "DONE"})
    table.to_csv("digits-1.csv", index=False)
    table.to_parquet("digits-1.parquet")
    table.to_json("digits-1.json", orient="records")


def _results(folder: Path, api: BalsamApi) -> None:
    (folder / "cancer-1").mkdir()
    rows = {"job_id": [0, 1, 2], "job_status": ["DONE", "FAILED", "DONE"], "objective": [0.2, None, 0.1]}
    pd.DataFrame({**rows, "m:timestamp_end": [2.0, 1.0, 3.0]}).to_csv("cancer-1/results.csv", index=False)


def _howto(folder: Path, api: BalsamApi) -> None:
    for name in ("theta", "perlmutter"):
        VirtualSite(api, name)


# What a reader of the page has before its first block of Python, by its shell blocks or otherwise
BEFORE: dict[str, Callable[[Path, BalsamApi], None]] = {
    "docs/analysis.md": _analysis,
    "docs/results.md": _results,
    "docs/howto.md": _howto,
}
WITH_PYTHON = [page for page in PAGES if any(blocks(page, "python"))]


@pytest.fixture
def workplace(
    tmp_path: Path, api: BalsamApi, client_yml: Path, monkeypatch: pytest.MonkeyPatch, modules_as_they_were: None
) -> Path:
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    importlib.invalidate_caches()
    return work


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs_from_its_first_block_to_its_last(
    page: Path, workplace: Path, api: BalsamApi
) -> None:
    if before := BEFORE.get(name_of(page)):
        before(workplace, api)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if block.file:
            block.write(workplace)
            importlib.invalidate_caches()
        elif not block.mark:
            code = compile("\n" * block.line + block.text, name_of(page), "exec")
            exec(code, names)  # what fails names the page and the line
    for block in blocks(page, "python"):
        if block.file:
            check_file(workplace / block.file)


def check_file(file: Path) -> None:
    """Use a file of the page as the commands do that are shown with it."""
    text = file.read_text(encoding="utf-8")
    if "def resources(" in text:
        assert load_object(f"{file}:resources")({"num_layers": 5}).num_nodes == 2
    if "problem = HpProblem" in text:
        resolve_problem(f"{file}:problem").check()
    if "def run(" in text:
        assert resolve_run(f"{file}:run")
        run = load_object(f"{file}:run")
        if (file.parent / "problem.py").is_file():
            config = resolve_problem(f"{file.parent / 'problem.py'}:problem").default_configuration
            run(RunningJob(0, config))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_comment_over_a_block_is_one_that_is_known(page: Path) -> None:
    for block in blocks(page):
        assert block.mark == "live" or not block.mark or block.mark.startswith("elsewhere, "), block
    text = page.read_text(encoding="utf-8")
    comments = re.findall(r"^<!-- test:", text, re.MULTILINE)  # not those that a sentence quotes
    assert len(comments) == sum(bool(block.mark) for block in blocks(page)), "a comment is over no block"


def _blocks_in(*languages: str) -> list[Any]:
    found = [(page, block) for page in PAGES for block in blocks(page, *languages)]
    return [pytest.param(block, id=f"{name_of(page)}:{block.line}") for page, block in found]


@pytest.mark.parametrize("block", _blocks_in("sh", "bash", ""))
def test_shell_is_such(block: Block) -> None:
    text = block.text.replace("<this repository>", "REPOSITORY")  # nobody can copy what stands in < >
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", _blocks_in("yaml", "json"))
def test_yaml_and_json_are_such(block: Block) -> None:
    value = json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text)
    assert value
