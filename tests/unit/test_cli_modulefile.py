"""`deephyper-balsam modulefile`, in a shell with the real Environment Modules and Lmod where there are any."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from deephyper_balsam.cli import main
from deephyper_balsam.cli.modulefile import module_text

# Environment Modules reads Tcl, Lmod reads both
MODULES = Path("/usr/share/modules/init/bash")
LMOD = Path(os.environ.get("LMOD_INIT") or "/usr/share/lmod/lmod/init/bash")
SYSTEMS = [("tcl", MODULES, ""), ("tcl", LMOD, ""), ("lmod", LMOD, ".lua")]


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


@pytest.mark.parametrize(("form", "init", "suffix"), SYSTEMS)
def test_module_load_deephyper_brings_the_command(form: str, init: Path, suffix: str, tmp_path: Path) -> None:
    if not init.exists():
        pytest.skip(f"no {init}: install environment-modules; see tests/lmod.sh for the other")
    where = tmp_path / "modulefiles" / "deephyper"
    where.mkdir(parents=True)
    odd = tmp_path / "a [soft] $folder"
    odd.mkdir()
    command = Path(sys.executable).with_name("deephyper-balsam")
    (odd / "deephyper-balsam").symlink_to(command)
    (where / f"0.1.0{suffix}").write_text(text(f"--{form}"))
    (where / f"0.2.0{suffix}").write_text(module_text(form, odd, "0.2.0"))
    script = (
        f"source {init} && module use '{where.parent}' && module load deephyper/$0 && "
        "command -v deephyper-balsam && deephyper-balsam --version && module unload deephyper && "
        "! command -v deephyper-balsam"
    )
    for number, folder in (("0.1.0", command.parent), ("0.2.0", odd)):
        done = subprocess.run(
            ["bash", "-c", script, number],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[0] == str(folder / "deephyper-balsam")
        assert version("deephyper-balsam") in done.stdout
