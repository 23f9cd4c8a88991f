"""The modes as the scripts that they are: what they do at their start, in processes of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from deephyper_balsam.launcher.main import mode_script

USER = """
import balsam.site.launcher.{module} as mode
def user():
    import applications, forking, main, script
    print(applications.MINE, forking.MINE, main.MINE, script.MINE)
mode.{entry} = user
"""


@pytest.mark.parametrize(
    ("mode", "module", "entry"), [("mpi", "_mpi_mode", "main"), ("serial", "serial_mode", "entry_point")]
)
def test_what_a_user_imports_by_a_name_of_our_modules_is_the_users_own(
    mode: str, module: str, entry: str, tmp_path: Path
) -> None:
    for name in ("applications", "forking", "main", "script"):
        (tmp_path / f"{name}.py").write_text(f"MINE = {name!r}\n")
    (tmp_path / "sitecustomize.py").write_text(USER.format(module=module, entry=entry))
    words = [*mode_script(mode), "--wall-time-min", "5", "--num-workers", "1", "--log-filename", str(tmp_path / "log")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DEEPHYPER_BALSAM_LOOPBACK": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout == "applications forking main script\n", done.stderr
