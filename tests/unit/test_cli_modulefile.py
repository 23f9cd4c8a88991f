"""`deephyper-balsam modulefile`, in a shell with the real Environment Modules where there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from deephyper_balsam.cli import main
from deephyper_balsam.cli.modulefile import module_text

INIT = Path("/usr/share/modules/init/bash")


def text(*options: str) -> str:
    result = CliRunner().invoke(main, ["modulefile", *options])
    assert result.exit_code == 0
    return result.output


def test_both_forms_name_this_installation() -> None:
    tcl, lmod = text(), text("--lmod")
    assert tcl == text("--tcl")
    assert tcl.startswith("#%Module1.0\n")
    for form in (tcl, lmod):
        assert str(Path(sys.executable).parent) in form
        assert version("deephyper-balsam") in form
    assert 'prepend_path("PATH", ' in lmod


@pytest.mark.skipif(not INIT.exists(), reason="environment-modules is not installed")
def test_module_load_deephyper_brings_the_command(tmp_path: Path) -> None:
    where = tmp_path / "modulefiles" / "deephyper"
    where.mkdir(parents=True)
    odd = tmp_path / "a [soft] $folder"
    odd.mkdir()
    command = Path(sys.executable).with_name("deephyper-balsam")
    (odd / "deephyper-balsam").symlink_to(command)
    (where / "0.1.0").write_text(text())
    (where / "0.2.0").write_text(module_text("tcl", odd, "0.2.0"))
    script = (
        f"source {INIT} && module use '{where.parent}' && module load deephyper/$0 && "
        "command -v deephyper-balsam && deephyper-balsam --version && module unload deephyper && "
        "! command -v deephyper-balsam"
    )
    for number, folder in (("0.1.0", command.parent), ("0.2.0", odd)):
        done = subprocess.run(
            ["bash", "-c", script, number], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[0] == str(folder / "deephyper-balsam")
        assert version("deephyper-balsam") in done.stdout


@pytest.mark.skipif(shutil.which("luac") is None, reason="no Lua compiler")
def test_the_lua_form_is_lua(tmp_path: Path) -> None:
    file = tmp_path / "0.1.0.lua"
    file.write_text(text("--lmod"))
    subprocess.run(["luac", "-p", str(file)], check=True)
