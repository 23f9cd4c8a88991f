"""Paths in a search's settings: what a file says is relative to the file, and what we write holds anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deephyper_balsam.node.targets import split_target

_TARGETS = ("problem", "run", "resources")
_FILES = ("warm_start", "log_dir")


def relative_to(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that were read from a file in `folder`, with its paths as seen from here.

    A target or file that is not there, seen from `folder`, but from the current folder, is meant from here: so it was
    before files could lie elsewhere. A name that is no path, such as a bundled application's, stays.
    """
    from deephyper_balsam.store.applications import bundled

    def from_folder(text: str, *, must_exist: bool = True) -> str:
        path = Path(text).expanduser()
        there = folder / path
        if path.is_absolute():
            return str(path)
        if must_exist and not _is_there(there) and (_is_there(path) or text in bundled() or _is_name(text)):
            return text
        return str(there)

    return _each(settings, from_folder)


def absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with every relative path made absolute, so that they hold in any folder."""
    from deephyper_balsam.store.applications import bundled

    def from_here(text: str, *, must_exist: bool = True) -> str:
        path = Path(text).expanduser()
        if must_exist and not path.exists() and (text in bundled() or not _is_there(path)):
            return text
        return str(path.resolve())

    return _each(settings, from_here)


def _is_there(path: Path) -> bool:
    from deephyper_balsam.store.applications import module_lies_in

    return path.exists() or module_lies_in(path.parent, path.name)


def _is_name(text: str) -> bool:
    return "/" not in text and not text.endswith((".py", ".yaml", ".yml", ".csv"))


def _each(settings: dict[str, Any], change: Callable[..., str]) -> dict[str, Any]:
    changed = dict(settings)
    for key in _TARGETS:
        if isinstance(changed.get(key), str):
            place, name = split_target(changed[key])
            changed[key] = change(place) + ("" if name is None else f":{name}")
    for key in _FILES:
        if changed.get(key) is not None:
            changed[key] = type(changed[key])(change(str(changed[key]), must_exist=key != "log_dir"))
    return changed
