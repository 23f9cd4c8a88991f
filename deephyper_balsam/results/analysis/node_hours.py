"""The figure of node-hours: where the nodes of a search were over time."""

from __future__ import annotations

import itertools

from deephyper_balsam.monitor.node_hours import KINDS, NodeHours
from deephyper_balsam.results.analysis.look import TICKS, Spec, colour
from deephyper_balsam.results.analysis.trials import time_unit

# Work in the accent, loss in warm colours, waiting in greys; each stands out on light and on dark paper
_COLOURS = {
    "useful": colour("accent"),
    "failed": "#c2410c",
    "repeated": "#f59e0b",
    "start-up": "#64748b",
    "between runs": "#94a3b8",
    "no configuration": "#db2777",
    "no driver": "#8b5cf6",
    "end of allocation": "#c4b5a5",
    "drained": "#cbd5e1",
}


DESCRIPTION = "Nodes of the search over time: busy, and idle by cause"


def node_hours(hours: NodeHours) -> Spec:
    """Return where the nodes of a search were over time: busy, and idle by cause."""
    kinds = [kind for kind in KINDS if hours.by_kind[kind]]
    zero = hours.edges[0] if hours.edges else 0.0
    unit, length = time_unit(hours.edges[-1] - zero if hours.edges else 0.0)
    values = [
        {
            "t": round((begin - zero) / length, 5),
            "e": round((end - zero) / length, 5),
            "n": round(3600 * hours.over_time[kind][place] / (end - begin), 5),
            "k": kind,
            "o": order,
        }
        for place, (begin, end) in enumerate(itertools.pairwise(hours.edges))
        for order, kind in enumerate(kinds)
    ]
    x = {
        "field": "t",
        "type": "quantitative",
        "bin": "binned",
        "title": f"{unit} since the first allocation began",
        "scale": {"nice": False},
        "axis": TICKS,
    }
    return {
        "height": 220,
        "data": {"values": values},
        "mark": {"type": "bar", "orient": "vertical", "binSpacing": 0},
        "encoding": {
            "x": x,
            "x2": {"field": "e"},
            "y": {"field": "n", "type": "quantitative", "title": "nodes", "stack": "zero"},
            "color": {
                "field": "k",
                "type": "nominal",
                "title": None,
                "sort": kinds,
                "scale": {"domain": kinds, "range": [_COLOURS[kind] for kind in kinds]},
            },
            "order": {"field": "o"},
        },
    }
