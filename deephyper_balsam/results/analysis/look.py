"""What all figures share: colours, fonts, and how the axis of a hyperparameter is drawn.

One look for all: ink on paper, and one accent for what is good (the best so far, the best tenth of the trials). Colours
are parameters of the specification, so that a page can turn dark and a print light without drawing anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deephyper_balsam.common.wording import pictured
from deephyper_balsam.problem.columns import REAL, Column
from deephyper_balsam.results.analysis.trials import labels_of

Spec = dict[str, Any]
Row = dict[str, Any]

LIGHT = {"ink": "#1d2129", "quiet": "#6b7280", "accent": "#2456d6", "soft": "#e3eafc", "paper": "#ffffff"}
DARK = {"ink": "#e6e8ec", "quiet": "#9aa1ad", "accent": "#7ea6ff", "soft": "#1f2a44", "paper": "#14161b"}

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
PANEL_HEIGHT = 190
_MOST_ASLANT = 14  # labels that stand aslant without touching in the narrowest panel
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
TICKS: Spec = {"tickCount": {"expr": "ceil(width / 90)"}, "labelOverlap": "greedy", "labelSeparation": 8}


def spec(body: Spec, description: str, width: int | str = "container") -> Spec:
    """Return a whole specification of a figure's body; `width` in pixels, or the width of where it stands."""
    body = drawable(body)
    size = {} if "concat" in body or "vconcat" in body else {"width": width}
    return {
        "$schema": _SCHEMA,
        "description": drawable(description),
        "params": [{"name": name, "value": value} for name, value in LIGHT.items()],
        "config": _CONFIG,
        **size,
        **body,
    }


_OF_EVERY_OBJECT = (
    *("__defineGetter__", "__defineSetter__", "__lookupGetter__", "__lookupSetter__", "__proto__", "constructor"),
    *("hasOwnProperty", "isPrototypeOf", "propertyIsEnumerable", "toLocaleString", "toString", "valueOf"),
)


def drawable(part: Any) -> Any:
    """Return a part of a specification with its texts made so that Vega draws them as they are read.

    A control character makes a picture no XML; and Vega keeps groups and tooltips in JavaScript objects, in which every
    one of some names (``constructor``) is taken already: such a text gets a space that is not seen.
    """
    if isinstance(part, str):
        text = pictured(part)
        return f"{text}\N{NO-BREAK SPACE}" if text in _OF_EVERY_OBJECT else text
    if isinstance(part, dict):
        return {key: drawable(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [drawable(value) for value in part]
    return part


def colour(name: str) -> dict[str, str]:
    """Return a colour by its name in `LIGHT` and `DARK`, as a parameter of the specification."""
    return {"expr": name}


def footnote(words: str) -> Spec:
    """Return a line below a figure of its own."""
    return {
        "text": words,
        "orient": "bottom",
        "anchor": "start",
        "fontSize": 11,
        "fontWeight": "normal",
        "color": colour("quiet"),
    }


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
        choices = list(labels_of(column).values())
        return {
            "field": field,
            "type": "nominal",
            "scale": {"domain": choices, "padding": 0.25},
            "title": None,
            "axis": {"labelLimit": 80, **_choice_labels(choices)},
        }
    scale: Spec = {"domain": [column.lower, column.upper], "nice": False, "zero": False}
    axis: Spec = {"labelFlush": True, "labelOverlap": "greedy", "labelSeparation": 8, "tickCount": 5}
    if column.log:
        scale["type"] = "log"
        axis["format"] = "~g" if column.upper < 1e4 and column.lower >= 1e-3 else ".0e"
    elif column.kind != REAL:
        axis["tickMinStep"] = 1
    return {"field": field, "type": "quantitative", "scale": scale, "title": None, "axis": axis}


def _choice_labels(choices: Sequence[str]) -> Spec:
    """Return how the labels of choices stand on an axis: side by side while there is room, else aslant and not all."""
    if sum(max(len(choice), 2) + 2 for choice in choices) < 40:
        return {"labelAngle": 0}
    every = math.ceil(len(choices) / _MOST_ASLANT)
    return {"labelAngle": -35, "values": list(choices[::every])}
