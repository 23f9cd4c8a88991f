"""Why an allocation ended, as far as its scheduler and the files of its launcher tell."""

from __future__ import annotations

from pathlib import Path

from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Row

_QUOTED_LINES, _QUOTED_CHARS = 15, 300  # Balsam logs whole pickled applications
_OUTPUTS = ("*_mode_*.log*", "*_mode_*.out")


def last_words(row: Row, site: Row) -> str:
    """Return what is known of a BatchJob's end: the scheduler's error, or the ends of its logs if they are here."""
    info = row.get("status_info") or {}
    if info.get("error"):
        return str(info["error"])
    script = info.get("submit_script")
    if not script:
        return "nothing is known of it"
    log_folder = Path(str(site.get("path", ""))) / "log"
    output = Path(script).with_suffix(".output")
    logs = [path for path in (output, *_launchers_logs(log_folder, _began_at(row))) if path.is_file()]
    if not logs:
        return f"its script is {script}; its launcher's log is in {log_folder}, which cannot be read from here"
    return "see " + "; ".join(map(_quote, logs))


def _began_at(row: Row) -> float:
    """Return a moment (epoch) before which a BatchJob's launcher cannot have written."""
    submitted = (row.get("status_info") or {}).get("submit_time")
    try:
        return parse_time(str(submitted)) - 5.0
    except ValueError:
        return 0.0


def _launchers_logs(folder: Path, since: float) -> list[Path]:
    """Return the log and the output that a launcher wrote last in a site's log folder, after `since`."""
    found = []
    for pattern in _OUTPUTS:
        written = {
            path: path.stat().st_mtime for path in folder.glob(pattern) if path.is_file() and path.stat().st_size
        }
        newest = max(written, key=lambda path: written[path], default=None)
        if newest is not None and written[newest] >= since:
            found.append(newest)
    return found


def _quote(log: Path) -> str:
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_QUOTED_LINES:]
    tail = [line if len(line) <= _QUOTED_CHARS else line[: _QUOTED_CHARS - 1] + "…" for line in tail]
    return f"{log}; its last lines:\n" + "\n".join(tail) if tail else f"{log} (empty)"
