"""What a report brings along for its script: the trials once, compressed, for the figures, the axes and the table."""

from __future__ import annotations

import base64
import gzip
import json
import math
from typing import Any

from deephyper_balsam.common.objective import LOSS, title, turned
from deephyper_balsam.results.analysis import figures
from deephyper_balsam.results.analysis.look import drawable
from deephyper_balsam.results.analysis.trials import Trials, labels_of
from deephyper_balsam.results.table import Line, columns

_MOST_TRACEBACKS = 200


def shared(trials: Trials) -> dict[str, Any]:
    """Return the rows of the figures (without hyperparameters, which stand in the lines), the lines, and the axes.

    Objectives are as the runs returned them.
    """

    def shown(line: Line) -> Line:
        kept = line["objective"]
        return line if kept is None else {**line, "objective": turned(kept, trials.minimize)}

    names = [
        name
        for name in columns(trials.lines, [column.name for column in trials.problem.encoder.columns])
        if name not in ("m:balsam_job_id", *([LOSS] if trials.minimize else []))
    ]
    axes = [
        {
            "name": column.name,
            "key": f"p:{column.name}",
            "choices": list(column.choices),
            "labels": drawable(list(labels_of(column).values())),
            "log": column.log,
            "whole": column.kind == "integer",
            "lower": column.lower,
            "upper": column.upper,
            "missing": "inactive" if column.conditional else None,
        }
        for column in trials.columns
    ]
    axes.append(
        {
            "name": title(trials.minimize),
            "key": "objective",
            "choices": [],
            "labels": [],
            "log": False,
            "whole": False,
            "lower": min(trials.shown),
            "upper": max(trials.shown),
            "missing": "failed" if trials.failed else None,
        }
    )
    return {
        "rows": [{key: row[key] for key in "nkeoyg"} for row in figures.rows(trials)],
        "columns": names,
        "lines": [[_cell(line, name) for name in names] for line in map(shown, trials.lines)],
        "axes": axes,
        "good": turned(trials.good, trials.minimize),
        "minimize": trials.minimize,
        "tracebacks": {str(number): text for number, text in list(trials.tracebacks.items())[:_MOST_TRACEBACKS]},
    }


def _cell(line: Line, name: str) -> Any:
    """Return a cell as JSON: null where there is nothing, and an empty list for a hyperparameter that is None."""
    value = line.get(name)
    if value is None and name.startswith("p:") and name in line:
        return []
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def packed(value: Any) -> str:
    """Return JSON, compressed, as text that can stand anywhere in a page."""
    return base64.b64encode(
        gzip.compress(json.dumps(value, separators=(",", ":"), default=str).encode(), 9, mtime=0)
    ).decode()


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), default=str).replace("<", "\\u003c")
