"""Targets: ``/path/file.py:attribute`` and ``package.module:attribute``, loaded alike by the driver and on a node."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import socket
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deephyper_balsam.common.wording import storable
from deephyper_balsam.errors import TargetError

MAX_REASON_CHARS = 500
_ATTRIBUTE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
MAX_TRACEBACK_CHARS = 8_000
_OF_A_RUN = ("targets.py", "worker.py", "running_job.py", "recording.py", "rungs.py", "shell_command.py")
_OURS = tuple(str(Path(__file__).with_name(name)) for name in _OF_A_RUN)


def shorten(text: str) -> str:
    """Return `text` as one line of at most `MAX_REASON_CHARS` characters."""
    line = storable(" ".join(text.split()))
    return line if len(line) <= MAX_REASON_CHARS else line[: MAX_REASON_CHARS - 1] + "…"


def cut_middle(text: str, limit: int) -> str:
    """Return `text` with its middle left out if it is longer than `limit` characters: its two ends say most."""
    if len(text) <= limit:
        return text
    head, tail = limit // 3, limit - limit // 3
    return f"{text[:head]}\n... ({len(text) - limit} characters left out) ...\n{text[-tail:]}"


def said_by(error: BaseException) -> str:
    """Return what an error says of itself; its class is the user's, so its `__str__` may raise, or give no text."""
    try:
        return str(error)
    except (Exception, SystemExit) as wrong:
        return f"(its __str__ raises {type(wrong).__name__})"


def reason(error: BaseException) -> str:
    """Return what `error` says, in one line."""
    said = said_by(error)
    return shorten(f"{type(error).__name__}: {said}" if said else type(error).__name__)


def own_traceback(error: BaseException) -> str:
    """Return the traceback from the user's first frame on; ours say nothing to her."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    return cut_middle(storable(text), MAX_TRACEBACK_CHARS)


def _where(error: BaseException, place: str) -> str:
    """Return the line that `error` came through, in the user's file if it can be told: no traceback for one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == place]
    others = [frame for frame in frames if not _is_ours(frame.filename) and not frame.filename.startswith("<")]
    return "".join(f" in {frame.filename}, line {frame.lineno}" for frame in (own or others)[-1:])


def split_target(target: str) -> tuple[str, str | None]:
    """Return the place that a target names, and the name inside, or None: colons in a path belong to the path."""
    place, colon, attribute = target.rpartition(":")
    if not colon or not _ATTRIBUTE.fullmatch(attribute) or Path(target).expanduser().exists():
        return target, None
    return place, attribute


def load_object(target: str, search_path: list[str] | None = None) -> Any:
    """Return what ``/path/file.py:attribute`` or ``package.module:attribute`` names.

    Raises
    ------
    TargetError
        When the file, the module or the attribute does not exist, or the import raises.
    """
    place, _, attribute = target.rpartition(":")
    for entry in reversed(search_path or []):
        if entry not in sys.path:
            sys.path.insert(0, entry)
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except TargetError:
        raise
    except (Exception, SystemExit) as error:  # a script that parses its arguments exits
        raise TargetError(f"{target}: importing {place} failed{_where(error, place)}: {reason(error)}") from error
    try:
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        public = ", ".join(sorted(name for name in vars(module) if not name.startswith("_"))) or "nothing"
        raise TargetError(f"{target}: {place} has no {attribute!r}; it defines {public}.") from None
    return found


def code_version(spec: Mapping[str, Any]) -> str | None:
    """Return a hash of what a run function or shell command is now, to notice that it was changed; None: unknown.

    It covers the file that holds the function, or the function itself where it travels by value; not what it imports.
    """
    if spec.get("payload"):
        content = str(spec["payload"]).encode()
    else:
        place = str(spec["target"])
        if spec.get("kind") != "command":
            place = place.rpartition(":")[0]
        file = (
            Path(place) if place.endswith((".py", ".yaml", ".yml")) else _file_of(place, spec.get("search_path") or ())
        )
        try:
            content = b"" if file is None else file.read_bytes()
        except OSError:  # the run itself will say so
            return None
    return hashlib.sha256(content).hexdigest()[:12] if content else None


def _file_of(module: str, search_path: Iterable[str]) -> Path | None:
    """Return the file of a module, without importing anything."""
    relative = Path(*module.split("."))
    for folder in (*search_path, *sys.path):
        for file in (Path(folder) / relative.with_suffix(".py"), Path(folder) / relative / "__init__.py"):
            if file.is_file():
                return file
    return None


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise TargetError(f"{path} does not exist on {socket.gethostname()}; name a file that every node can read.")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # The file's own name, so that what it defines can be pickled; a fresh module object for each path
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{abs(hash(folder)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_ours(filename: str) -> bool:
    return filename in _OURS or filename.startswith("<frozen importlib") or filename == importlib.__file__
