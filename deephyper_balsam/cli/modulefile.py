"""`deephyper-balsam modulefile`: a module file for this installation, for `module load deephyper`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import click


def module_text(form: str, bin_folder: Path, package_version: str) -> str:
    """Return the text of a module file.

    Parameters
    ----------
    form
        ``"tcl"`` (Environment Modules, and Lmod too) or ``"lmod"`` (Lua).
    bin_folder
        Where ``deephyper-balsam`` and ``balsam`` are.
    package_version
        The version that it tells.
    """
    what = f"deephyper-balsam {package_version}: asynchronous hyperparameter search through Balsam"
    if form == "lmod":
        return f"""-- {what}
help([==[{what}

    deephyper-balsam --help]==])
whatis("Name: deephyper")
whatis("Version: {package_version}")
whatis("Description: asynchronous hyperparameter search through Balsam")
conflict("deephyper")
prepend_path("PATH", [==[{bin_folder}]==])
"""
    path = "".join(f"\\{sign}" if sign in '\\"$[]{}' else sign for sign in str(bin_folder))
    return f"""#%Module1.0
## {what}
proc ModulesHelp {{ }} {{
    puts stderr "{what}"
    puts stderr "    deephyper-balsam --help"
}}
module-whatis "{what}"
conflict deephyper
prepend-path PATH "{path}"
"""


@click.command()
@click.option("--tcl", "form", flag_value="tcl", default="tcl", help="For Environment Modules and Lmod (the default).")
@click.option("--lmod", "form", flag_value="lmod", help="In Lua, for Lmod alone.")
def modulefile(form: str) -> None:
    """Print a module file for this installation: put it where `module` looks, and `module load deephyper` finds it.

    \b
    Example:
      deephyper-balsam modulefile > /soft/modulefiles/deephyper/0.1.0
    """
    click.echo(module_text(form, Path(sys.executable).parent.absolute(), version("deephyper-balsam")), nl=False)
