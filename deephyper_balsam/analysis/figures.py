"""The figures of a search as Vega-Lite specifications: the report embeds them, `search plot` turns them into files.

One look for all: ink on paper, and one accent for what is good (the best so far, the best tenth of the trials). Colours are
parameters of the specification, so that a page can turn dark and a print light without drawing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deephyper_balsam.analysis.importance import Curve, Landscape, Share, Surface
from deephyper_balsam.analysis.trials import Trials, best_so_far, label, position, running, time_unit
from deephyper_balsam.columns import REAL, Column

Spec = dict[str, Any]
Row = dict[str, Any]

LIGHT = {"ink": "#1d2129", "quiet": "#6b7280", "accent": "#2456d6", "soft": "#e3eafc", "paper": "#ffffff"}
DARK = {"ink": "#e6e8ec", "quiet": "#9aa1ad", "accent": "#7ea6ff", "soft": "#1f2a44", "paper": "#14161b"}

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
PANEL_HEIGHT = 190
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_MOST_LINES = 1000
_CROSS = "M-1,-1L1,1M-1,1L1,-1"


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


def _colour(name: str) -> dict[str, str]:
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


def rows(trials: Trials) -> list[Row]:
    """Return a row for each trial that ended, in that order, with short names that no hyperparameter can disturb.

    ``n`` number, ``k`` how-manieth to end, ``e`` end (s), ``o`` objective (null: failed), ``y`` the objective as shown,
    ``g`` whether it is among the best tenth, ``p0``, ``p1``, ... the hyperparameters that vary, as `Trials.columns`.
    """
    made = []
    for count, line in enumerate(trials.ended, start=1):
        objective = line["objective"]
        row: Row = {"n": line["job_id"], "k": count, "e": line.get("m:timestamp_end"), "o": objective}
        row["y"] = None if objective is None else max(objective, trials.floor) if trials.floor is not None else objective
        row["g"] = int(objective is not None and objective >= trials.good)
        for j, column in enumerate(trials.columns):
            value = line.get(f"p:{column.name}")
            row[f"p{j}"] = label(value) if value is not None and column.choices else value
        made.append(row)
    return made


def objective_scale(trials: Trials) -> Spec:
    """Return the scale that all axes of the objective share."""
    low, high = min(trials.shown), max(trials.shown)
    margin = 0.06 * (high - low) or 1.0
    return {"domain": [low - margin, high + margin], "nice": False, "zero": False, "clamp": True}


def _objective(trials: Trials) -> Spec:
    return {"field": "y", "type": "quantitative", "scale": objective_scale(trials), "title": "objective"}


_TIP = [
    {"field": "n", "title": "trial"},
    {"field": "o", "type": "quantitative", "format": ".6g", "title": "objective"},
]


def _dots(x: Spec, y: Spec, tip: list[Spec], extra: Spec | None = None) -> list[Spec]:
    """Layers of points: quiet ones, over them the best tenth."""
    made = []
    for good, colour, opacity, size in ((0, "quiet", 0.32, 16), (1, "accent", 0.75, 22)):
        mark = {"type": "point", "filled": True, "color": _colour(colour), "fillOpacity": opacity, "opacity": 1, "size": size}
        made.append(
            {
                "transform": [{"filter": f"datum.o !== null && datum.g === {good}"}],
                "mark": mark,
                "encoding": {"x": x, "y": y, "tooltip": tip, **(extra or {})},
            }
        )
    return made


def progress(trials: Trials, by: str) -> Spec:
    """Return objective and best so far against ``"trials"`` or ``"time"``."""
    last = max((float(line["m:timestamp_end"]) for line in trials.ended if line.get("m:timestamp_end")), default=0.0)
    unit, length = time_unit(last)
    steps = [
        {"k": count, "t": None if time is None else time / length, "b": value}
        for count, time, value in best_so_far(trials.ended)
    ]
    steps.append({"k": len(trials.ended), "t": last / length, "b": steps[-1]["b"]})
    name, title = ("k", "evaluations ended") if by == "trials" else ("t", f"{unit} since the search began")
    end = len(trials.ended) if by == "trials" else last / length
    x = {"field": name, "type": "quantitative", "title": title, "scale": {"domain": [0, end], "nice": False}}
    layers = _dots(x, _objective(trials), _TIP)
    layers.append(
        {
            "transform": [{"filter": "datum.o === null"}],
            "mark": {"type": "point", "shape": _CROSS, "stroke": _colour("quiet"), "fill": None, "size": 24, "strokeWidth": 1.2, "opacity": 1},
            "encoding": {"x": x, "y": {"value": {"expr": "height - 5"}}, "tooltip": [{"field": "n", "title": "failed trial"}]},
        }
    )
    layers.append(
        {
            "data": {"values": [step for step in steps if step[name] is not None]},
            "mark": {"type": "line", "interpolate": "step-after", "color": _colour("accent"), "strokeWidth": 2},
            "encoding": {"x": x, "y": {**_objective(trials), "field": "b"}},
        }
    )
    return {
        "height": 260,
        "data": {"name": "trials"},
        "transform": [{"calculate": f"datum.e / {length}", "as": "t"}],
        "layer": layers,
    }


def running_trials(trials: Trials) -> Spec:
    """Return how many trials ran at once, over time. What the rest of the time went for is a question for a ledger."""
    steps = running(trials.ended)
    unit, length = time_unit(steps[-1][0] if steps else 0.0)
    x = {"field": "t", "type": "quantitative", "title": f"{unit} since the search began", "scale": {"nice": False, "zero": True}}
    y = {"field": "r", "type": "quantitative", "title": "trials running", "axis": {"tickMinStep": 1}}
    return {
        "height": 150,
        "data": {"values": [{"t": round(time / length, 5), "r": round(count, 3)} for time, count in steps]},
        "mark": {"type": "area", "interpolate": "step-after", "color": _colour("accent"), "fillOpacity": 0.3, "opacity": 1},
        "encoding": {"x": x, "y": y},
    }


def _is_discrete(column: Column) -> bool:
    return bool(column.choices)


def _axis(column: Column, field: str) -> Spec:
    """Return the channel of a hyperparameter: logarithmic where it is, its choices in their order."""
    if _is_discrete(column):
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


def panel(trials: Trials, j: int) -> Spec:
    """Return the objective against one hyperparameter, `Trials.columns[j]`; trials in which it is inactive are left out."""
    column = trials.columns[j]
    x = _axis(column, f"p{j}")
    tip = [*_TIP, {"field": f"p{j}", "title": column.name}]
    transform: list[Spec] = [{"filter": f"datum.p{j} !== null"}]
    extra = {}
    if _is_discrete(column):
        transform.append({"calculate": "(datum.n * 0.6180339887) % 1", "as": "jitter"})
        extra["xOffset"] = {"field": "jitter", "type": "quantitative", "scale": {"domain": [0, 1]}}
    return {
        "height": PANEL_HEIGHT,
        "title": column.name,
        "data": {"name": "trials"},
        "transform": transform,
        "layer": _dots(x, _objective(trials), tip, extra),
    }


def bars(shares: Sequence[Share], most: int = 15) -> Spec:
    """Return shares of the variance as bars, with a line for one standard deviation over the trees to both sides."""
    values = [
        {"name": " × ".join(one.names), "share": one.share, "low": max(one.share - one.spread, 0), "high": one.share + one.spread}
        for one in shares[:most]
    ]
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelColor": _colour("ink"), "labelLimit": 190}}
    top = max([0.05, *(value["high"] for value in values)])
    x = {
        "field": "share",
        "type": "quantitative",
        "title": "share of the variance",
        "axis": {"format": ".0%", "tickCount": 5, "grid": True, "domain": False},
        "scale": {"domain": [0, min(1.0, top)], "clamp": True},
    }
    tip = [{"field": "name", "title": "hyperparameter"}, {"field": "share", "format": ".1%", "title": "share"}]
    return {
        "height": {"step": 24},
        "data": {"values": values},
        "layer": [
            {"mark": {"type": "bar", "color": _colour("accent"), "height": 10, "cornerRadiusEnd": 2}, "encoding": {"x": x, "y": y, "tooltip": tip}},
            {
                "mark": {"type": "rule", "color": _colour("ink"), "strokeOpacity": 0.55},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y},
            },
        ],
    }


def dependence(curve: Curve, domain: tuple[float, float]) -> Spec:
    """Return the mean objective against one hyperparameter, with a band of one standard deviation over the trees."""
    discrete = _is_discrete(curve.column)
    values = [
        {
            "v": label(value) if discrete else value,
            "m": float(mean),
            "low": max(float(mean - spread), domain[0]),
            "high": min(float(mean + spread), domain[1]),
        }
        for value, mean, spread in zip(curve.values, curve.mean, curve.spread, strict=True)
    ]
    x = _axis(curve.column, "v")
    y = {"field": "m", "type": "quantitative", "title": "mean objective", "scale": {"domain": list(domain), "nice": False, "zero": False}}
    band = {**y, "field": "low"}
    tip = [{"field": "v", "title": curve.column.name}, {"field": "m", "format": ".5g", "title": "mean objective"}]
    if discrete:
        layers = [
            {"mark": {"type": "rule", "color": _colour("accent"), "strokeOpacity": 0.4, "strokeWidth": 2}, "encoding": {"x": x, "y": band, "y2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "color": _colour("accent"), "size": 60, "opacity": 1}, "encoding": {"x": x, "y": y, "tooltip": tip}},
        ]
    else:
        layers = [
            {"mark": {"type": "area", "color": _colour("accent"), "fillOpacity": 0.16, "opacity": 1}, "encoding": {"x": x, "y": band, "y2": {"field": "high"}}},
            {"mark": {"type": "line", "color": _colour("accent"), "strokeWidth": 2}, "encoding": {"x": x, "y": y}},
            {"mark": {"type": "point", "opacity": 0, "size": 60}, "encoding": {"x": x, "y": y, "tooltip": tip}},
        ]
    return {"height": PANEL_HEIGHT, "title": curve.column.name, "data": {"values": values}, "layer": layers}


def surface(one: Surface) -> Spec:
    """Return the mean objective against two hyperparameters, the darker the better."""
    x_cells, y_cells = (_cells(column, values) for column, values in zip(one.columns, one.values, strict=True))
    values = [
        {**{f"x{key}": cell for key, cell in x.items()}, **{f"y{key}": cell for key, cell in y.items()}, "m": float(f"{one.mean[i, k]:.6g}")}
        for i, x in enumerate(x_cells)
        for k, y in enumerate(y_cells)
    ]
    encoding: Spec = {}
    for axis, column in zip("xy", one.columns, strict=True):
        encoding[axis] = {**_axis(column, f"{axis}v" if _is_discrete(column) else f"{axis}low"), "title": column.name}
        if _is_discrete(column):
            encoding[axis]["scale"] = {**encoding[axis]["scale"], "padding": 0}
            encoding[axis]["axis"] = {"labelAngle": 0}
        else:
            encoding[f"{axis}2"] = {"field": f"{axis}high"}
        encoding[axis]["axis"] = {**encoding[axis]["axis"], "grid": False}
    encoding["color"] = {
        "field": "m",
        "type": "quantitative",
        "title": "mean objective",
        "scale": {"range": [_colour("soft"), _colour("accent")], "zero": False, "nice": False},
        "legend": {"gradientLength": PANEL_HEIGHT - 40, "gradientThickness": 8, "tickCount": 4},
    }
    encoding["tooltip"] = [{"field": "xv", "title": one.columns[0].name}, {"field": "yv", "title": one.columns[1].name}, {"field": "m", "title": "mean objective"}]
    return {"height": PANEL_HEIGHT, "data": {"values": values}, "mark": {"type": "rect", "strokeWidth": 0}, "encoding": encoding}


def _cells(column: Column, values: Sequence[Any]) -> list[Row]:
    """Return for each value the cell that it stands for."""
    if _is_discrete(column):
        return [{"v": label(value)} for value in values]
    points = np.log(values) if column.log else np.asarray(values, dtype=float)
    edges = np.concatenate([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    edges = np.exp(edges) if column.log else edges
    edges[0], edges[-1] = column.lower, column.upper
    return [
        {"v": value, "low": float(low), "high": float(high)}
        for value, low, high in zip(values, edges[:-1], edges[1:], strict=True)
    ]


def parallel(trials: Trials) -> Spec:
    """Return the trials as lines over one axis a hyperparameter and the objective; the best tenth stands out.

    Of very many trials the best and a spread of the others are drawn. What is inactive stands below its axis.
    """
    ranked = sorted(trials.done, key=lambda line: -line["objective"])
    good = [line for line in ranked if line["objective"] >= trials.good][: _MOST_LINES // 2]
    others = [line for line in ranked if line["objective"] < trials.good]
    kept = [others[i] for i in np.unique(np.linspace(0, len(others) - 1, min(_MOST_LINES // 2, len(others))).astype(int))]
    low, high = min(trials.shown), max(trials.shown)
    names = [*(column.name for column in trials.columns), "objective"]
    values, ends = [], []
    for line in (*kept, *good):
        for place, column in enumerate(trials.columns):
            value = line.get(f"p:{column.name}")
            y = -0.1 if value is None else position(column, value)
            values.append({"n": line["job_id"], "x": place, "y": round(y, 4), "g": int(line["objective"] >= trials.good)})
        y = (max(line["objective"], low) - low) / ((high - low) or 1.0)
        values.append({"n": line["job_id"], "x": len(names) - 1, "y": round(y, 4), "g": int(line["objective"] >= trials.good)})
    for place, column in enumerate(trials.columns):
        marks = column.choices if 0 < column.size <= 6 and column.choices else _bounds(column)
        ends += [{"x": place, "y": position(column, mark), "label": label(mark)} for mark in marks]
    ends += [{"x": len(names) - 1, "y": y, "label": f"{value:.4g}"} for y, value in ((0, low), (1, high))]
    x = {
        "field": "x",
        "type": "quantitative",
        "title": None,
        "scale": {"domain": [0, len(names) - 1], "nice": False, "padding": 10},
        "axis": {
            "orient": "top",
            "values": list(range(len(names))),
            "labelExpr": f"{_js(names)}[datum.value]",
            "labelColor": _colour("ink"),
            "labelOverlap": False,
            "labelLimit": 100,
            "grid": True,
            "gridOpacity": 0.5,
            "domain": False,
        },
    }
    y = {"field": "y", "type": "quantitative", "axis": None, "scale": {"domain": [-0.12, 1.02], "nice": False}}
    layers: list[Spec] = [
        {
            "transform": [{"filter": f"datum.g === {good}"}],
            "mark": {"type": "line", "color": _colour(colour), "strokeOpacity": opacity, "strokeWidth": width},
            "encoding": {"x": x, "y": y, "detail": {"field": "n"}},
        }
        for good, colour, opacity, width in ((0, "quiet", 0.16, 0.7), (1, "accent", 0.5, 1.0))
    ]
    layers.append(
        {
            "data": {"values": ends},
            "mark": {"type": "text", "align": "left", "dx": 4, "dy": -1, "fontSize": 10, "color": _colour("ink")},
            "encoding": {"x": x, "y": y, "text": {"field": "label"}},
        }
    )
    return {"height": 320, "data": {"values": values}, "layer": layers}


def _bounds(column: Column) -> tuple[Any, Any]:
    if column.choices:
        return column.choices[0], column.choices[-1]
    return (column.lower, column.upper) if column.kind == REAL else (int(column.lower), int(column.upper))


def _js(value: Any) -> str:
    import json

    return json.dumps(value)


def learn(trials: Trials) -> Landscape:
    """Return what a forest makes of the trials; what lies below the floor of the figures counts as lying on it."""
    trials.best  # noqa: B018  # says what is missing
    return Landscape(trials.problem, trials.configs, trials.shown)


def curves_domain(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the range that all panels of the partial dependence share."""
    low = min(float((curve.mean - curve.spread).min()) for curve in curves)
    high = max(float((curve.mean + curve.spread).max()) for curve in curves)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _panels(made: Sequence[Spec], columns: int = 3, width: int = 210) -> Spec:
    return {"concat": [{"width": width, **one} for one in made], "columns": columns, "spacing": 28}


KINDS = {
    "progress": "objective and best so far against evaluations",
    "progress-time": "objective and best so far against time",
    "running": "trials running over time",
    "parallel": "parallel coordinates of the trials",
    "importance": "importance of hyperparameters and of pairs",
    "dependence": "partial dependence on each hyperparameter",
    "panels": "objective against each hyperparameter",
}
"""What `figure` draws: kind -> what it shows."""


def figure(trials: Trials, kind: str) -> Spec:
    """Return a figure of its own, with its data, one of `KINDS`.

    Raises
    ------
    InputError
        When there are too few trials for it.
    """
    trials.best  # noqa: B018  # says what is missing
    width: int = 640
    if kind in ("progress", "progress-time"):
        body = progress(trials, "time" if kind.endswith("time") else "trials")
    elif kind == "running":
        body = running_trials(trials)
    elif kind == "parallel":
        body, width = parallel(trials), max(640, 110 * (len(trials.columns) + 1))
    elif kind == "importance":
        landscape = learn(trials)
        parts = [bars(landscape.shares()), bars(landscape.pairs(), most=8)]
        body = {"vconcat": [{"width": 420, **part} for part in parts if part["data"]["values"]], "spacing": 30}
    elif kind == "dependence":
        landscape = learn(trials)
        curves = [landscape.curve(column.name) for column in landscape.columns]
        body = _panels([dependence(curve, curves_domain(curves)) for curve in curves])
    else:
        body = _panels([panel(trials, j) for j in range(len(trials.columns))])
    made = spec({"background": LIGHT["paper"], **body}, f"{trials.name}: {KINDS[kind]}", width)
    if "data" in made and "name" in made["data"] or kind == "panels":
        made["datasets"] = {"trials": rows(trials)}
    return made


