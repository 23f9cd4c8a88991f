"""The notebook of the documentation runs from its first cell to its last, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deephyper_balsam.server.stack import LocalStack

pytestmark = pytest.mark.live

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
    try:
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=300
        )
    finally:
        LocalStack(tmp_path / "notebook-balsam").down()
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "notebook-1" / "results.csv").read_text().splitlines()
    assert len(table) == 1 + 12
