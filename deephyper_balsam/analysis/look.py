"""What all figures share: colours, fonts, and how the axis of a hyperparameter is drawn.

One look for all: ink on paper, and one accent for what is good (the best so far, the best tenth of the trials). Colours
are parameters of the specification, so that a page can turn dark and a print light without drawing anew.
"""

from __future__ import annotations

from typing import Any

from deephyper_balsam.analysis.trials import label
from deephyper_balsam.columns import REAL, Column

Spec = dict[str, Any]
Row = dict[str, Any]

LIGHT = {"ink": "#1d2129", "quiet": "#6b7280", "accent": "#2456d6", "soft": "#e3eafc", "paper": "#ffffff"}
DARK = {"ink": "#e6e8ec", "quiet": "#9aa1ad", "accent": "#7ea6ff", "soft": "#1f2a44", "paper": "#14161b"}

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
PANEL_HEIGHT = 190
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
TICKS: Spec = {"tickCount": {"expr": "ceil(width / 90)"}, "labelOverlap": "greedy"}


def spec(body: Spec, description: str, width: int | str = "container") -> Spec:
    """Return a whole specification of a figure's body; `width` in pixels, or the width of where it stands."""
    size = {} if "concat" in body or "vconcat" in body else {"width": width}
    return {
        "$schema": _SCHEMA,
        "description": description,
        "params": [{"name": name, "value": value} for name, value in LIGHT.items()],
        "config": _CONFIG,
        **size,
        **body,
    }


def colour(name: str) -> dict[str, str]:
    """Return a colour by its name in `LIGHT` and `DARK`, as a parameter of the specification."""
    return {"expr": name}


_CONFIG: Spec = {
    "background": None,
    "font": FONT,
    "padding": 4,
    "view": {"stroke": None},
    "axis": {
        "labelColor": {"expr": "quiet"},
        "titleColor": {"expr": "quiet"},
        "gridColor": {"expr": "quiet"},
        "gridOpacity": 0.16,
        "domain": False,
        "ticks": False,
        "labelPadding": 6,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelLimit": 140,
    },
    "axisX": {"grid": False, "domain": True, "domainColor": {"expr": "quiet"}, "domainOpacity": 0.4},
    "title": {"color": {"expr": "ink"}, "fontSize": 12, "fontWeight": 600, "anchor": "start", "offset": 10},
    "legend": {"labelColor": {"expr": "quiet"}, "titleColor": {"expr": "quiet"}, "titleFontWeight": "normal"},
}


def is_discrete(column: Column) -> bool:
    """Return whether a hyperparameter has choices rather than a range."""
    return bool(column.choices)


def axis_of(column: Column, field: str) -> Spec:
    """Return the channel of a hyperparameter: logarithmic where it is, its choices in their order."""
    if is_discrete(column):
        choices = [label(choice) for choice in column.choices]
        return {
            "field": field,
            "type": "nominal",
            "scale": {"domain": choices, "padding": 0.25},
            "title": None,
            "axis": {"labelAngle": 0 if sum(map(len, choices)) < 34 else -35, "labelLimit": 80},
        }
    scale: Spec = {"domain": [column.lower, column.upper], "nice": False, "zero": False}
    axis: Spec = {"labelFlush": True, "labelOverlap": "greedy", "tickCount": 5}
    if column.log:
        scale["type"] = "log"
        axis["format"] = "~g" if column.upper < 1e4 and column.lower >= 1e-3 else ".0e"
    elif column.kind != REAL:
        axis["tickMinStep"] = 1
    return {"field": field, "type": "quantitative", "scale": scale, "title": None, "axis": axis}
