"""What a report brings along for its script: the trials once, compressed, for the figures, the axes and the table."""

from __future__ import annotations

import base64
import gzip
import json
import math
from typing import Any

from deephyper_balsam.analysis import figures
from deephyper_balsam.analysis.trials import Trials, label
from deephyper_balsam.results import columns

_MOST_TRACEBACKS = 200


def shared(trials: Trials) -> dict[str, Any]:
    """Return the rows of the figures (without hyperparameters, which stand in the lines), the lines, and the axes."""
    names = [
        name
        for name in columns(trials.lines, [column.name for column in trials.problem.encoder.columns])
        if name != "m:balsam_job_id"
    ]
    axes = [
        {
            "name": column.name,
            "key": f"p:{column.name}",
            "choices": list(column.choices),
            "labels": [label(choice) for choice in column.choices],
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
            "name": "objective",
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
        "lines": [[_plain(line.get(name)) for name in names] for line in trials.lines],
        "axes": axes,
        "good": trials.good,
        "tracebacks": {str(number): text for number, text in list(trials.tracebacks.items())[:_MOST_TRACEBACKS]},
    }


def _plain(value: Any) -> Any:
    """Return a value that JSON knows."""
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
