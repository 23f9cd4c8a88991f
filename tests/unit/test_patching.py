"""What is replaced in Balsam: through one table, once, and only in the Balsam that the patches were written for."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deephyper_balsam.common import patching
from deephyper_balsam.common.patching import BALSAM_VERSION, PATCHES, Patch, claim, patch
from deephyper_balsam.errors import BalsamChangedError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deephyper_balsam"
NAME = "stand_in.part.answer"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module that may be patched, with rows in the table."""
    outer, inner = ModuleType("stand_in"), ModuleType("stand_in.part")
    vars(inner)["answer"] = 41
    monkeypatch.setitem(sys.modules, "stand_in", outer)
    monkeypatch.setitem(sys.modules, "stand_in.part", inner)
    monkeypatch.setattr(outer, "part", inner, raising=False)
    rows = tuple(
        Patch(name, "server.guard", "it is wrong") for name in (NAME, "stand_in.part.gone", "stand_in.no.more")
    )
    monkeypatch.setattr(patching, "PATCHES", rows)
    monkeypatch.setattr(patching, "_claimed", set())
    return inner


def test_a_patch_gets_what_stands_there_and_takes_its_place(part: Any) -> None:
    patch(NAME, "server.guard", lambda known: known + 1)
    assert part.answer == 42


def test_a_patch_is_made_once(part: Any) -> None:
    patch(NAME, "server.guard", lambda known: known + 1)
    with pytest.raises(ValueError, match=r"has replaced stand_in\.part\.answer before"):
        patch(NAME, "server.guard", lambda known: known + 1)
    assert part.answer == 42


def test_what_is_not_in_the_table_is_not_replaced(part: Any) -> None:
    for name, module in ((NAME, "server.api"), ("stand_in.part.other", "server.guard")):
        with pytest.raises(ValueError, match="has no such row"):
            patch(name, module, lambda _: 0)
    assert part.answer == 41


@pytest.mark.parametrize("name", ["stand_in.part.gone", "stand_in.no.more"])
def test_a_name_that_balsam_lacks_is_told_with_what_to_do(part: Any, name: str) -> None:
    with pytest.raises(BalsamChangedError, match=rf"has no {name}, .*pip install balsam=={BALSAM_VERSION}"):
        patch(name, "server.guard", lambda _: 0)
    assert not hasattr(part, "gone")


@pytest.mark.parametrize("found", ["0.8.0", None])
def test_another_balsam_is_told_with_what_to_do(part: Any, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(_: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(metadata, "version", version)
    said = f"Balsam {found}" if found else "No Balsam"
    with pytest.raises(BalsamChangedError, match=rf"^{said} is installed, .*pip install balsam=={BALSAM_VERSION}"):
        claim(NAME, "server.guard")
    assert part.answer == 41


ANOTHER_BALSAM = """
import sys
from importlib import metadata
metadata.version = lambda name: "0.8.0"
import runpy
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["launcher/mpi_mode.py", "launcher/serial_mode.py", "server/api.py"])
def test_a_program_that_meets_another_balsam_ends_with_one_line(program: str, tmp_path: Path) -> None:
    with socket.socket() as listener:
        served = program == "server/api.py"
        given = f"--fd {listener.fileno()}" if served else "--wall-time-min 5 --num-workers 1 --log-filename x"
        done = subprocess.run(
            [sys.executable, "-c", ANOTHER_BALSAM, str(PACKAGE / program), *given.split()],
            input='{"environment": {}}',
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            pass_fds=[listener.fileno()],
        )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: Balsam 0.8.0 is installed, but"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_each_row_of_the_table_is_made_by_its_module() -> None:
    for row in PATCHES:
        source = (PACKAGE / f"{row.module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert f'.{row.name.rpartition(".")[2]}"' in source or f'"{row.name}"' in source, row


def test_nothing_of_balsam_is_replaced_past_the_table() -> None:
    """An assignment to an attribute of a module of Balsam, FastAPI or Starlette is a patch that the table lacks."""
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        foreign = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).split(".")[0] in ("balsam", "fastapi", "starlette")
        }
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else []:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert target.value.id not in foreign, f"{file}:{node.lineno} replaces {ast.unparse(target)}"


def test_the_design_page_shows_the_table() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `(\w+/\w+)\.py` \| (.+) \|$", text, re.MULTILINE)
    assert [Patch(name, module.replace("/", "."), fault) for name, module, fault in rows] == list(PATCHES)
