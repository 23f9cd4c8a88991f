"""Where `apps/`, `site-configs/`, `jobscripts/`, `docs/faq.md` are: beside the package, or in a wheel inside it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def folder(name: str) -> Path:
    """Return the folder `name` (``"apps"``, ``"site-configs"``, ``"jobscripts"`` or ``"docs"``) of this installation.

    Raises
    ------
    FileNotFoundError
        When the installation lacks it, which means that the package was not installed whole.
    """
    installed = _PACKAGE / "share" / name
    checkout = _PACKAGE.parent / name
    for place in (installed, checkout):
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"This installation has no {name}/ folder (looked at {installed} and {checkout}): install it again."
    )
